"""Every Triton kernel compiles for sm_80, sm_90 and gfx942 and fits its budget; no GPU needed."""

import json
import os
import subprocess
import sys

import pytest

from perseid_kernels import (
    activation,
    attention,
    expand,
    gate,
    matmul_common,
    matmul_dense,
    matmul_q4,
    matmul_q8,
    move_slots,
    norm,
    rope,
    routed_lora,
    shrink,
)
from perseid_kernels.aot import BUDGETS, TARGETS, Usage, compile_case
from perseid_kernels.aot_cases import cases_for
from tests.kernels.cases import INTERPRETED


@pytest.fixture(scope="module")
def usages() -> list[Usage]:
    """Everything compiled once, in a process of its own: this one interprets its kernels, and those cannot be."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "perseid_kernels.aot", "--json", "--jobs", "2"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert run.returncode == 0, run.stderr
    return [Usage(**usage) for usage in json.loads(run.stdout)]


def test_kernels_fit_every_target(usages: list[Usage]) -> None:
    """Registers, spills, shared memory, and as many blocks to a multiprocessor as a case asks for."""
    assert {(usage.kernel, usage.target) for usage in usages} == {(c, t) for t in TARGETS for c in cases_for(t)}
    assert not [problem for usage in usages for problem in usage.over_budget()]
    assert all(usage.registers > 0 for usage in usages), "resource usage was not read"
    assert any(usage.shared > 0 for usage in usages), "shared memory was not read"


def test_a_product_sums_k_the_same_way_for_any_number_of_rows(usages: list[Usage]) -> None:
    """One kind of matrix instruction for all launch variants of a weight, or its bits would depend on the batch."""
    for target in TARGETS:
        for product in ("matmul_q4/affine", "matmul_q4/nf4", "matmul_q8", "matmul_dense", "shrink", "expand"):
            kinds = {u.matrix for u in usages if u.target == target and u.kernel.startswith(product)}
            assert len(kinds) == 1, f"{product} on {target}: {kinds}"
            assert len(kinds.pop().split(" k")) == 1, f"{product} on {target} mixes instructions"
        assert all(u.matrix for u in usages if "matmul" in u.kernel)


def test_routed_sums_use_the_instructions_of_sums_by_name(usages: list[Usage]) -> None:
    """Or an adapter that the gates choose would have other bits than the same adapter asked for by name."""
    for target in TARGETS:
        for part in ("shrink", "expand"):
            of_target = [usage for usage in usages if usage.target == target]
            routed = {u.matrix for u in of_target if u.kernel.startswith(f"routed_{part}/")}
            assert routed == {u.matrix for u in of_target if u.kernel.startswith(f"{part}/")}
        gates = {u.matrix for u in usages if u.target == target and u.kernel.startswith("gate_logits")}
        assert len(gates) == 1, f"gates on {target}: {gates}"


def test_tree_rows_use_the_instructions_of_decodes(usages: list[Usage]) -> None:
    """Or a drafted row would have other bits than the same row decoded."""
    for target in TARGETS:
        for head_dim in (64, 96, 128, 256):
            of_target = {usage.kernel: usage for usage in usages if usage.target == target}
            trees = of_target[f"attention/decode_trees/d{head_dim}"]
            assert trees.matrix == of_target[f"attention/decode/d{head_dim}"].matrix != ""


def test_the_variants_of_a_product_are_all_compiled() -> None:
    """K split over programs, split within one, and not split; small and large tiles."""
    for target in TARGETS:
        names = {name.split("/", 1)[1] for name in cases_for(target) if name.startswith("matmul_q8/")}
        assert {name.split("/")[0] for name in names} == {"parallel", "serial", "whole"}
        assert {"parallel/t1", "parallel/t256", "serial/t4096", "whole/t4096"} <= names


def test_every_kernel_has_a_case() -> None:
    """A kernel added to an op file must be added to the cases: names end in `_kernel` and nothing else does."""
    products = (matmul_common, matmul_dense, matmul_q4, matmul_q8)
    modules = (activation, attention, *products, expand, gate, move_slots, norm, rope, routed_lora, shrink)
    kernels = {id(value) for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}
    for target in TARGETS:
        assert kernels == {id(case.kernel) for case in cases_for(target).values()}


def test_budget_excess_is_told_in_words() -> None:
    fits = Usage("k", "sm_80", BUDGETS["sm_80"].registers, 0, BUDGETS["sm_80"].shared)
    assert fits.over_budget() == []
    too_much = Usage("k", "gfx942", 513, 4, 64 * 1024 + 1)
    assert [problem.split(":")[1] for problem in too_much.over_budget()] == [
        " 513 registers, budget 512",
        " spills 4",
        " 65537 bytes of shared memory, budget 65536",
    ]


def test_blocks_that_fit_by_hand() -> None:
    """sm_90: 65536 registers and 228 KiB; a block takes 1 KiB besides its own. gfx942: 131072 and 64 KiB."""
    assert Usage("k", "sm_90", registers=127, spills=0, shared=0, threads=128).blocks_that_fit() == 4
    assert Usage("k", "sm_90", registers=32, spills=0, shared=75 * 1024, threads=128).blocks_that_fit() == 3
    assert Usage("k", "gfx942", registers=128, spills=0, shared=32 * 1024, threads=256).blocks_that_fit() == 2
    crowded = Usage("k", "sm_90", registers=255, spills=0, shared=0, threads=256, blocks=2)
    assert crowded.over_budget() == ["k on sm_90: 1 blocks fit a multiprocessor, budget 2"]


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled in this session")
def test_interpreted_kernels_are_refused() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_case(cases_for("sm_90")["silu_mul"], "sm_90")
