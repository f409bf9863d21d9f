"""What a run shows in the terminal while it lasts."""

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from perseid_loadtest.traffic.driver import Limits
from perseid_loadtest.traffic.tally import Tally

EVERY_S = 0.5
"""Rarely, since it takes its time from the same core that reads the answers."""


@asynccontextmanager
async def live_progress(console: Console, tally: Tally, limits: Limits, title: str) -> AsyncGenerator[None]:
    """Progress for the length of a `with` block; nothing where the output is no terminal."""
    if not console.is_terminal:
        yield
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        showing = asyncio.create_task(_show(live, tally, limits, title))
        try:
            yield
        finally:
            showing.cancel()
            with suppress(asyncio.CancelledError):
                await showing


async def _show(live: Live, tally: Tally, limits: Limits, title: str) -> None:
    began = seen = time.perf_counter()
    ended = tokens = 0
    while True:
        moment = time.perf_counter()
        rates = [
            (now - before) / (moment - seen or 1.0)
            for now, before in ((tally.ended, ended), (tally.output_tokens, tokens))
        ]
        live.update(progress(tally, limits, title, moment - began, rates[0], rates[1]), refresh=True)
        seen, ended, tokens = moment, tally.ended, tally.output_tokens
        await asyncio.sleep(EVERY_S)


def progress(
    tally: Tally, limits: Limits, title: str, seconds: float, requests_per_s: float, tokens_per_s: float
) -> Table:
    """Where the run stands; rates are of the last moments, waits of the latest requests."""
    table = Table.grid(padding=(0, 2))
    table.add_row(Text(title, style="bold"), _phase(limits, seconds, tally))
    table.add_row("requests", f"{tally.running} running, {tally.ended} ended, {requests_per_s:.1f} a second")
    table.add_row("tokens", f"{tally.output_tokens} in ended answers, {tokens_per_s:.0f} a second")
    waits = [record.ttft for record in tally.recent if record.ttft is not None]
    if waits:
        table.add_row(
            "first token", f"{1000 * statistics.median(waits):.0f} ms, the longest {1000 * max(waits):.0f} ms"
        )
    if tally.errors:
        counted = ", ".join(f"{count} × {kind}" for kind, count in tally.errors.most_common(4))
        table.add_row("errors", Text(counted, style="red"))
    return table


def _phase(limits: Limits, seconds: float, tally: Tally) -> str:
    if tally.done_sending:
        return f"done sending, waiting for {tally.running}"
    if seconds < limits.warm_up_s:
        return f"warming up, {limits.warm_up_s - seconds:.0f} s more"
    measured = seconds - limits.warm_up_s
    if limits.duration_s is None:
        of = f" of {limits.requests} requests" if limits.requests is not None else ""
        return f"{measured:.0f} s{f', {tally.ended}{of}' if of else ''}"
    behind = measured - limits.duration_s
    if behind < 0:
        return f"{measured:.0f} of {limits.duration_s:g} s"
    if limits.concurrency is not None:  # no client begins another
        return f"done sending, waiting for {tally.running}"
    return f"{behind:.0f} s behind, still sending what was due within {limits.duration_s:g} s"
