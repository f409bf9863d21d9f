"""What a gate set writes, it reads; what would not be read is not written."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from perseid_router.gate_set import (
    CONFIG_FILE,
    NEVER,
    WEIGHTS_FILE,
    Column,
    Gate,
    GateSet,
    GateSetConfig,
    GateSetError,
    TensorKey,
)

CONFIG = GateSetConfig((Column("a", "a" * 64), Column("b", "b" * 64)))


def gate_set(seed: int = 0) -> GateSet:
    """Values that float16 holds exactly."""
    random = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return random.integers(-100, 100, shape).astype("f4") / 8

    gates = {(layer, name): Gate(values(3, 8), values(3)) for layer in (0, 11) for name in ("q_proj", "o_proj")}
    gates[3, "v_proj"] = Gate(values(3, 8), np.array([0, NEVER, 0], "f4"))
    gates[4, "v_proj"] = Gate(values(3, 8), np.zeros(3, "f4"))
    mean_square = {(0, "qkv"): np.full(8, 1e9, "f4")}  # beyond float16
    return GateSet(CONFIG, gates, mean_square, {"weight": values(16, 4), "bias": values(4)})


def assert_same(one: GateSet, other: GateSet) -> None:
    assert one.config == other.config
    assert set(one.gates) == set(other.gates)
    for site, gate in one.gates.items():
        assert np.array_equal(gate.weight, other.gates[site].weight), site
        assert np.array_equal(gate.bias, other.gates[site].bias), site
    for ours, theirs in ((one.input_mean_square, other.input_mean_square), (one.request_router, other.request_router)):
        assert set(ours) == set(theirs)
        for key, value in ours.items():
            assert value.dtype == theirs[key].dtype == np.float32
            assert np.array_equal(value, theirs[key]), key


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_set_is_read_as_it_was_written(dtype, tmp_path):
    gate_set().write(tmp_path / "deep" / "set", dtype)
    assert_same(GateSet.read(tmp_path / "deep" / "set"), gate_set())
    stored = load_file(tmp_path / "deep" / "set" / WEIGHTS_FILE)
    assert stored["layers.0.q_proj.weight"].dtype == dtype
    assert stored["layers.0.q_proj.bias"].dtype == np.float32
    assert "layers.4.v_proj.bias" not in stored


def test_a_set_takes_the_place_of_another_and_leaves_nothing_beside(tmp_path):
    gate_set(1).write(tmp_path)
    gate_set(2).write(tmp_path)
    assert_same(GateSet.read(tmp_path), gate_set(2))
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}


def test_equal_sets_are_equal_files(tmp_path):
    for name in ("x", "y"):
        gate_set().write(tmp_path / name)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()


def test_whoever_may_read_one_file_may_read_the_other(tmp_path):
    gate_set().write(tmp_path)
    modes = {(tmp_path / name).stat().st_mode & 0o777 for name in (CONFIG_FILE, WEIGHTS_FILE)}
    assert len(modes) == 1


def test_what_would_not_be_read_is_not_written(tmp_path):
    good = gate_set()
    gate = good.gates[0, "q_proj"]
    bad = {
        "at least one": replace(good, gates={}),
        r"layers\.0\.q_proj\.weight.*3 columns": replace(good, gates={(0, "q_proj"): Gate(gate.weight[:2], gate.bias)}),
        r"\[2\] \(bias\)": replace(good, gates={(0, "q_proj"): Gate(gate.weight, gate.bias[:2])}),
        "not finite in float16": replace(good, gates={(0, "q_proj"): Gate(gate.weight * np.float32(1e5), gate.bias)}),
        "k 0": replace(good, config=replace(CONFIG, k=0)),
    }
    for words, bad_set in bad.items():
        with pytest.raises(GateSetError, match=words):
            bad_set.write(tmp_path, "float16")
    assert not list(tmp_path.iterdir())


def test_a_kill_between_the_files_leaves_no_set_of_two_halves(tmp_path, monkeypatch):
    gate_set(1).write(tmp_path)

    class Killed(BaseException): ...

    def dies(self, target):
        raise Killed

    monkeypatch.setattr("pathlib.Path.replace", dies)
    with pytest.raises(Killed):
        gate_set(2).write(tmp_path)
    with pytest.raises(GateSetError, match=r"has no gate_set\.json"):
        GateSet.read(tmp_path)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    gate_set().write(tmp_path)
    save_file({"layers.0.q_proj.wait": np.zeros(2, "f4")}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(GateSetError, match=r"unknown tensor 'layers\.0\.q_proj\.wait'"):
        GateSet.read(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"no tensors")
    with pytest.raises(GateSetError, match=r"gates\.safetensors cannot be read"):
        GateSet.read(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(GateSetError, match="cannot be read"):
        GateSet.read(tmp_path)


def test_names_of_tensors():
    key = TensorKey(12, "down_proj", "weight")
    assert key.name == "layers.12.down_proj.weight"
    assert TensorKey.parse(key.name) == key
    for name in ("layers.01.q_proj.weight", "layers.١.q_proj.weight", "layers.1.q_proj.lora_A", "x.layers.1.q.bias"):
        assert TensorKey.parse(name) is None


def test_the_file_part_imports_no_torch():
    modules = "gate_set, perseid_router.arrow, perseid_router.request_router, perseid_router.request_router_training"
    code = f"import sys, perseid_router.{modules}\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
