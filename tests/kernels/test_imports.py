"""The CPU path imports no triton, and without triton everything but a launch works. Each in its own process."""

import subprocess
import sys


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_eager_backend_imports_no_triton() -> None:
    run("""
import sys, torch
before = "triton" in sys.modules  # torch's own doing, if so
import perseid_kernels.backend, perseid_kernels.eager_backend, perseid_kernels.segments, perseid_kernels.weights
assert ("triton" in sys.modules) == before
assert not [name for name in sys.modules if name in ("perseid_kernels._triton", "perseid_kernels.triton_backend")]
""")


def test_oracles_work_without_triton_and_a_launch_is_refused() -> None:
    run("""
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import perseid_kernels.triton_backend  # brings in every op file
from perseid_kernels.activation import silu_mul, silu_mul_oracle
assert silu_mul_oracle(torch.zeros(2, 6)).shape == (2, 3)
try:
    silu_mul(torch.zeros(2, 6))
except ModuleNotFoundError as error:
    assert "perseid[gpu]" in str(error), error
else:
    raise AssertionError("the launch was accepted")
""")


def test_needs_torch_alone() -> None:
    run("""
import sys
for name in ("msgspec", "structlog", "pydantic", "gguf", "transformers"):
    sys.modules[name] = None
import perseid_kernels.triton_backend, perseid_kernels.eager_backend, perseid_kernels.backend
""")
