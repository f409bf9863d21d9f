"""What may be named as a base, and what a wrong name is answered with."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from perseid_server.errors import Forbidden, NotFound, PerseidError, Unavailable, UnsupportedModel
from perseid_server.model.source import ModelSource, from_hub, resolve_model
from tests.server.model.loading.files import tiny_config


def hf_folder(folder: Path, architecture: str = "LlamaForCausalLM") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config("llama").to_dict() | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("Qwen2.5-0.5B-Instruct-q4_k_m.gguf", "Qwen2.5-0.5B-Instruct"),
        ("model-F16.gguf", "model"),
        ("plain.gguf", "plain"),
    ],
)
def test_gguf_file_is_named_without_its_quantisation(tmp_path: Path, file: str, name: str) -> None:
    path = tmp_path / file
    path.touch()
    assert resolve_model(str(path)) == ModelSource("gguf", path, name, str(path))


def test_folder_is_named_by_its_last_part(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "my-model")
    assert resolve_model(f"{folder}/") == ModelSource("hf", folder, "my-model", f"{folder}/")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-model", r"'no-such-model'.*org/name"),
        ("/no/such/path.gguf", r"no such file"),
        ("../up/down", r"no such file"),
    ],
)
def test_names_that_are_nothing(source: str, message: str) -> None:
    with pytest.raises(NotFound, match=message):
        resolve_model(source)


def test_folder_with_gguf_files_names_one(tmp_path: Path) -> None:
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UnsupportedModel, match=r"no config\.json.*b\.gguf"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_other_single_files_are_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(UnsupportedModel, match=r"must be a \.gguf"):
        resolve_model(str(tmp_path / file))


def test_hub_weights_are_fetched_after_the_config_was_read(tmp_path: Path) -> None:
    asked: list[tuple[str, str | None, list[str]]] = []

    def fetch(repo: str, revision: str | None, patterns: list[str]) -> Path:
        asked.append((repo, revision, patterns))
        return hf_folder(tmp_path)

    source = from_hub("org/name", "v1", "org/name@v1", fetch)
    assert source == ModelSource("hf", tmp_path, "org/name", "org/name@v1")
    assert [(repo, revision) for repo, revision, _ in asked] == [("org/name", "v1")] * 2
    assert "*.safetensors" not in asked[0][2]
    assert "*.safetensors" in asked[1][2]


def test_unsupported_hub_model_costs_no_download(tmp_path: Path) -> None:
    asked = []

    def fetch(repo: str, revision: str | None, patterns: list[str]) -> Path:
        asked.append(patterns)
        return hf_folder(tmp_path, "MambaForCausalLM")

    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        from_hub("org/name", None, "org/name", fetch)
    assert len(asked) == 1


def test_hub_id_asks_for_safetensors_and_never_for_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(repo: str, **options: object) -> str:
        asked.append((repo, options))
        return str(hf_folder(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model("org/some.name@refs/pr/1").name == "org/some.name"
    repo, options = asked[-1]
    assert (repo, options["revision"]) == ("org/some.name", "refs/pr/1")
    allowed, ignored = options["allow_patterns"], options["ignore_patterns"]
    files = [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "pytorch_model.bin",
        "x.pt",
        "original/a.safetensors",
    ]
    kept = list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allowed, ignore_patterns=ignored))
    assert kept == ["model.safetensors", "config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (errors.RepositoryNotFoundError, NotFound, "neither a local path nor a public hub repository"),
        (errors.GatedRepoError, Forbidden, "gated.*HF_TOKEN"),
        (errors.RevisionNotFoundError, NotFound, "no revision 'v9'"),
        (errors.LocalEntryNotFoundError, Unavailable, "cannot be reached"),
        (ConnectionError, Unavailable, "cannot be reached"),
    ],
)
def test_hub_errors(
    monkeypatch: pytest.MonkeyPatch, raised: type[Exception], expected: type[PerseidError], message: str
) -> None:
    def snapshot(*_: object, **__: object) -> str:
        raise raised.__new__(raised)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(expected, match=message):
        resolve_model("org/name@v9")
