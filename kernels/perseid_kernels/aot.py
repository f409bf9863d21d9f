"""Compile every Triton kernel ahead of time, without a GPU, and tell what it uses.

    python -m perseid_kernels.aot [--jobs 2] [--json]

Targets: sm_80 (A100), sm_90 (H100, H200), gfx942 (MI300). Signatures are those of a bfloat16 8B-class Llama with
rank pages of 16. The report gives registers a thread, spilled bytes (NVIDIA: local memory; AMD: spilled vector
registers), shared memory a block and the matrix instructions used; `BUDGETS` holds what each target allows, and a
case says how many of its blocks must fit one multiprocessor. Must run with TRITON_INTERPRET
unset: interpreted kernels cannot be compiled.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from perseid_kernels.aot_cases import KernelCase, cases_for

TARGETS: Mapping[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""What is compiled for."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a target has."""

    registers: int  # a thread may use
    shared: int  # bytes a block may use
    register_file: int  # 32-bit registers of a multiprocessor (compute unit)
    shared_memory: int  # bytes of a multiprocessor


BUDGETS: Mapping[str, Budget] = {
    # 99 KiB is also all that a block of an sm_86 or sm_89 has
    "sm_80": Budget(registers=255, shared=99 * 1024, register_file=65536, shared_memory=164 * 1024),
    "sm_90": Budget(registers=255, shared=227 * 1024, register_file=65536, shared_memory=228 * 1024),
    # 256 vector and 256 accumulation registers a thread; four units of 512 registers for each of 64 lanes
    "gfx942": Budget(registers=512, shared=64 * 1024, register_file=131072, shared_memory=64 * 1024),
}
"""No kernel may spill on any target."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kernel uses on one target."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int  # bytes
    threads: int = 128
    blocks: int = 1  # that must fit one multiprocessor
    matrix: str = ""  # its matrix instructions, without the size of the side that the rows are on

    def over_budget(self) -> list[str]:
        """What exceeds the target's budget, in words; empty when it fits."""
        budget = BUDGETS[self.target]
        name = f"{self.kernel} on {self.target}"
        problems = []
        if self.registers > budget.registers:
            problems.append(f"{name}: {self.registers} registers, budget {budget.registers}")
        if self.spills:
            problems.append(f"{name}: spills {self.spills}")
        if self.shared > budget.shared:
            problems.append(f"{name}: {self.shared} bytes of shared memory, budget {budget.shared}")
        fitting = self.blocks_that_fit()
        if not problems and fitting < self.blocks:
            problems.append(f"{name}: {fitting} blocks fit a multiprocessor, budget {self.blocks}")
        return problems

    def blocks_that_fit(self) -> int:
        """Blocks that registers and shared memory let one multiprocessor hold (registers come in eights)."""
        budget = BUDGETS[self.target]
        registers = -(-self.registers // 8) * 8 * self.threads
        by_registers = budget.register_file // max(registers, 1)
        reserved = 1024 if TARGETS[self.target].backend == "cuda" else 0  # CUDA's own, a block
        return min(by_registers, budget.shared_memory // max(self.shared + reserved, 1))


def compile_case(case: KernelCase, target: str) -> Usage:
    """Compile one kernel for one target. Raises Triton's CompilationError when it cannot be compiled."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    source = ASTSource(case.kernel, case.signature(), constexprs=case.constexprs, attrs=case.attributes())
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    read = _read_hip if TARGETS[target].backend == "hip" else _read_cuda
    registers, spills = read(compiled.asm)
    threads = case.num_warps * TARGETS[target].warp_size
    matrix = " ".join(_matrix_instructions(compiled.asm))
    return Usage(case.name, target, registers, spills, compiled.metadata.shared, threads, case.blocks, matrix)


def _matrix_instructions(asm: Mapping[str, Any]) -> list[str]:
    """The kinds of matrix instruction in the code. wgmma's n is left out: it is the rows, not the order of a sum."""
    if "amdgcn" in asm:
        return sorted(set(re.findall(r"v_mfma_\w+", asm["amdgcn"])))
    found = re.findall(r"(wgmma\.mma_async|mma)\.sync\.aligned\.(m\d+)(n\d+)(k\d+)", asm["ptx"])
    return sorted({f"{kind} {m}{'' if 'wgmma' in kind else n}{k}" for kind, m, n, k in found})


def _read_cuda(asm: Mapping[str, Any]) -> tuple[int, int]:
    """(registers, bytes of local memory) from the cubin, by the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _read_hip(asm: Mapping[str, Any]) -> tuple[int, int]:
    """(vector registers, spilled vector registers) from the assembly's metadata."""
    text = asm["amdgcn"]
    found = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", text)}
    return found["vgpr_count"], found["vgpr_spill_count"]


def compile_all(jobs: int = 2) -> list[Usage]:
    """Every case on every target, in `jobs` processes."""
    work = [(case.name, target) for target in TARGETS for case in cases_for(target).values()]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(_compile_named, work, chunksize=4))


def _compile_named(work: tuple[str, str]) -> Usage:
    name, target = work
    return compile_case(cases_for(target)[name], target)


def main() -> int:
    """Print the table (or JSON) and fail when a budget is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m perseid_kernels.aot", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="compile in this many processes (default 2)")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    arguments = parser.parse_args()
    usages = compile_all(arguments.jobs)
    problems = [problem for usage in usages for problem in usage.over_budget()]
    lines = [json.dumps([asdict(usage) for usage in usages])] if arguments.json else _table(usages)
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


def _table(usages: list[Usage]) -> list[str]:
    header = f"{'kernel':<34}{'target':>8}{'registers':>11}{'spills':>8}{'shared':>9}{'blocks':>8}  matrix instructions"
    return [header] + [
        f"{u.kernel:<34}{u.target:>8}{u.registers:>11}{u.spills:>8}{u.shared:>9}{u.blocks_that_fit():>8}  {u.matrix}"
        for u in usages
    ]


if __name__ == "__main__":
    raise SystemExit(main())
