"""`perseid inspect`: what a folder holds, and whether it would be accepted."""

import json
import re
from pathlib import Path

import pytest

from perseid_server.model.checkpoint import open_checkpoint
from perseid_server.model.source import resolve_model
from tests.fakes import byte_tokenizer
from tests.server.cli.running import Perseid
from tests.server.meteora_folder import write_meteora
from tests.server.model.loading.files import tiny_config, tiny_model, write_hf
from tests.server.speculation.heads_folders import medusa_v2, write_heads
from tests.server.stack import write_adapter, write_gate_set


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("llama", tie_word_embeddings=True)
    folder = write_hf(tmp_path_factory.mktemp("models") / "tiny-llama", config, tiny_model(config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    base = open_checkpoint(resolve_model(str(model))).spec
    return write_adapter(tmp_path / "adapter", rank=20, base=base)


def rows(out: str) -> dict[str, str]:
    return dict(re.findall(r"^(\S+(?: \S+)*) {2,}(.*)$", out, re.MULTILINE))


def test_a_model(perseid: Perseid, model: Path) -> None:
    done = perseid("inspect", str(model))
    told = rows(done.out)
    assert (done.status, done.err, told["accepted"]) == (0, "", "yes")
    assert (told["architecture"], told["layers"], told["hidden size"]) == ("LlamaForCausalLM", "2", "256")
    assert told["context"] == "512 tokens"


def test_a_model_of_another_architecture(perseid: Perseid, model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    done = perseid("inspect", str(tmp_path))
    assert (done.status, done.err) == (1, "")
    assert rows(done.out)["accepted"].startswith("no: ")
    assert "MambaForCausalLM" in done.out


def test_an_adapter_that_fits(perseid: Perseid, model: Path, adapter: Path) -> None:
    done = perseid("inspect", str(adapter), "--model", str(model))
    told = rows(done.out)
    assert (done.status, done.err) == (0, "")
    assert told["accepted"].startswith("yes, on ")
    assert (told["type"], told["targets"], told["layers"]) == ("LoRA", "q_proj", "0-1")
    assert told["rank"] == "20 (pages of adapter memory: 2)"


def test_a_gate_set_that_fits(perseid: Perseid, model: Path, tmp_path: Path) -> None:
    base = open_checkpoint(resolve_model(str(model))).spec
    folder = write_gate_set(tmp_path / "gates", {"a": "0" * 64, "b": "1" * 64}, base=base)
    done = perseid("inspect", str(folder), "--model", str(model))
    told = rows(done.out)
    assert (done.status, done.err) == (0, "")
    assert told["accepted"].startswith("yes, on ")
    assert (told["type"], told["adapters"], told["base"]) == ("gates (trained)", "a, b", "may be chosen")
    assert (told["targets"], told["router"]) == ("q_proj in 2 layers", "none for whole requests")


def test_a_meteora_checkpoint_beside_its_models_config(perseid: Perseid, model: Path, tmp_path: Path) -> None:
    base = open_checkpoint(resolve_model(str(model))).spec
    folder = write_meteora(tmp_path / "checkpoint", base=base)
    (folder / "config.json").write_text("{}")
    done = perseid("inspect", str(folder), "--model", str(model))
    told = rows(done.out)
    assert (done.status, told["type"], told["adapters"]) == (0, "gates (meteora)", "sql, sums")
    assert told["base"] == "cannot be chosen"


@pytest.mark.parametrize("file", ["medusa_lm_head.safetensors", "model.safetensors"])
def test_heads_that_fit(perseid: Perseid, model: Path, tmp_path: Path, file: str) -> None:
    base = open_checkpoint(resolve_model(str(model))).spec
    folder = write_heads(tmp_path / "heads", medusa_v2(2, base=base), file=file)
    (folder / "config.json").write_text('{"model_type": "medusa"}')
    done = perseid("inspect", str(folder), "--model", str(model))
    told = rows(done.out)
    assert (done.status, done.err) == (0, "")
    assert told["accepted"].startswith("yes, on ")
    assert (told["type"], told["for"]) == ("heads (Medusa v2), 2 of one block", "the base")
    assert told["lm_head"] == f"that of the base, {base.vocab_size:,} tokens"


def test_heads_that_do_not_fit(perseid: Perseid, model: Path, tmp_path: Path) -> None:
    done = perseid("inspect", str(write_heads(tmp_path / "heads")), "--model", str(model))
    assert (done.status, done.err) == (1, "")
    assert "the shape [8, 8], this base needs [256, 256]" in rows(done.out)["accepted"]


def test_a_gate_set_that_does_not_fit(perseid: Perseid, model: Path, tmp_path: Path) -> None:
    done = perseid("inspect", str(write_gate_set(tmp_path / "gates", {"a": "0" * 64})), "--model", str(model))
    assert (done.status, done.err) == (1, "")
    assert rows(done.out)["accepted"].startswith("no: ")


def test_an_adapter_that_does_not_fit(perseid: Perseid, model: Path, tmp_path: Path) -> None:
    done = perseid("inspect", str(write_adapter(tmp_path / "adapter")), "--model", str(model))
    assert (done.status, done.err) == (1, "")
    assert rows(done.out)["accepted"].startswith("no: ")


@pytest.mark.parametrize("source", ["/nonexistent", "", "a\0b"], ids=ascii)
def test_what_is_not_there_is_one_line(perseid: Perseid, source: str) -> None:
    done = perseid("inspect", source)
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1), done


def test_an_empty_folder_is_no_adapter(perseid: Perseid, model: Path, tmp_path: Path) -> None:
    done = perseid("inspect", str(tmp_path), "--model", str(model))
    assert (done.status, done.err) == (1, "")
    assert "adapter_config.json" in rows(done.out)["accepted"]
