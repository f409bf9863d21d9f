"""Heads load from every layout that is about; bad ones are refused by the name of what is wrong."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_torch_file

from perseid_server.errors import AdapterRejected
from perseid_server.speculation.heads_config import (
    CONFIG_FILE,
    MAX_HEADS,
    TENSORS_FILE,
    HeadsConfig,
    default_accuracy,
)
from perseid_server.speculation.heads_file import check_heads
from tests.fakes import tiny_spec
from tests.server.speculation.heads_folders import Tensors, medusa_v1, medusa_v2, vllm, write_heads

BASE = tiny_spec()
E, V = BASE.hidden_size, BASE.vocab_size
WEIGHT, BIAS = "0.0.linear.weight", "0.0.linear.bias"


# --- layouts ----------------------------------------------------------------------------------------------------


def test_medusa_v2_shares_the_lm_head_of_the_base(tmp_path):
    tensors = medusa_v2(3)
    checked = check_heads(write_heads(tmp_path, tensors), BASE)
    told = checked.info
    assert (told.num_heads, told.num_layers, told.layout, told.shares_lm_head) == (3, 1, "Medusa v2", True)
    assert (told.adapter, told.num_draft_tokens, told.num_parameters) == (None, V, 3 * (E * E + E))
    assert told.nbytes == (tmp_path / TENSORS_FILE).stat().st_size
    assert told.warnings == ()
    read = checked.tensors()
    assert read.lm_heads == ()
    for head in range(3):
        np.testing.assert_array_equal(read.weights[head][0], tensors[f"{head}.0.linear.weight"])
        np.testing.assert_array_equal(read.biases[head][0], tensors[f"{head}.0.linear.bias"])


def test_several_layers_and_no_biases(tmp_path):
    tensors = medusa_v2(2, 3, bias=False)
    checked = check_heads(write_heads(tmp_path, tensors), BASE)
    read = checked.tensors()
    assert (checked.info.num_heads, checked.info.num_layers) == (2, 3)
    assert read.biases == ((None,) * 3,) * 2
    np.testing.assert_array_equal(read.weights[1][2], tensors["1.2.linear.weight"])


@pytest.mark.parametrize("num_layers", [1, 2])
def test_medusa_v1_has_an_lm_head_for_each_head(tmp_path, num_layers):
    tensors = medusa_v1(2, num_layers)
    checked = check_heads(write_heads(tmp_path, tensors), BASE)
    assert (checked.info.layout, checked.info.num_layers, checked.info.shares_lm_head) == (
        "Medusa v1",
        num_layers,
        False,
    )
    for head, lm_head in enumerate(checked.tensors().lm_heads):
        np.testing.assert_array_equal(lm_head, tensors[f"{head}.{num_layers}.weight"])


def test_vllm_has_an_lm_head_for_each_head_or_one_for_all(tmp_path):
    each, one = vllm(3), vllm(3, shared=True)
    checked = check_heads(write_heads(tmp_path / "each", each, file="model.safetensors"), BASE)
    assert (checked.info.layout, checked.info.num_heads, checked.info.num_layers) == ("vLLM", 3, 1)
    np.testing.assert_array_equal(checked.tensors().lm_heads[2], each["lm_heads.2.weight"])
    shared = check_heads(write_heads(tmp_path / "one", one), BASE).tensors().lm_heads
    assert len(shared) == 1
    np.testing.assert_array_equal(shared[0], one["lm_head.weight"])


def test_the_first_lm_head_serves_all_where_vllm_says_so(tmp_path):
    tensors = vllm(3)
    del tensors["lm_heads.1.weight"], tensors["lm_heads.2.weight"]
    folder = write_heads(tmp_path, tensors)
    assert "head 1 has no lm_head" in refusal(folder)
    (folder / "config.json").write_text('{"original_lm_head": true}')
    assert len(check_heads(folder, BASE).tensors().lm_heads) == 1


@pytest.mark.parametrize("rows", [3, V])
def test_a_token_map_becomes_an_ascending_draft_vocabulary(tmp_path, rows):
    """vLLM writes lm_heads of the mapped rows, or whole ones that it cuts itself."""
    tensors, ids = vllm(2, rows=rows), np.array([9, 2, 5])
    checked = check_heads(write_heads(tmp_path, tensors | {"token_map": ids}), BASE)
    assert (checked.config.draft_vocabulary, checked.info.num_draft_tokens) == ((2, 5, 9), 3)
    expected = tensors["lm_heads.1.weight"][[1, 2, 0] if rows == 3 else [2, 5, 9]]
    np.testing.assert_array_equal(checked.tensors().lm_heads[1], expected)


@pytest.mark.parametrize("rows", [3, V])
def test_a_draft_vocabulary_of_the_config(tmp_path, rows):
    tensors = medusa_v1(2, rows=rows)
    checked = check_heads(write_heads(tmp_path, tensors, config=HeadsConfig(draft_vocabulary=(2, 5, 9))), BASE)
    expected = tensors["0.1.weight"] if rows == 3 else tensors["0.1.weight"][[2, 5, 9]]
    np.testing.assert_array_equal(checked.tensors().lm_heads[0], expected)


@pytest.mark.parametrize(
    "prefix",
    ["medusa_head.", "medusa_heads.", "model.medusa_head.", "base_model.medusa_head.", "base_model.model.medusa_head."],
)
def test_prefixes_are_taken_off(tmp_path, prefix):
    tensors = {prefix + name: values for name, values in medusa_v1(2).items()}
    checked = check_heads(write_heads(tmp_path, tensors), BASE)
    assert (checked.info.num_heads, len(checked.tensors().lm_heads)) == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_widened(tmp_path, dtype):
    tensors = {name: torch.from_numpy(values).to(dtype) for name, values in medusa_v2(1).items()}
    save_torch_file(tensors, tmp_path / TENSORS_FILE)
    weight = check_heads(tmp_path, BASE).tensors().weights[0][0]
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, tensors[WEIGHT].float().numpy())


# --- configuration ----------------------------------------------------------------------------------------------


def test_heads_without_a_table_get_the_published_one(tmp_path):
    checked = check_heads(write_heads(tmp_path, medusa_v2(2)), BASE)
    assert checked.config == HeadsConfig(accuracy=default_accuracy(2))
    assert not checked.info.has_accuracy
    again = check_heads(write_heads(tmp_path, medusa_v2(2), config=HeadsConfig(adapter="a" * 64)), BASE)
    assert again.config == HeadsConfig("a" * 64, accuracy=default_accuracy(2))


def test_heads_with_a_table(tmp_path):
    config = HeadsConfig("a" * 64, (1, 4), ((0.5, 0.25), (0.25,)))
    checked = check_heads(write_heads(tmp_path, medusa_v2(2), config=config), BASE)
    assert checked.config == config
    assert (checked.info.adapter, checked.info.num_draft_tokens, checked.info.has_accuracy) == ("a" * 64, 2, True)


def test_a_foreign_config_is_not_believed(tmp_path):
    folder = write_heads(tmp_path, medusa_v2(3))
    said = {"medusa_num_heads": 5, "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    (folder / "config.json").write_text(json.dumps(said))
    told = check_heads(folder, BASE).info
    assert (told.num_heads, told.trained_on) == (3, "lmsys/vicuna-7b-v1.3")
    assert told.warnings == (
        "config.json says medusa_num_heads 5; the tensors are of 3",
        f"trained on lmsys/vicuna-7b-v1.3, served on {BASE.name}",
    )


@pytest.mark.parametrize("raw", ["", "[1]", "{", '{"medusa_num_heads": "3"}', "[" * 100_000])
def test_a_foreign_config_that_says_nothing_is_no_matter(tmp_path, raw):
    folder = write_heads(tmp_path)
    (folder / "config.json").write_text(raw)
    assert check_heads(folder, BASE).info.warnings == ()


# --- refusals ---------------------------------------------------------------------------------------------------


def refusal(folder) -> str:
    with pytest.raises(AdapterRejected) as caught:
        check_heads(folder, BASE)
    return caught.value.message


def with_tensor(name: str, *shape: int, value: float = 1) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: np.full(shape, value, "f4")}


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: values for name, values in tensors.items() if name not in names}


def of_ids(*ids: int) -> Callable[[Tensors], Tensors]:
    return lambda _: vllm(2) | {"token_map": np.array(ids, "i8")}


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "nothing": (lambda _: {}, ("holds no Medusa heads", "linear.weight")),
    "lm_heads alone": (lambda _: {"0.1.weight": np.ones((V, E), "f4")}, ("holds no Medusa heads",)),
    "an unknown tensor": (with_tensor("0.0.norm.weight", E), ("unknown tensor '0.0.norm.weight'", "blocks.{head}")),
    "a tensor of the base": (with_tensor("model.embed_tokens.weight", V, E), ("unknown", "embed_tokens")),
    "an adapter": (with_tensor("base_model.model.layers.0.lora_A.weight", 1), ("unknown", "lora_A")),
    "a leading zero": (with_tensor("03.0.linear.weight", E, E), ("unknown", "03.0")),
    "a place taken twice": (with_tensor(f"medusa_head.{WEIGHT}", E, E), (WEIGHT, "same place")),
    "a head missing": (without("1.0.linear.weight", "1.0.linear.bias"), ("head 1", "layer 0", "without a gap")),
    "a layer missing": (with_tensor("2.2.linear.weight", E, E), ("head 0", "layer 1", "0 to 2")),
    "fewer layers in a head": (with_tensor("2.1.linear.weight", E, E), ("head 0 has no tensors of layer 1",)),
    "a bias alone": (without(WEIGHT), (BIAS, "no weight beside it")),
    "too many heads": (lambda _: medusa_v2(MAX_HEADS + 1), ("for head 8", "at most 8 heads", "leave out")),
    "too many layers": (with_tensor("0.8.linear.weight", E, E), ("for layer 8", "at most 8 layers")),
    "another hidden size": (with_tensor(WEIGHT, E, 2 * E), (WEIGHT, f"[{E}, {2 * E}]", f"[{E}, {E}]", BASE.name)),
    "a vector": (with_tensor(WEIGHT, E), (WEIGHT, f"[{E}]", "damaged or for another base")),
    "a matrix for a bias": (with_tensor(BIAS, E, 1), (BIAS, f"[{E}, 1]", f"needs [{E}]")),
    "one lm_head of three": (with_tensor("1.1.weight", V, E), ("head 0 has no lm_head", "{head}.1.weight")),
    "an lm_head amid layers": (with_tensor("1.0.weight", V, E), ("'1.0.weight'", "no place", "{head}.1.weight")),
    "an lm_head of no head": (lambda _: medusa_v1(2) | {"2.1.weight": np.ones((V, E), "f4")}, ("2.1.weight", "0 to 1")),
    "another vocabulary": (lambda _: medusa_v1(2, rows=V - 1), ("0.1.weight", f"[{V - 1}, {E}]", f"[{V}, {E}]")),
    "two layouts": (with_tensor("lm_heads.0.weight", V, E), ("0.0.linear", "lm_heads.0.weight", "one of the two")),
    "two kinds of lm_head": (lambda _: vllm(2) | vllm(2, shared=True), ("lm_head.weight", "one or the other")),
    "vLLM's lm_head of no head": (lambda _: vllm(2) | {"lm_heads.2.weight": np.ones((V, E), "f4")}, ("for head 2",)),
    "a token twice": (of_ids(1, 2, 1), ("token_map", "twice")),
    "a token too high": (of_ids(1, V), ("token_map", f"0 to {V - 1}")),
    "a negative token": (of_ids(1, -1), ("token_map", "does not have")),
    "no tokens": (of_ids(), ("token_map", "[0]")),
    "tokens that are floats": (lambda _: vllm(2) | {"token_map": np.ones(1, "f4")}, ("token_map", "F32", "I64")),
    "a weight of integers": (lambda t: t | {WEIGHT: np.ones((E, E), "i8")}, (WEIGHT, "integers", "F32")),
    "NaN": (with_tensor(WEIGHT, E, E, value=np.nan), (WEIGHT, "NaN")),
    "Inf": (with_tensor("2.0.linear.bias", E, value=-np.inf), ("2.0.linear.bias", "Inf")),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(tmp_path, case):
    change, words = BAD_TENSORS[case]
    message = refusal(write_heads(tmp_path, change(medusa_v2(3))))
    for word in words:
        assert word in message, message


def test_a_damaged_config_is_refused(tmp_path):
    folder = write_heads(tmp_path)
    for raw, words in (
        (b"{", "not JSON"),
        (b'{"schema": 2}', "schema"),
        (b'{"schema": 1, "adapter": "x"}', "adapter"),
        (b'{"schema": 1, "draft_vocabulary": [3, 2]}', "draft_vocabulary"),
        (b'{"schema": 1, "accuracy": [[0.5]]}', "each of 3 heads"),
    ):
        (folder / CONFIG_FILE).write_bytes(raw)
        assert words in refusal(folder)


def test_a_token_map_that_contradicts_the_config_is_refused(tmp_path):
    config = HeadsConfig(draft_vocabulary=(2, 5, 8))
    folder = write_heads(tmp_path, vllm(2, rows=3) | {"token_map": np.array([9, 2, 5])}, config=config)
    assert "leave one out" in refusal(folder)


def test_missing_files_say_how_to_mend_it(tmp_path):
    assert "no medusa_lm_head.safetensors" in refusal(tmp_path)
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"anything")
    message = refusal(tmp_path)
    assert "can run code" in message
    assert "weights_only=True" in message
    assert "--allow-pickle-heads" in message


def test_a_file_that_shrank_is_not_read(tmp_path):
    checked = check_heads(write_heads(tmp_path), BASE)
    (tmp_path / TENSORS_FILE).write_bytes(b"")
    with pytest.raises(AdapterRejected, match="cut short"):
        checked.tensors()
