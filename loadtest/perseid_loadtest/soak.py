"""Does Perseid stay well under load? Minutes at 80 % of what it can serve here, while adapters come and go.

    make soak                                  # ten minutes
    make soak ARGS="--minutes 30 --json soak.json"

Starts a server on loopback with the example adapters and some more, which traffic asks for too and which are replaced
all the time by others that it has never seen. Finds its capacity, runs 80 % of it, and checks: no error; every request
answered once and in full; the memory of each process flat; greedy answers that were given in the middle of it the same
as those to the same requests alone. Exit status 1 when one of these is not so.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvloop
from rich.console import Console

from perseid_loadtest.analysis.files import check_place
from perseid_loadtest.attempts import Attempts
from perseid_loadtest.engines import Server, end_with_servers, perseid
from perseid_loadtest.full_pool import fill_adapter_memory
from perseid_loadtest.offline import example_adapters
from perseid_loadtest.traffic.arrivals import Gamma
from perseid_loadtest.traffic.driver import Limits
from perseid_loadtest.traffic.lengths import Between
from perseid_loadtest.traffic.memory import SETTLE_S, Memory, Watched, processes_of
from perseid_loadtest.traffic.plan import Plan
from perseid_loadtest.traffic.popularity import zipf
from perseid_loadtest.traffic.probes import Probes
from perseid_loadtest.traffic.prompts import RandomPrompts
from perseid_loadtest.traffic.record import RequestRecord, Run
from perseid_loadtest.traffic.session import Session
from perseid_loadtest.traffic.sweep import find_highest_rate
from perseid_loadtest.traffic.tally import Stop
from perseid_loadtest.variations import Variations
from perseid_loadtest.workload import TOKEN_RANGE

SHARE_OF_CAPACITY = 0.8
PROMISED_S = 2.0
TRIAL = Limits(warm_up_s=5.0, duration_s=25.0)
"""Long enough for a queue to show that grows slowly."""
MOST_GROWTH = 0.05
KV_MEMORY = ("--kv-memory", "128")
"""MiB. Memory of the KV cache is taken as blocks are first used; so small a cache is in use as a whole after seconds,
and nothing of it is left to grow when measuring begins."""
NUM_CHURNED = 4
WIDE = "french-words"
"""Adapts all linears with one rank: adapter memory is filled with others like it, for the same reason."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise, and what was found."""

    name: str
    held: bool
    found: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the run, after warm-up")
    parser.add_argument("--rate", type=float, help="requests a second; default: 80 %% of the capacity that is found")
    parser.add_argument("--json", type=Path, help="file for the figures and all records")
    parser.add_argument("server_args", nargs="*", help="options for perseid serve, after --")
    options = parser.parse_args(arguments)
    end_with_servers()
    adapters = example_adapters()
    if not adapters:
        parser.error("no example adapters here; run it in a source checkout")
    if options.json is not None:
        check_place(options.json, "json")
    sources = _folders(adapters)
    with tempfile.TemporaryDirectory() as folder:
        churned = Variations([Path(source) for source in sources.values()], Path(folder), NUM_CHURNED)
        first = [f"{name}={copy}" for name, (copy,) in _named(churned).items()]
        arguments = ["--adapter-root", folder, *KV_MEMORY, *options.server_args]
        with perseid([*adapters, *first], arguments) as server:
            uvloop.run(_fill(server, Path(sources[WIDE]), Path(folder)))
            sys.exit(uvloop.run(_soak(server, tuple(sources), churned, options)))


async def _fill(server: Server, example: Path, folder: Path) -> None:
    from perseid_loadtest.traffic.http_target import HttpTarget  # noqa: PLC0415  needs aiohttp

    target = HttpTarget(server.http_url)
    try:
        await target.open()
        await fill_adapter_memory(target, server.http_url, example, folder, _plan(()))
    finally:
        await target.close()


async def _soak(server: Server, names: tuple[str, ...], churned: Variations, options: argparse.Namespace) -> int:
    """`names`: of adapters that stay."""
    from perseid_loadtest.traffic.http_target import HttpTarget  # noqa: PLC0415  needs aiohttp

    console, target = Console(), HttpTarget(server.http_url)
    churn = _named(churned)
    plan = _plan((*churn, *names))
    try:
        await target.open()
        session = Session(
            target,
            options={"soak_minutes": options.minutes},
            churn=churn,
            before_load=churned.renew,
            asked_for=frozenset((*churn, *names)),
            metrics_url=server.http_url,
        )
        rate = options.rate or SHARE_OF_CAPACITY * await _capacity(session, plan, console)
        console.print(f"{options.minutes:g} minutes at {rate:.3g} requests a second")
        limits = Limits(warm_up_s=SETTLE_S, duration_s=60.0 * options.minutes, stop_on_errors=0.5)
        memory, probes = Memory(processes_of(server.pid)), Probes(server.grpc_address, _plan(names))
        beside = [asyncio.create_task(memory.watch()), asyncio.create_task(probes.ask_meanwhile())]
        asked = plan.fresh(99, Gamma(rate))
        run = await session.run(asked, limits, Stop())
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        checks = [*_of_requests(run, asked), *map(_flat, memory.processes), await _same_alone(probes)]
    finally:
        await target.close()
    return _report(console, run, checks, options.json)


def _folders(adapters: Sequence[str]) -> Mapping[str, str]:
    """By name, with full paths: the server has another working folder."""
    named = (one.partition("=") for one in adapters)
    return {name: str(Path(folder).absolute()) for name, _, folder in named}


def _named(churned: Variations) -> Mapping[str, tuple[str]]:
    """Names that keep getting another version, and the folder of each, which is another before each load."""
    return {f"soak-churn-{number}": (folder,) for number, folder in enumerate(churned.folders)}


def _plan(names: tuple[str, ...]) -> Plan:
    prompts = RandomPrompts(Between(16, 96), range(*TOKEN_RANGE))
    return Plan(1, zipf(("", *names), 1.0), prompts, Between(8, 48))


async def _capacity(session: Session, plan: Plan, console: Console) -> float:
    """The highest rate at which 95 % of the answers are whole within two seconds."""

    async def run_at(rate: float, trial: int) -> Run:
        return await session.run(plan.fresh(trial, Gamma(rate)), TRIAL, Stop())

    def met_by(record: RequestRecord) -> bool:
        return record.error is None and record.latency <= PROMISED_S

    sweep = await find_highest_rate(run_at, met_by, start=2.0, share=0.95, tolerance=0.1)
    if sweep.best is None:
        raise RuntimeError("the server kept its limit at no rate")
    console.print(f"capacity: {sweep.best.rate:.3g} requests a second, {len(sweep.trials)} rates tried")
    return sweep.best.rate


def _of_requests(run: Run, plan: Plan) -> list[Check]:
    """No error; each request once, with all the tokens that it asked for."""
    failed = [record for record in run.records if record.error is not None]
    broken = [change for change in (*run.churn, *run.not_put_back) if change.error is not None]
    kinds = ", ".join(sorted({record.error or "" for record in failed} | {change.error or "" for change in broken}))
    numbers = [record.number for record in run.records]
    short = sum(record.output_tokens != plan.request(record.number).output_tokens for record in run.records)
    return [
        Check(
            "no error",
            not failed and not broken,
            f"{len(run.records)} requests, {len(run.churn)} changes; {kinds or 'none'}",
        ),
        Check(
            "every request answered once",
            numbers == list(range(len(numbers))) and not short,
            f"{short} with another number of tokens than asked for",
        ),
    ]


def _flat(process: Watched) -> Check:
    """The median of the last third of the samples, beside that of the first."""
    name, third = f"memory of the {process.name} flat", len(process.mib) // 3
    if process.has_ended:
        return Check(name, False, "it ended during the run")
    if third == 0:
        return Check(name, False, f"not enough samples: {len(process.mib)}")
    first, last = statistics.median(process.mib[:third]), statistics.median(process.mib[-third:])
    found = f"{first:.0f} MiB at first, {last:.0f} MiB at the end ({last / first - 1:+.1%})"
    return Check(name, abs(last / first - 1) <= MOST_GROWTH, found)


async def _same_alone(probes: Probes) -> Check:
    same, asked = await probes.ask_alone()
    return Check("answers are those of the request alone", same == asked > 0, f"{same} of {asked} the same")


def _report(console: Console, run: Run, checks: Sequence[Check], path: Path | None) -> int:
    from perseid_loadtest.analysis import files, terminal  # noqa: PLC0415  not while it runs
    from perseid_loadtest.analysis.summary import summarise  # noqa: PLC0415

    summary, attempts = summarise(run), Attempts()
    if path is not None:
        attempts.do(lambda: files.write(path, run, summary))
    attempts.do(lambda: terminal.print_summary(console, summary))
    for check in checks:
        line = f"{'held  ' if check.held else 'BROKEN'}  {check.name}: {check.found}"
        attempts.do(partial(console.print, line, highlight=False))
    attempts.end()
    return 0 if all(check.held for check in checks) else 1


if __name__ == "__main__":
    main()
