"""A gate set that would not decide as its author meant is refused by the name of what is wrong."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from perseid_router.gate_set import CONFIG_FILE, WEIGHTS_FILE, GateSet
from perseid_router.request_router import RequestRouter
from perseid_server.adapters.gate_set_file import CheckedGateSet, check_gate_set, read
from perseid_server.adapters.lora import Site
from perseid_server.errors import AdapterRejected
from tests.fakes import tiny_spec
from tests.server.adapters.gate_folders import CONFIG, gate_set, write_gates

Tensors = dict[str, np.ndarray]
BASE = tiny_spec()
Q, Q_BIAS = "layers.0.q_proj.weight", "layers.0.q_proj.bias"


def router() -> RequestRouter:
    """Random numbers in the right places."""
    random = np.random.default_rng(3)
    ones = np.ones(256, "f4")
    return RequestRouter(
        random.normal(size=(256, 4)).astype("f4"), ones[:4], ones[:4], ones, ones, 8, 0.5, {"prompts": 3}
    )


WITH_ROUTER = replace(CONFIG, request_router=router().config())


def with_tensor(name: str, value: np.ndarray) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: value}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def poisoned(name: str, value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors[name].flat[1] = value
        return tensors

    return change


ONE = np.ones(1, "f4")
BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "no tensors": (lambda _: {}, ("holds no gate", "layers.N.PROJECTION.weight")),
    "mean squares only": (lambda _: {"layers.0.qkv.input_mean_square": np.ones(8, "f4")}, ("holds no gate",)),
    "an unknown tensor": (with_tensor("gates.0", ONE), ("unknown tensor 'gates.0'", "q_proj")),
    "an unknown projection": (with_tensor("layers.0.x_proj.weight", ONE), ("unknown", "x_proj", "down_proj")),
    "a gate of a fused linear": (with_tensor("layers.0.qkv.weight", ONE), ("unknown", "layers.0.qkv.weight")),
    "mean squares of a projection": (with_tensor("layers.0.q_proj.input_mean_square", ONE), ("unknown", "gate_up")),
    "a layer with a leading zero": (with_tensor("layers.00.q_proj.weight", ONE), ("unknown", "layers.00")),
    "an adapter": (with_tensor("base_model.model.layers.0.lora_A.weight", ONE), ("lora_A", "not to a gate set")),
    "a layer too many": (with_tensor("layers.2.q_proj.weight", ONE), ("for layer 2", "0 to 1")),
    "a bias alone": (without(Q), (Q_BIAS, "no weight beside it")),
    "rows of other columns": (
        with_tensor(Q, np.ones((4, 8), "f4")),
        (Q, "4 rows", "2 adapters and the base", "3 columns"),
    ),
    "another hidden size": (with_tensor(Q, np.ones((3, 12), "f4")), (Q, "[3, 12]", "[3, 8]", "another size")),
    "a vector": (with_tensor(Q, np.ones(8, "f4")), (Q, "[8]", "[3, 8]")),
    "a matrix for a bias": (with_tensor(Q_BIAS, np.ones((3, 1), "f4")), (Q_BIAS, "[3, 1]", "[3]")),
    "NaN": (poisoned(Q, np.nan), (Q, "NaN")),
    "Inf": (poisoned(Q_BIAS, -np.inf), (Q_BIAS, "Inf")),
    "few mean squares": (with_tensor("layers.0.down.input_mean_square", np.ones(8, "f4")), ("down", "[8]", "[16]")),
    "a negative square": (with_tensor("layers.0.qkv.input_mean_square", -np.ones(8, "f4")), ("qkv", "negative")),
    "an infinite square": (with_tensor("layers.1.o.input_mean_square", np.full(8, np.inf, "f4")), ("o.input", "Inf")),
    "a router that nobody announced": (with_tensor("request_router.bias", ONE), ("request_router.bias", "has no")),
}


def refusal(folder) -> str:
    with pytest.raises(AdapterRejected) as caught:
        check_gate_set(folder, BASE)
    return caught.value.message


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(case, tmp_path):
    change, words = BAD_TENSORS[case]
    tensors = load_file(write_gates(tmp_path) / WEIGHTS_FILE)
    message = refusal(write_gates(tmp_path, tensors=change(tensors)))
    assert all(word in message for word in words), message


BAD_ROUTERS: dict[str, tuple[dict[str, object], Callable[[Tensors], Tensors], str]] = {
    "an unknown key": ({"ngrams": 3}, dict, "unknown key 'ngrams'"),
    "buckets": ({"hash_bits": 40}, dict, "hash_bits 40: expected an integer from 8 to 16"),
    "other buckets": ({"hash_bits": 9}, dict, r"'request_router.weight' has the shape \[256, 4\]; expected \[512, 4\]"),
    "a threshold": ({"threshold": "high"}, dict, "threshold 'high': expected a finite number"),
    "calibration": ({"calibration": 3}, dict, "calibration: expected an object"),
    "a tensor less": ({}, without("request_router.seen"), "'request_router.seen' is missing"),
    "a tensor more": ({}, with_tensor("request_router.idf", ONE), "unknown tensor 'request_router.idf'"),
    "NaN": ({}, poisoned("request_router.weight", np.nan), "not finite"),
    "more than one": ({}, poisoned("request_router.telling", 1.5), "outside of 0 to 1"),
}


@pytest.mark.parametrize("case", BAD_ROUTERS)
def test_a_bad_request_router_is_refused(case, tmp_path):
    changes, change, words = BAD_ROUTERS[case]
    config = replace(WITH_ROUTER, request_router=router().config() | changes)
    replace(gate_set(config), request_router=router().tensors()).write(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    write_gates(tmp_path, config=config, tensors=change(tensors))
    with pytest.raises(AdapterRejected, match=words):
        check_gate_set(tmp_path, BASE)


def test_missing_files_are_refused(tmp_path):
    folder = write_gates(tmp_path)
    (folder / WEIGHTS_FILE).unlink()
    assert "has no gates.safetensors" in refusal(folder)
    (folder / CONFIG_FILE).write_text("{}")
    assert "'format' is missing" in refusal(folder)
    (folder / CONFIG_FILE).unlink()
    assert "has no gate_set.json" in refusal(folder)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_was_written_is_read(dtype, tmp_path):
    mean_square = np.arange(8, dtype="f4") * 1e6
    written = replace(
        gate_set(WITH_ROUTER), input_mean_square={(1, "gate_up"): mean_square}, request_router=router().tensors()
    )
    written.write(tmp_path, dtype)
    checked, plain = check_gate_set(tmp_path, BASE), GateSet.read(tmp_path)
    assert checked.config == WITH_ROUTER
    gates = dict(read(checked))
    assert {(site.layer, site.projection) for site in gates} == set(plain.gates)
    for site, gate in gates.items():
        assert gate.weight.dtype == gate.bias.dtype == np.float32
        assert np.array_equal(gate.weight, plain.gates[site.layer, site.projection].weight)
        assert np.array_equal(gate.bias, written.gates[site.layer, site.projection].bias)
    assert np.array_equal(checked.mean_square(1, "gate_up"), mean_square)
    assert checked.mean_square(0, "gate_up") is None
    loaded = checked.request_router()
    assert loaded is not None
    assert loaded.config() == router().config()
    assert np.array_equal(loaded.weight, plain.request_router["weight"])


def test_a_bias_that_is_left_out_is_zero(tmp_path):
    tensors = load_file(write_gates(tmp_path) / WEIGHTS_FILE)
    write_gates(tmp_path, tensors=without(Q_BIAS)(tensors))
    gate = check_gate_set(tmp_path, BASE).gate(Site(0, "q_proj"))
    assert gate.bias.tolist() == [0, 0, 0]


def test_info_tells_what_the_set_holds(tmp_path):
    replace(gate_set(WITH_ROUTER), request_router=router().tensors()).write(tmp_path)
    info = check_gate_set(tmp_path, BASE).info
    assert (info.kind, info.method, info.adapters, info.num_columns) == ("gates", "trained", ("a", "b"), 3)
    assert (info.num_layers, info.targets) == (2, ("q_proj", "v_proj", "down_proj"))
    assert info.num_parameters == 2 * (3 * (8 + 8 + 16) + 9) + 256 * 4 + 8 + 512
    assert info.nbytes == (tmp_path / WEIGHTS_FILE).stat().st_size
    assert (info.trained_on, info.warnings, info.has_request_router) == ("someone/tiny", (), True)


def test_another_base_is_a_warning(tmp_path):
    write_gates(tmp_path, config=replace(CONFIG, base="someone/Other-7B"))
    assert check_gate_set(tmp_path, BASE).info.warnings == ("trained on someone/Other-7B, served on tiny",)


@given(data=st.data())
def test_flipped_bytes_are_read_or_refused(data, tmp_path_factory):
    folder = write_gates(tmp_path_factory.mktemp("gates"))
    name = data.draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
    raw = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(len(raw), 1200) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        checked = check_gate_set(folder, BASE)
    except AdapterRejected:
        return
    assert all(np.isfinite(gate.weight).all() and np.isfinite(gate.bias).all() for _, gate in read(checked))


def test_a_request_router_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    """Its tensors are read whole, so their size is looked at before."""
    replace(gate_set(WITH_ROUTER), request_router=router().tensors()).write(tmp_path)
    monkeypatch.setattr("perseid_server.adapters.gate_set_file.MAX_ROUTER_NUMBERS", 1000)
    monkeypatch.setattr(CheckedGateSet, "request_router", lambda _: pytest.fail("it was read"))
    with pytest.raises(AdapterRejected, match="numbers; expected at most 1000"):
        check_gate_set(tmp_path, BASE)
