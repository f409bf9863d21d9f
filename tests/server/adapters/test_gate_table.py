"""A table on the device says what the file says, and lets other adapters join without changing that."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from perseid_kernels.routing import GateTable, route
from perseid_router.arrow import arrow_gate
from perseid_router.gate_set import NEVER, Gate, GateSet
from perseid_server.adapters.gate_set_file import CheckedGateSet, check_gate_set
from perseid_server.adapters.gate_table import build_table
from perseid_server.adapters.lora import check_adapter
from perseid_server.adapters.lowering import LoweredLinear, lower
from perseid_server.model.spec import FUSED_LINEARS
from tests.fakes import tiny_spec
from tests.server.adapters.folders import lora_config, lora_tensors, write_adapter
from tests.server.adapters.gate_folders import CONFIG, gate_set

BASE = tiny_spec()
CPU = torch.device("cpu")
JOINED = ("k_proj", "v_proj", "up_proj")


def checked(folder: Path, written: GateSet | None = None) -> CheckedGateSet:
    (written or gate_set()).write(folder)
    return check_gate_set(folder, BASE)


def lowered(folder: Path, targets: tuple[str, ...] = JOINED, seed: int = 0) -> tuple[LoweredLinear, ...]:
    tensors = lora_tensors(BASE, targets=targets, seed=seed)
    return tuple(lower(check_adapter(write_adapter(
        folder, tensors=tensors, config=lora_config(target_modules=list(targets))
    ), BASE), BASE))  # fmt: skip


def gate_of(table: GateTable, layer: int, projection: str) -> Gate | None:
    """One projection's part of a fused linear's gates."""
    (fused,) = (name for name, parts in FUSED_LINEARS.items() if projection in parts)
    gates = table.layers[layer].get(fused)
    place = FUSED_LINEARS[fused].index(projection)
    if gates is None or not gates.gated[place]:
        return None
    rows = slice(place * table.num_columns, (place + 1) * table.num_columns)
    return Gate(gates.weight[rows].numpy(), gates.bias[rows].numpy())


def logits(table: GateTable, layer: int, projection: str, x: np.ndarray) -> np.ndarray:
    gate = gate_of(table, layer, projection)
    assert gate is not None
    product = gate.weight @ x
    return np.where(table.absolute.numpy(), np.abs(product), product) + gate.bias


def test_a_file_alone_is_taken_as_it_is(tmp_path):
    table = build_table(BASE, checked(tmp_path), (), True, CPU)
    assert (table.num_columns, table.num_gated) == (3, 2 * 3)
    assert table.absolute.tolist() == [0, 0, 0]
    for (layer, projection), gate in gate_set().gates.items():
        found = gate_of(table, layer, projection)
        assert np.array_equal(found.weight, gate.weight)
        assert np.array_equal(found.bias, gate.bias)


def test_projections_without_gates_are_zero_and_linears_without_any_are_left_out(tmp_path):
    table = build_table(BASE, checked(tmp_path), (), True, CPU)
    assert set(table.layers[0]) == {"qkv", "down"}
    qkv = table.layers[0]["qkv"]
    assert qkv.gated == (True, False, True)
    assert (qkv.weight.shape, qkv.bias.shape, qkv.weight.dtype) == ((9, 8), (9,), torch.float32)
    assert not qkv.weight[3:6].any()
    assert not qkv.bias[3:6].any()


def test_the_bases_column_can_be_left_out(tmp_path):
    table = build_table(BASE, checked(tmp_path), (), False, CPU)
    assert table.num_columns == 2
    assert np.array_equal(gate_of(table, 1, "v_proj").weight, gate_set().gates[1, "v_proj"].weight[:2])


def test_a_set_without_a_base_gets_none(tmp_path):
    source = checked(tmp_path, gate_set(replace(CONFIG, null=False)))
    with pytest.raises(ValueError, match="no column for the base"):
        build_table(BASE, source, (), True, CPU)
    assert build_table(BASE, source, (), False, CPU).num_columns == 2


def test_a_table_needs_a_column():
    with pytest.raises(ValueError, match="needs a column"):
        build_table(BASE, None, (), False, CPU)


def test_without_a_file_all_columns_are_arrows_and_the_base_is_at_zero(tmp_path):
    joined = lowered(tmp_path / "x"), lowered(tmp_path / "y", ("k_proj", "down_proj"), seed=1)
    table = build_table(BASE, None, joined, True, CPU)
    assert table.absolute.tolist() == [1, 1, 0]
    assert table.num_gated == 2 * len({*JOINED, "down_proj"})
    gate = gate_of(table, 1, "k_proj")
    for column, linears in enumerate(joined):
        (qkv,) = (linear for linear in linears if (linear.layer, linear.fused) == (1, "qkv"))
        expected = arrow_gate(qkv.pairs[1].a, qkv.pairs[1].b)
        assert np.array_equal(gate.weight[column], expected.weight)
        assert gate.bias[column] == expected.bias
    assert not gate.weight[2].any()
    assert gate.bias[2] == 0
    assert gate_of(table, 0, "v_proj").bias.tolist() == [gate.bias[0], np.float32(NEVER), 0]
    assert gate_of(table, 0, "q_proj") is None


def test_joining_changes_nothing_among_the_files_columns(tmp_path):
    """Softmax over any of them, for any input, with the base or without."""
    random = np.random.default_rng(0)
    for null in (True, False):
        source = checked(tmp_path / str(null), gate_set(replace(CONFIG, null=null)))
        alone = build_table(BASE, source, (), null, CPU)
        table = build_table(BASE, source, [lowered(tmp_path / "x")], null, CPU)
        assert table.absolute.tolist() == [0, 0, 1] + [0] * null
        kept = [0, 1] + [3] * null
        for layer, projection in gate_set().gates:
            x = random.normal(size=BASE.projections[projection].in_features).astype("f4")
            before, after = logits(alone, layer, projection, x), logits(table, layer, projection, x)[kept]
            assert np.allclose(before - before[0], after - after[0], atol=1e-4)
            assert (after[-1] if null else after.mean()) == pytest.approx(0, abs=1e-5)


def test_a_joined_adapter_has_arrows_logit_where_it_acts_and_is_never_chosen_where_not(tmp_path):
    linears = lowered(tmp_path / "x")
    table = build_table(BASE, checked(tmp_path), [linears], True, CPU)
    x = np.random.default_rng(0).normal(size=8).astype("f4")
    (qkv,) = (linear for linear in linears if (linear.layer, linear.fused) == (0, "qkv"))
    expected = arrow_gate(qkv.pairs[2].a, qkv.pairs[2].b)
    assert logits(table, 0, "v_proj", x)[2] == pytest.approx(abs(expected.weight @ x) + expected.bias)
    chosen, weights, _ = route(torch.from_numpy(logits(table, 0, "q_proj", x)), torch.ones(4), 4, 30.0)
    assert weights[chosen.index(2)] == 0
    only = torch.tensor([0, 0, 1, 0])
    chosen, weights, entropy = route(torch.from_numpy(logits(table, 0, "q_proj", x)), only, 2, 1.0)
    assert (chosen, weights.tolist(), entropy) == ([2], [1.0], 0.0)


def test_the_files_adapters_stay_away_where_only_a_joined_one_has_gates(tmp_path):
    table = build_table(BASE, checked(tmp_path), [lowered(tmp_path / "x")], True, CPU)
    gate = gate_of(table, 1, "k_proj")
    assert gate.bias[[0, 1]].tolist() == [np.float32(NEVER)] * 2
    assert gate.bias[3] == 0
    assert not gate.weight[[0, 1, 3]].any()


def test_stored_mean_squares_set_the_scale_and_others_stand_in(tmp_path):
    linears = lowered(tmp_path / "x")
    mean_square = np.linspace(1, 50, 8).astype("f4")
    source = checked(tmp_path / "with", replace(gate_set(), input_mean_square={(0, "qkv"): mean_square}))
    other = {(0, "qkv"): np.ones(8, "f4"), (1, "qkv"): mean_square}
    table = build_table(BASE, source, [linears], True, CPU, other)
    for layer in (0, 1):
        (qkv,) = (linear for linear in linears if (linear.layer, linear.fused) == (layer, "qkv"))
        expected = arrow_gate(qkv.pairs[1].a, qkv.pairs[1].b, mean_square)
        assert np.array_equal(gate_of(table, layer, "k_proj").weight[2], expected.weight)


def test_columns_that_a_file_rules_out_stay_ruled_out(tmp_path):
    """As an imported checkpoint does where an adapter lacks a module."""
    written = gate_set(replace(CONFIG, null=False))
    gate = written.gates[0, "q_proj"]
    ruled_out = Gate(gate.weight * np.array([[1], [0]], "f4"), np.array([0.5, NEVER], "f4"))
    source = checked(tmp_path, replace(written, gates={**written.gates, (0, "q_proj"): ruled_out}))
    found = gate_of(build_table(BASE, source, [lowered(tmp_path / "x")], False, CPU), 0, "q_proj")
    assert found.bias.tolist() == [0, np.float32(NEVER), np.float32(NEVER)]
    assert not found.weight.any()


def test_a_file_of_arrow_gates_is_read_as_such(tmp_path):
    written = gate_set(replace(CONFIG, method="arrow"))
    table = build_table(BASE, checked(tmp_path, written), [lowered(tmp_path / "x")], True, CPU)
    assert table.absolute.tolist() == [1, 1, 1, 0]
    assert np.array_equal(gate_of(table, 0, "q_proj").weight[:2], written.gates[0, "q_proj"].weight[:2])
