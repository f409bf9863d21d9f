"""What a scrape costs with many adapters loaded and used: `python -m perseid_loadtest.scrape_cost [adapters]`.

Everything that can have a series has one, so the figure is the dearest scrape a server of this size can have.
"""

import statistics
import sys
import time
from collections import Counter

from perseid_server.engine.messages import BLENDED, ROUTED, EngineStats, SpeculationStats, StepOutputs
from perseid_server.frontend.metrics import Metrics

_ROUNDS = 50


def filled(num_adapters: int) -> Metrics:
    """Metrics of a server on which every adapter was asked for, routed to and drafted for."""
    names = {f"{number:064x}": f"team-{number % 7}/adapter-{number}" for number in range(num_adapters)}
    locations = dict.fromkeys(names, "disk")
    metrics = Metrics(64)
    metrics.watch_adapters(lambda: Counter(locations[version] for version in names), lambda: frozenset(names.values()))
    metrics.watch_processes(lambda: None)
    metrics.watch_step_age(lambda: 0.0)
    metrics.adapters.cache_info.labels("64", "16").set(1)
    metrics.engine_stepped(StepOutputs(iteration_tokens=num_adapters, stats=_stats(tuple(names))), names)
    for name in names.values():
        label = metrics.labels.of(name, traffic=1.0)
        metrics.requests.by_adapter.labels(label).inc()
        metrics.requests.adapter_tokens.labels(label).inc(16)
    for outcome in ("loaded", "refused"):
        metrics.adapter_load_ended(outcome, 0.1)
    return metrics


def _stats(versions: tuple[str, ...]) -> EngineStats:
    drafting = ("", BLENDED, ROUTED, *versions)
    return EngineStats(
        num_running=len(versions),
        kv_blocks_used=1,
        kv_blocks_total=2,
        running_adapters=versions,
        waiting_adapters=versions,
        routed_tokens=tuple((version, 1.0) for version in ("", *versions)),
        speculation=tuple(SpeculationStats(version, 2, 3, 4, 1, 0.5) for version in drafting),
    )


def scrape_seconds(metrics: Metrics, rounds: int = _ROUNDS) -> list[float]:
    """Seconds of each of so many scrapes."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        metrics.render()
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Print the median, the worst and the size."""
    num_adapters = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    metrics = filled(num_adapters)
    seconds = scrape_seconds(metrics)
    lines = metrics.render().count(b"\n")
    sys.stdout.write(
        f"{num_adapters} adapters: median {statistics.median(seconds) * 1e3:.1f} ms, "
        f"worst of {len(seconds)} {max(seconds) * 1e3:.1f} ms, {lines} lines\n"
    )


if __name__ == "__main__":
    main()
