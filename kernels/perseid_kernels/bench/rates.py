"""The machine's two ceilings, measured: memory bandwidth and the rate of a large matrix product. The fastest run
counts, not the median: a ceiling that other work on the machine lowered would make every op look good."""

import torch

from perseid_kernels.bench.roofline import Rates
from perseid_kernels.bench.timing import all_seconds

_GPU_COPY_BYTES = 1 << 30
_CPU_READ_BYTES = 1 << 28  # several times any cache


def measure_rates(device: torch.device, *, scale: float = 1.0) -> Rates:
    """GPU: a copy counts the bytes read and written; the product is bfloat16 by the vendor's library. CPU: a sum
    reads; the product is float32. `scale` shrinks both, for tests."""
    if device.type == "cuda":
        return Rates(_copy_bandwidth(device, scale), _matmul_rate(device, torch.bfloat16, int(8192 * scale)))
    return Rates(_read_bandwidth(scale), _matmul_rate(device, torch.float32, int(1536 * scale)))


def _copy_bandwidth(device: torch.device, scale: float) -> float:
    source = torch.empty(int(_GPU_COPY_BYTES * scale), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(all_seconds(lambda: target.copy_(source), device, 0.5))


def _read_bandwidth(scale: float) -> float:
    values = torch.ones(int(_CPU_READ_BYTES * scale) // 4)
    return values.nbytes / min(all_seconds(values.sum, torch.device("cpu"), 1.0))


def _matmul_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / min(all_seconds(lambda: torch.mm(a, b, out=out), device, 1.0))
