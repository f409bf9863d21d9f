"""The highest rate at which Perseid keeps a promise here: the base alone, a few adapters, many adapters.

    make capacity                                                        # the base, 8 adapters, 100 adapters
    make capacity ARGS="--slo ttft=500ms,tpot=50ms --json capacity.json"

Starts a server on loopback for each, asks it in an open loop with Poisson arrivals, and looks for the highest rate at
which the promised share of the requests meets the limits. Beyond the example adapters, adapters are copies of them with
other scales. Adapters are asked for by Zipf(1), the base not at all where there are adapters.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from perseid_loadtest.analysis.files import check_place, write_whole
from perseid_loadtest.analysis.formatting import seconds
from perseid_loadtest.analysis.slo import Slo
from perseid_loadtest.analysis.summary import Summary, summarise
from perseid_loadtest.attempts import Attempts
from perseid_loadtest.engines import Server, end_with_servers, perseid
from perseid_loadtest.offline import example_adapters
from perseid_loadtest.traffic.arrivals import Gamma
from perseid_loadtest.traffic.driver import Limits
from perseid_loadtest.traffic.lengths import Between
from perseid_loadtest.traffic.plan import Plan
from perseid_loadtest.traffic.popularity import zipf
from perseid_loadtest.traffic.prompts import RandomPrompts
from perseid_loadtest.traffic.record import Run
from perseid_loadtest.traffic.session import Session
from perseid_loadtest.traffic.sweep import Sweep, Trial, find_highest_rate
from perseid_loadtest.traffic.tally import Stop
from perseid_loadtest.variations import Variations
from perseid_loadtest.workload import TOKEN_RANGE

PROMPT_TOKENS = Between(16, 96)
OUTPUT_TOKENS = Between(8, 48)
WARM_UP_S = 3.0
TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Capacity:
    """What was found for one number of adapters."""

    adapters: int
    trials: int  # rates tried
    rate: float = 0.0  # requests a second; 0: none met the limits
    good_share: float = 0.0
    summary: Summary | None = None  # of the run at that rate


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 8, 100], help="how many, one search for each")
    parser.add_argument("--slo", type=Slo.parse, default=Slo.parse("ttft=1s,tpot=100ms"), help="limits")
    parser.add_argument("--share", type=float, default=0.99, help="of the requests that must meet them")
    parser.add_argument("--duration", type=float, default=30.0, help="of each trial, seconds")
    parser.add_argument("--start", type=float, default=3.0, help="rate that is tried first, requests a second")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("server_args", nargs="*", help="options for perseid serve, after --")
    options = parser.parse_args(arguments)
    end_with_servers()
    if not example_adapters():
        parser.error("no example adapters here; run it in a source checkout")
    if options.json is not None:
        check_place(options.json, "json")
    console, found = Console(), []
    for count in options.adapters:
        with adapters_for(count) as adapters, perseid(adapters, options.server_args) as server:
            names = tuple(adapter.partition("=")[0] for adapter in adapters)
            found.append(uvloop.run(_search(server, names, options, console)))
    attempts = Attempts()
    if options.json is not None:
        told = {"slo": options.slo, "share": options.share, "found": found}
        content = msgspec.json.format(msgspec.json.encode(told)) + b"\n"
        attempts.do(lambda: write_whole(options.json, content))
    attempts.do(lambda: console.print(table(found, options.slo, options.share)))
    attempts.end()
    sys.exit(0 if all(one.rate for one in found) else 1)


@contextmanager
def adapters_for(count: int) -> Iterator[list[str]]:
    """NAME=FOLDER of so many adapters, no two with the same content."""
    examples = example_adapters()
    sources = [Path(example.partition("=")[2]) for example in examples]
    with tempfile.TemporaryDirectory() as folder:
        copies = Variations(sources, Path(folder), max(count - len(examples), 0)).folders
        yield [*examples[:count], *(f"copy-{number}={copy}" for number, copy in enumerate(copies))]


async def _search(server: Server, names: tuple[str, ...], options: argparse.Namespace, console: Console) -> Capacity:
    from perseid_loadtest.traffic.http_target import HttpTarget  # noqa: PLC0415  needs aiohttp

    target, slo = HttpTarget(server.http_url), options.slo
    prompts = RandomPrompts(PROMPT_TOKENS, range(*TOKEN_RANGE))
    plan = Plan(1, zipf(names or ("",), 1.0), prompts, OUTPUT_TOKENS)
    limits = Limits(warm_up_s=WARM_UP_S, duration_s=options.duration)

    async def run_at(rate: float, trial: int) -> Run:
        return await session.run(plan.fresh(trial, Gamma(rate)), limits, Stop())

    def tell(trial: Trial) -> None:
        told = f"{len(names)} adapters, {trial.rate:.3g} requests a second: {trial.good_share:.1%} good"
        console.print(told, highlight=False)

    try:
        await target.open()
        session = Session(target, asked_for=frozenset(names))
        sweep = await find_highest_rate(
            run_at, slo.met_by, start=options.start, share=options.share, tolerance=TOLERANCE, tell=tell
        )
    finally:
        await target.close()
    return _capacity(len(names), sweep, slo)


def _capacity(adapters: int, sweep: Sweep, slo: Slo) -> Capacity:
    best, trials = sweep.best, len(sweep.trials)
    if best is None:
        return Capacity(adapters, trials)
    return Capacity(adapters, trials, best.rate, best.good_share, summarise(best.run, slo))


def table(found: Sequence[Capacity], slo: Slo, share: float) -> Table:
    """One line for each number of adapters."""
    rows = Table(title=f"Highest rate at which {share:.0%} of the requests meet {slo.describe()}")
    for name in ("adapters", "requests/s", "good", "tokens/s", "TTFT p50", "TTFT p99", "TPOT p50"):
        rows.add_column(name, justify="right")
    for one in found:
        rows.add_row(str(one.adapters), f"{one.rate:.3g}", f"{one.good_share:.1%}", *_figures(one.summary))
    return rows


def _figures(summary: Summary | None) -> tuple[str, str, str, str]:
    if summary is None or summary.ttft is None or summary.tpot is None or summary.output_tokens_per_s is None:
        return ("–", "–", "–", "–")
    ttft, tpot = summary.ttft, summary.tpot
    return (f"{summary.output_tokens_per_s:.0f}", seconds(ttft.p50), seconds(ttft.p99), seconds(tpot.p50))


if __name__ == "__main__":
    main()
