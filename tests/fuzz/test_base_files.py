"""Files of a base: GGUF and Hugging Face folders. An operator brings them, often from a stranger; each is served as it
says or refused with our own error, in bounded memory."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer

from perseid_server.errors import UnsupportedModel
from perseid_server.model.checkpoint import open_checkpoint
from perseid_server.model.headers.gguf import read_gguf_header
from perseid_server.model.inspect import inspect_model
from perseid_server.model.source import ModelSource
from perseid_server.model.tokenizer import export_tokenizer
from tests.fakes import byte_tokenizer
from tests.fuzz import gguf_bytes
from tests.fuzz.bounds import bounded_memory
from tests.fuzz.campaign import Campaign, fuzzer
from tests.fuzz.mutate import U64, corrupt, json_bytes, mutate
from tests.fuzz.tensor_files import spoiled


def inspect(kind: str, path: Path) -> None:
    """Everything that is looked at before a base is loaded."""
    source = ModelSource(kind, path, "tiny", str(path))
    with bounded_memory():
        try:
            report = inspect_model(source)
        except UnsupportedModel:
            return
        if report.accepted:
            check_numbers_are_there(source)
            bundle = export_tokenizer(source)
            assert isinstance(bundle.tokenizer, Tokenizer)
            bundle.tokenizer.encode("abcd ab")
        else:
            assert report.reason


def check_numbers_are_there(source: ModelSource) -> None:
    """What a good base says of its tensors is in its files."""
    if source.kind == "gguf":
        size = source.path.stat().st_size
        for tensor in read_gguf_header(source.path).tensors.values():
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= size, tensor
    checkpoint = open_checkpoint(source)
    for layer in range(checkpoint.config.num_layers):
        for name, shape in checkpoint.config.projections().items():
            weight = checkpoint.linear(layer, name).dequantize()
            assert tuple(weight.shape) == (shape.out_features, shape.in_features)


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Good files are accepted; torch is imported before memory is bounded."""
    folder = tmp_path_factory.mktemp("good")
    for model in ("gpt2", "llama"):
        path = folder / f"{model}.gguf"
        path.write_bytes(gguf(Random(0), model, spoil=False))
        report = inspect_model(ModelSource("gguf", path, "tiny", str(path)))
        assert report.accepted, report.reason
    path = write_hf(folder / "hf")
    assert inspect_model(ModelSource("hf", path, "tiny", str(path))).accepted


def gguf(random: Random, model: str, *, spoil: bool = True) -> bytes:
    """A file, changed in its metadata, its table, its counts or its bytes."""
    keys, table = gguf_bytes.keys(model), gguf_bytes.tensors()
    if not spoil:
        return gguf_bytes.whole(gguf_bytes.header(keys, table), table)
    match random.randrange(6):
        case 0:
            spoiled_table = gguf_bytes.spoiled_table(random, table)
            return gguf_bytes.whole(gguf_bytes.header(keys, spoiled_table), table)
        case 1:
            raw = gguf_bytes.header(keys, table)
            return corrupt(random, gguf_bytes.whole(raw, table), len(raw))
        case 2:
            counts = random.choice(U64), random.choice(U64)
            return gguf_bytes.whole(gguf_bytes.header(keys, table, *counts), table)
    for _ in range(random.choice((1, 1, 2))):
        keys = gguf_bytes.spoiled_key(random, keys)
    return gguf_bytes.whole(gguf_bytes.header(keys, table), table)


@fuzzer(short=120, long=1200)
def test_gguf(campaign: Campaign, tmp_path: Path) -> None:
    def check(random: Random) -> None:
        path = tmp_path / "case.gguf"
        path.write_bytes(gguf(random, random.choice(("gpt2", "llama"))))
        inspect("gguf", path)

    campaign.run(check)


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 258, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "rope_theta": 10000.0, "eos_token_id": [256], "tie_word_embeddings": True,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32},
    "hidden_act": "silu", "torch_dtype": "float32",
}  # fmt: skip


def write_hf(folder: Path) -> Path:
    """A folder as Hugging Face has it, in one file, with an index."""
    import numpy as np  # noqa: PLC0415
    from safetensors.numpy import save_file  # noqa: PLC0415

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": {"content": "<end>"}, "chat_template": [{"name": "default", "template": "{{ 1 }}"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<turn>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (258, 32), "model.norm.weight": (32,), f"{layer}input_layernorm.weight": (32,),
        f"{layer}post_attention_layernorm.weight": (32,), f"{layer}self_attn.q_proj.weight": (32, 32),
        f"{layer}self_attn.k_proj.weight": (16, 32), f"{layer}self_attn.v_proj.weight": (16, 32),
        f"{layer}self_attn.o_proj.weight": (32, 32), f"{layer}mlp.gate_proj.weight": (64, 32),
        f"{layer}mlp.up_proj.weight": (64, 32), f"{layer}mlp.down_proj.weight": (32, 64),
    }  # fmt: skip
    save_file({name: np.ones(shape, "f4") for name, shape in shapes.items()}, folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(shapes, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@fuzzer(short=120, long=1200)
def test_hugging_face_folder(campaign: Campaign, tmp_path: Path) -> None:
    good = write_hf(tmp_path / "good")

    def check(random: Random) -> None:
        folder = tmp_path / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        path = random.choice(sorted(folder.iterdir()))
        raw = path.read_bytes()
        if path.suffix == ".json":
            content = mutate(random, json.loads(raw))
            path.write_bytes(corrupt(random, raw) if random.random() < 0.2 else json_bytes(random, content))
        else:
            path.write_bytes(spoiled(random, raw))
        inspect("hf", folder)

    campaign.run(check)
