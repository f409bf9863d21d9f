"""One run against a server: traffic, churn and progress at once, /metrics before and after."""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from perseid_loadtest.analysis.scraped import Scrape, untold
from perseid_loadtest.traffic.churn import Churn
from perseid_loadtest.traffic.driver import Driver, Limits, lateness_p99
from perseid_loadtest.traffic.plan import Plan
from perseid_loadtest.traffic.record import ChurnRecord, RequestRecord, Run
from perseid_loadtest.traffic.tally import Stop, Tally
from perseid_loadtest.traffic.target import Target, words_of

_Changes = tuple[ChurnRecord, ...]


@dataclass(frozen=True, slots=True)
class Session:
    """All that stays the same from one run to the next."""

    target: Target
    options: Mapping[str, Any] = field(default_factory=dict)
    churn: Mapping[str, Sequence[str]] = field(default_factory=dict)  # sources by name
    asked_for: frozenset[str] = frozenset()  # adapters that traffic names
    churn_every_s: float = 1.0
    before_load: Callable[[str], None] | None = None  # gets each source of the churn just before it is loaded
    metrics_url: str | None = None
    metrics_key: str | None = None
    tls: ssl.SSLContext | None = None  # for /metrics; None: the system's authorities, and no certificate to show

    async def run(
        self,
        plan: Plan,
        limits: Limits,
        stop: Stop,
        tally: Tally | None = None,
        progress: AbstractAsyncContextManager[None] | None = None,
    ) -> Run:
        """Run it. Nothing that the server does is raised: it is in the records."""
        before = await self._scrape()
        started_at = time.time()
        driver = Driver(self.target, plan, limits, stop, tally or Tally())
        async with progress or nullcontext():
            churned, put_back = await self._with_churn(driver, limits, stop)
        after = await self._scrape()
        records = tuple(sorted(driver.records, key=lambda record: record.number))
        return Run(
            target=self.target.address,
            options={**self.options, "seed": plan.seed},
            started_at=started_at,
            seconds=measured_seconds(records, limits.warm_up_s),
            window_s=sending_seconds(records, limits, driver.sent_to_the_end),
            records=records,
            churn=churned,
            not_put_back=tuple(change for change in put_back if change.error is not None),
            client_busy=driver.busy,
            most_late_s=lateness_p99(records),
            server_before=before.samples,
            server_after=after.samples,
            server_untold=untold(before, after),
            stopped_early=stop.reason or driver.gave_up,
            stops_at_eos=self.target.stops_at_eos,
        )

    async def _with_churn(self, driver: Driver, limits: Limits, stop: Stop) -> tuple[_Changes, _Changes]:
        """The changes meanwhile, and those after that put all back."""
        if not self.churn:
            await driver.run()
            return (), ()
        began = time.perf_counter()
        churn = Churn(self.target, self.churn, self.asked_for, self.churn_every_s, self.before_load)

        def now() -> float:
            return time.perf_counter() - began

        async def change() -> None:
            try:
                await churn.run(now, limits.warm_up_s)
            except Exception as error:  # noqa: BLE001  whatever it was: what was measured before is reported
                stop.set(f"changing adapters failed: {words_of(error)}")

        churning = asyncio.create_task(change())
        try:
            await driver.run()
        finally:
            churning.cancel()
            await asyncio.gather(churning, return_exceptions=True)
            during = len(churn.records)
            await churn.put_back(now)
        return tuple(churn.records[:during]), tuple(churn.records[during:])

    async def _scrape(self) -> Scrape:
        if self.metrics_url is None:
            return Scrape()
        from perseid_loadtest.analysis.server_metrics import scrape  # noqa: PLC0415  only where it is wanted

        return await asyncio.to_thread(scrape, self.metrics_url, self.metrics_key, self.tls)


def measured_seconds(records: Sequence[RequestRecord], warm_up_s: float) -> float:
    """From the end of the warm-up until the last request that counts has ended: in an overload that is longer than
    requests were sent for, and rates are those that the server reached."""
    ends = [record.ended for record in records if not record.warm_up]
    return max(ends) - warm_up_s if ends else 0.0


def sending_seconds(records: Sequence[RequestRecord], limits: Limits, sent_to_the_end: bool) -> float:
    """From the end of the warm-up for as long as requests were due, whenever they ended; where sending ended before
    the time was up, until the last one that was sent. 0 in a closed loop, where none is due."""
    if limits.concurrency is not None:
        return 0.0
    if sent_to_the_end and limits.duration_s is not None:
        return limits.duration_s
    planned = [record.planned for record in records if not record.warm_up]
    return max(planned) - limits.warm_up_s if planned else 0.0
