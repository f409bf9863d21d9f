"""`perseid loadtest`: drive a server, and tell how it did."""

import asyncio
import contextlib
import importlib.util
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import uvloop
from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape

from perseid_loadtest.analysis.slo import Slo
from perseid_loadtest.attempts import Attempts, stdout_console
from perseid_loadtest.traffic.churn import parse_churn
from perseid_loadtest.traffic.compose import (
    adapters_of,
    arrivals_of,
    check_metrics,
    check_plan,
    limits_of,
    metrics_key,
    metrics_url,
    plan_of,
    target_of,
    told,
    traced_adapters,
)
from perseid_loadtest.traffic.live import live_progress
from perseid_loadtest.traffic.options import LoadtestOptions, check
from perseid_loadtest.traffic.plan import Plan
from perseid_loadtest.traffic.record import Run
from perseid_loadtest.traffic.session import Session
from perseid_loadtest.traffic.sweep import Sweep, Trial, find_highest_rate
from perseid_loadtest.traffic.tally import INTERRUPTED, Stop, Tally
from perseid_loadtest.traffic.tls import context_of
from perseid_server.api.descriptors import allow_connections
from perseid_server.errors import PerseidError

if TYPE_CHECKING:
    from perseid_loadtest.analysis.files import Saved


def loadtest(options: Annotated[LoadtestOptions, Parameter(name="*")] = LoadtestOptions()) -> int:  # noqa: B008  frozen
    """Returns the exit status: 0, 1 where errors ended the run or no request succeeded, 130 after Ctrl-C."""
    check(options)
    if options.html is not None:
        from perseid_loadtest.analysis.plots import check_plotly  # noqa: PLC0415  only where it is wanted

        check_plotly()  # before the run rather than after it
    if options.compare is not None:
        return _compare(options)
    if not options.is_grpc:
        _check_aiohttp()
    allow_connections()
    if options.own_cost:
        from perseid_loadtest.traffic.own_cost import measure  # noqa: PLC0415  needs aiohttp

        return measure(stdout_console())
    slo = Slo.parse(options.slo) if options.slo is not None else None
    check_plan(options)
    context_of(options)  # files that cannot be used are told before the run
    parse_churn(options.churn)
    _check_places(options)
    return uvloop.run(_Command(options, slo).run())


def _check_aiohttp() -> None:
    if importlib.util.find_spec("aiohttp") is None:
        raise PerseidError("perseid loadtest needs aiohttp; install it with: pip install 'perseid[loadtest]'")


def _check_places(options: LoadtestOptions) -> None:
    """Files that cannot be written are told before the run."""
    from perseid_loadtest.analysis.files import check_place  # noqa: PLC0415  takes a while to import

    for name, path in (("json", options.json), ("html", options.html)):
        if path is not None:
            check_place(path, name)


def _compare(options: LoadtestOptions) -> int:
    from perseid_loadtest.analysis import compare, files  # noqa: PLC0415  only where it is wanted

    assert options.compare is not None
    _check_places(options)
    a, b = (files.read(path) for path in options.compare)
    attempts = Attempts()
    if options.html is not None:
        attempts.do(partial(compare.write_page, options.html, a, b))
    attempts.do(lambda: compare.print_comparison(stdout_console(), a, b))
    attempts.end()
    return 0


class _Command:
    """One call of the command, with its options read."""

    def __init__(self, options: LoadtestOptions, slo: Slo | None) -> None:
        self._options = options
        self._slo = slo
        self._limits = limits_of(options)
        self._attempts = Attempts()
        self._console = stdout_console()
        self._progress = Console(stderr=True)

    async def run(self) -> int:
        """Connect, run, report."""
        options, target = self._options, target_of(self._options)
        try:
            await target.open()
            names = adapters_of(options, target.names)
            plan = plan_of(options, names, await target.vocabulary())
            await check_metrics(options)
            session = Session(
                target,
                options=told(options) | {"adapters": [name or "base" for name in names]},
                churn=parse_churn(options.churn),
                asked_for=frozenset(names) | traced_adapters(options, plan, target.names),
                churn_every_s=options.churn_every,
                metrics_url=metrics_url(options),
                metrics_key=metrics_key(options),
                tls=context_of(options),
            )
            if options.sweep:
                return await self._sweep(session, plan)
            run = await self._one(session, plan, target.address)
        finally:
            await target.close()
        self._report(run)
        return _status(run)

    async def _one(self, session: Session, plan: Plan, title: str) -> Run:
        stop, tally = Stop(), Tally()
        with _interruptible(stop):
            progress = live_progress(self._progress, tally, self._limits, title)
            return await session.run(plan, self._limits, stop, tally, progress)

    async def _sweep(self, session: Session, plan: Plan) -> int:
        slo = self._slo
        assert slo is not None

        async def run_at(rate: float, trial: int) -> Run:
            arrivals = arrivals_of(self._options, rate)
            assert arrivals is not None
            title = f"{session.target.address}, trial {trial + 1}: {rate:.3g} requests a second"
            return await self._one(session, plan.fresh(trial, arrivals), title)

        def tell(trial: Trial) -> None:
            from perseid_loadtest.analysis.tried import trial_line  # noqa: PLC0415  not while it runs

            self._say(trial_line(trial))

        share, start = self._options.slo_share, self._options.rate or 1.0
        sweep = await find_highest_rate(run_at, slo.met_by, start=start, share=share, tell=tell)
        return self._report_sweep(sweep)

    def _report_sweep(self, sweep: Sweep) -> int:
        from perseid_loadtest.analysis import tried  # noqa: PLC0415  not while it runs

        best = sweep.best
        self._say(tried.outcome(sweep))
        shown = best or sweep.trials[-1]
        told_of_run = {**shown.run.options, "rate": shown.rate, "sweep": tried.as_json(sweep)}
        self._report(replace(shown.run, options=told_of_run))
        if sweep.stopped_early == INTERRUPTED:
            return 130
        return 0 if best is not None else 1

    def _report(self, run: Run) -> None:
        """Files first: a terminal that nobody reads any more takes nothing away."""
        from perseid_loadtest.analysis import files, terminal  # noqa: PLC0415  not while it runs
        from perseid_loadtest.analysis.summary import summarise  # noqa: PLC0415

        summary = summarise(run, self._slo)
        saved = files.Saved(run, summary)
        written = [
            self._written(self._options.json, lambda path: files.write(path, run, summary)),
            self._written(self._options.html, lambda path: _write_page(path, saved)),
        ]
        self._attempts.do(lambda: terminal.print_summary(self._console, summary))
        for path in filter(None, written):
            self._say(f"written: {path}")
        self._attempts.end()

    def _written(self, path: Path | None, write: Callable[[Path], None]) -> Path | None:
        """The file, where one is wanted and it could be written."""
        return path if path is not None and self._attempts.do(lambda: write(path)) else None

    def _say(self, line: str) -> None:
        self._attempts.do(lambda: self._console.print(escape(line)))


def _write_page(path: Path, saved: "Saved") -> None:
    from perseid_loadtest.analysis import page  # noqa: PLC0415  needs plotly

    page.write_page(path, saved)


def _status(run: Run) -> int:
    if run.stopped_early == INTERRUPTED:
        return 130
    answered = any(record.error is None for record in run.records if not record.warm_up)
    return 0 if answered and run.stopped_early is None else 1


@contextlib.contextmanager
def _interruptible(stop: Stop) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run, which still reports; the second ends the process."""
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        stop.set(INTERRUPTED)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, interrupted)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
