"""How long something takes on a device, in seconds, after a warm-up that also compiles."""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

from perseid_kernels.triton_backend import TritonBackend


def seconds(run: Callable[[], object], device: torch.device, budget: float = 0.3) -> float:
    """The median of as many runs as fit into `budget` seconds, at least five."""
    return median(all_seconds(run, device, budget))


def all_seconds(run: Callable[[], object], device: torch.device, budget: float) -> list[float]:
    """Each of these runs by itself."""
    if device.type == "cuda":
        return _of_graph(run, device, budget)
    run()
    return _repeat(lambda: _of_one(run), budget)


def host_seconds(run: Callable[[], object], budget: float = 0.3) -> float:
    """The median by the host's clock, launches included, of what ends by reading from the device."""
    run()
    return median(_repeat(lambda: _of_one(run), budget))


def _repeat(measure: Callable[[], float], budget: float) -> list[float]:
    taken = [measure()]
    while len(taken) < 5 or (sum(taken) < budget and len(taken) < 1000):
        taken.append(measure())
    return taken


def _of_one(run: Callable[[], object]) -> float:
    begun = perf_counter()
    run()
    return perf_counter() - begun


def _of_graph(run: Callable[[], object], device: torch.device, budget: float) -> list[float]:
    """One graph holds the run, so the time between launches is the device's and not Python's."""
    replay = TritonBackend(device).record(run)
    replay()
    torch.cuda.synchronize(device)

    def once() -> float:
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record()
        replay()
        ended.record()
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1e3

    return _repeat(once, budget)


def eager_seconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The same without a graph, for code that cannot be captured: the mean over launches back to back."""
    run()
    torch.cuda.synchronize(device)
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begun.record()
    for _ in range(repeats):
        run()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3 / repeats
