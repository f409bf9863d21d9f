"""An adapter that would not do what its author meant is refused, each with its own message."""

from collections.abc import Callable

import numpy as np
import pytest

from perseid_kernels.segments import PAGE_RANK as KERNELS_PAGE_RANK
from perseid_server.adapters.lora import PAGE_RANK, WEIGHTS_FILE, Site, check_adapter
from perseid_server.adapters.lora_config import CONFIG_FILE
from perseid_server.adapters.lowering import lower
from perseid_server.errors import AdapterRejected
from perseid_server.model.spec import LinearShape
from tests.fakes import tiny_spec
from tests.server.adapters.folders import Q_A, Q_B, lora_config, lora_tensors, tensor_name, write_adapter

Tensors = dict[str, np.ndarray]
BASE = tiny_spec()


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_tensor(name: str, value: np.ndarray | None = None) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: np.ones((4, 8), "f4") if value is None else value}


def poisoned(name: str, value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors[name].flat[3] = value
        return tensors

    return change


def only(names: dict[str, tuple[int, int]]) -> Callable[[Tensors], Tensors]:
    return lambda _: {name: np.ones(shape, "f4") for name, shape in names.items()}


def of_another_size(_: Tensors) -> Tensors:
    return lora_tensors(tiny_spec(projections={name: LinearShape(12, 12) for name in BASE.projections}))


MODEL = "base_model.model"
LAYER = f"{MODEL}.model.layers.0"

BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "another hidden size": (
        of_another_size,
        ("down_proj.lora_A", "[4, 12]", "[4, 16]", "someone/tiny", "another size", "hidden size 8"),
    ),
    "A transposed": (with_tensor(Q_A, np.ones((8, 4), "f4")), (Q_A, "transposed", "[8, 4]", "[4, 8]")),
    "B transposed": (with_tensor(Q_B, np.ones((4, 8), "f4")), (Q_B, "transposed", "[4, 8]", "[8, 4]")),
    "A is a vector": (with_tensor(Q_A, np.ones(8, "f4")), (Q_A, "[8]", "matrix")),
    "A has three dimensions": (with_tensor(Q_A, np.ones((4, 8, 1), "f4")), (Q_A, "[4, 8, 1]", "matrix")),
    "A without B": (without(Q_B), (Q_A, "no lora_B")),
    "B without A": (without(Q_A), (Q_B, "no lora_A")),
    "NaN in A": (poisoned(Q_A, np.nan), (Q_A, "NaN")),
    "NaN in B": (poisoned(Q_B, np.nan), (Q_B, "NaN")),
    "Inf in A": (poisoned(Q_A, np.inf), (Q_A, "Inf")),
    "minus Inf in B": (poisoned(Q_B, -np.inf), (Q_B, "Inf")),
    "rank of A": (with_tensor(Q_A, np.ones((5, 8), "f4")), (Q_A, "rank 5", "config says 4", "rank_pattern")),
    "rank of B": (with_tensor(Q_B, np.ones((8, 5), "f4")), (Q_B, "rank 5", "config says 4")),
    "a layer too many": (with_tensor(tensor_name(2, "q_proj", "A")), ("layers.2.", "for layer 2", "0 to 1")),
    "a layer with a leading zero": (with_tensor(f"{MODEL}.model.layers.01.mlp.up_proj.lora_A.weight"), ("unknown",)),
    "the same matrix twice": (
        with_tensor(Q_A.replace(".lora_A.weight", ".lora_A.default.weight")),
        ("lora_A.default.weight", "same matrix"),
    ),
    "an unknown tensor": (with_tensor(f"{LAYER}.self_attn.x_proj.lora_A.weight"), ("unknown", "x_proj", "q_proj")),
    "an unknown side": (with_tensor(f"{LAYER}.self_attn.q_proj.lora_C.weight"), ("unknown", "lora_C")),
    "a projection elsewhere": (with_tensor(f"{LAYER}.mlp.q_proj.lora_A.weight"), ("unknown", "mlp.q_proj")),
    "DoRA": (with_tensor(Q_A.replace("lora_A.weight", "lora_magnitude_vector")), ("magnitude", "DoRA")),
    "a bias": (with_tensor(Q_B.replace("weight", "bias")), ("lora_B.bias", "biases")),
    "embeddings": (with_tensor(f"{MODEL}.model.embed_tokens.lora_embedding_A"), ("embed_tokens", "not supported")),
    "lm_head": (with_tensor(f"{MODEL}.lm_head.weight"), ("lm_head", "not supported")),
    "GPT-2": (only({f"{MODEL}.transformer.h.0.attn.c_attn.lora_A.weight": (4, 8)}), ("c_attn", "GPT-2", "Llama")),
    "T5": (
        only({f"{MODEL}.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": (4, 8)}),
        ("SelfAttention", "encoder", "another architecture"),
    ),
    "OPT": (only({f"{MODEL}.model.decoder.layers.0.self_attn.q_proj.lora_A.weight": (4, 8)}), ("OPT",)),
    "Phi-3": (only({f"{LAYER}.self_attn.qkv_proj.lora_A.weight": (4, 8)}), ("qkv_proj", "Phi-3")),
    "no tensors": (only({}), ("adapter_model.safetensors holds no tensors",)),
    "a target without tensors": (
        lambda tensors: {name: value for name, value in tensors.items() if "down_proj" not in name},
        ("target_modules", "'down_proj'", "no tensor"),
    ),
}


def refusal(folder) -> str:
    with pytest.raises(AdapterRejected) as caught:
        check_adapter(folder, BASE)
    return caught.value.message


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(case, tmp_path):
    change, words = BAD_TENSORS[case]
    message = refusal(write_adapter(tmp_path, tensors=change(lora_tensors(BASE))))
    assert all(word in message for word in words), message


def test_each_message_is_its_own(tmp_path):
    messages = [
        refusal(write_adapter(tmp_path / str(index), tensors=change(lora_tensors(BASE))))
        for index, (change, _) in enumerate(BAD_TENSORS.values())
    ]
    assert len(set(messages)) == len(messages)


def test_a_rank_that_the_pattern_contradicts_is_refused(tmp_path):
    message = refusal(write_adapter(tmp_path, config=lora_config(rank_pattern={"v_proj": 2})))
    assert "v_proj.lora_A.weight' has rank 4; the config says 2" in message


def test_missing_files_are_refused(tmp_path):
    folder = write_adapter(tmp_path)
    (folder / WEIGHTS_FILE).unlink()
    assert "has no adapter_model.safetensors" in refusal(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    message = refusal(folder)
    assert "adapter_model.bin is not read" in message
    assert "safe_serialization=True" in message
    (folder / CONFIG_FILE).unlink()
    assert "has no adapter_config.json" in refusal(folder)


@pytest.mark.parametrize("alpha", [1e39, -1e300])
def test_a_scale_beyond_float32_is_refused(alpha, tmp_path):
    message = refusal(write_adapter(tmp_path, config=lora_config(lora_alpha=alpha)))
    assert "exceeds float32" in message
    assert "lora_alpha" in message


@pytest.mark.parametrize(
    ("config", "zeroed"),
    [(lora_config(), "lora_B"), (lora_config(), "lora_A"), (lora_config(lora_alpha=0), None)],
    ids=["B is zero", "A is zero", "alpha is zero"],
)
def test_an_adapter_that_changes_nothing_is_accepted_with_a_warning(config, zeroed, tmp_path):
    tensors = lora_tensors(BASE)
    for name in tensors:
        if zeroed and zeroed in name:
            tensors[name][:] = 0
    info = check_adapter(write_adapter(tmp_path, tensors=tensors, config=config), BASE).info
    assert any("changes nothing" in warning for warning in info.warnings)


def test_another_base_is_a_warning_and_the_right_one_is_none(tmp_path):
    config = lora_config(base_model_name_or_path="someone/Other-7B")
    info = check_adapter(write_adapter(tmp_path / "other", config=config), BASE).info
    assert info.warnings == ("trained on someone/Other-7B, served on tiny",)
    assert check_adapter(write_adapter(tmp_path / "tiny"), BASE).info.warnings == ()


def test_targets_that_the_config_excludes_again_need_no_tensors(tmp_path):
    config = lora_config(target_modules=["q_proj", "v_proj", "down_proj", "o_proj"], exclude_modules="o_proj")
    check_adapter(write_adapter(tmp_path, config=config), BASE)


def test_a_module_that_a_layer_lacks_is_zero_there(tmp_path):
    tensors = {name: value for name, value in lora_tensors(BASE).items() if "layers.1.self_attn.q_proj" not in name}
    adapter = check_adapter(write_adapter(tmp_path, tensors=tensors), BASE)
    assert Site(1, "q_proj") not in adapter.pairs
    (qkv,) = (linear for linear in lower(adapter, BASE) if (linear.layer, linear.fused) == (1, "qkv"))
    assert not qkv.a[:, :PAGE_RANK].any()
    assert not qkv.b[:, :, : BASE.projections["q_proj"].out_features].any()
    assert qkv.a[:, 2 * PAGE_RANK :].any()


def test_pages_have_as_many_ranks_as_the_kernels_think():
    assert PAGE_RANK == KERNELS_PAGE_RANK
