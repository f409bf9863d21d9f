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
    matmul_common,
    matmul_dense,
    matmul_q4,
    matmul_q8,
    norm,
    rope,
    shrink,
)
from perseid_kernels.aot import BUDGETS, TARGETS, Usage, compile_case
from perseid_kernels.aot_cases import CASES
from tests.kernels.cases import INTERPRETED


def test_kernels_fit_every_target() -> None:
    """In a process of its own: this one interprets its kernels, and those cannot be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "perseid_kernels.aot", "--json", "--jobs", "2"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert run.returncode == 0, run.stderr
    usages = [Usage(**usage) for usage in json.loads(run.stdout)]
    assert {(usage.kernel, usage.target) for usage in usages} == {(c, t) for c in CASES for t in TARGETS}
    assert not [problem for usage in usages for problem in usage.over_budget()]
    assert all(usage.registers > 0 for usage in usages), "resource usage was not read"


def test_every_kernel_has_a_case() -> None:
    """A kernel added to an op file must be added to the cases: names end in `_kernel` and nothing else does."""
    modules = (activation, attention, expand, matmul_common, matmul_dense, matmul_q4, matmul_q8, norm, rope, shrink)
    kernels = {id(value) for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}
    assert kernels == {id(case.kernel) for case in CASES.values()}


def test_budget_excess_is_told_in_words() -> None:
    fits = Usage("k", "sm_80", BUDGETS["sm_80"].registers, 0, BUDGETS["sm_80"].shared)
    assert fits.over_budget() == []
    too_much = Usage("k", "gfx942", 513, 4, 64 * 1024 + 1)
    assert [problem.split(":")[1] for problem in too_much.over_budget()] == [
        " 513 registers, budget 512",
        " spills 4",
        " 65537 bytes of shared memory, budget 65536",
    ]


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled in this session")
def test_interpreted_kernels_are_refused() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_case(CASES["silu_mul"], "sm_90")
