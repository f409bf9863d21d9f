"""Sends the requests of a plan and writes down what becomes of each.

Open loop: a request is sent when it is due, whether the server has answered others or not, and its latency counts
from then. Were it to count from sending, a server that stalls would also stall the measuring, and the waits that users
would have had in that time would be missing from the figures (coordinated omission).
Closed loop: C clients, each with one request at a time.
"""

import asyncio
import itertools
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass

from perseid_loadtest.drive import Arrival
from perseid_loadtest.traffic.arrivals import Due
from perseid_loadtest.traffic.plan import Plan, Request
from perseid_loadtest.traffic.record import RequestRecord
from perseid_loadtest.traffic.tally import Stop, Tally
from perseid_loadtest.traffic.target import CLIENT, Answer, Failed, Target, words_of

PAUSE_S = 0.1
MOST_PAUSE_S = 1.0
"""A client of a closed loop waits that long after a failure, and no longer than this where the server asks for more:
it must not storm a server that refuses at once."""
MOST_BEHIND_S, MOST_BEHIND_SHARE = 5.0, 0.1
"""An open loop that is still sending so long after its end (or this share of its length, whichever is more) gives up:
its generator cannot bring the rate, and would go on for ever."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a run is. Warm-up comes first and does not count; then `duration_s` or `requests`, or all of a trace."""

    warm_up_s: float = 0.0
    duration_s: float | None = None
    requests: int | None = None
    concurrency: int | None = None  # clients of a closed loop; None: an open loop, by the plan's arrivals
    timeout_s: float = 120.0  # of one request
    stop_on_errors: float = 1.0  # share of the latest requests; 1: never


class Driver:
    """One run. Its records are complete when `run` has returned: every request that was due has exactly one."""

    def __init__(self, target: Target, plan: Plan, limits: Limits, stop: Stop, tally: Tally) -> None:
        self._target = target
        self._plan = plan
        self._limits = limits
        self._stop = stop
        self._tally = tally
        self._numbers = itertools.count()
        self._measured = 0  # requests that count, taken so far
        self._pending: dict[int, tuple[Request, float, bool]] = {}  # by number: planned, warm-up
        self._tasks: set[asyncio.Task[RequestRecord]] = set()
        self.records: list[RequestRecord] = []
        self.began = 0.0
        self.busy = 0.0  # share of its core that the event loop's thread used while it measured
        self.sent_to_the_end = False  # an open loop: nothing was due any more when sending ended
        self.gave_up: str | None = None  # why an open loop ended although more was due

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.began

    async def run(self) -> None:
        """Send all requests and wait for their ends, or until `stop` is set."""
        self.began = time.perf_counter()
        watching = asyncio.create_task(self._watch_busy())
        working = asyncio.create_task(
            self._guarded(self._open() if self._limits.concurrency is None else self._closed())
        )
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (working, stopping, watching, *self._tasks):
                task.cancel()
            await asyncio.gather(working, stopping, watching, *self._tasks, return_exceptions=True)
            for number in list(self._pending):  # cancelled before they ran at all
                self._end(number, Answer(self.began), self.now(), Failed("interrupted"))

    async def _guarded(self, work: Coroutine[None, None, None]) -> None:
        """A fault, such as of the plan, ends the run and takes no record away."""
        try:
            await work
        except Exception as error:  # noqa: BLE001  it is told as what ended the run
            self._stop.set(f"the load generator failed: {words_of(error)}")

    # --- open loop --------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        for due in self._due():
            delay = due.at - self.now()
            await asyncio.sleep(max(delay, 0.0))
            if self._is_hopeless(due.at):
                self.gave_up = self._unsent(due.at)
                break
            request = self._begin(due.at, due)
            task = asyncio.create_task(self._one(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._tally.done_sending = True
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _due(self) -> Iterator[Due]:
        """Moments up to the run's end."""
        end = self._end_moment()
        for due in self._plan.due():
            if due.at >= end:
                self.sent_to_the_end = True
                return
            if not self._take(due.at):
                return
            yield due

    def _is_hopeless(self, due_at: float) -> bool:
        """Whether what is due is sent so late that the generator will not catch up. All of a trace has an end."""
        limits = self._limits
        if limits.duration_s is None and limits.requests is None:
            return False
        end = due_at if limits.duration_s is None else self._end_moment()
        return self.now() > end + max(MOST_BEHIND_S, MOST_BEHIND_SHARE * end)

    def _unsent(self, due_at: float) -> str:
        """For people: the rate so far, and what it would have come to."""
        sent, limits = self._tally.sent, self._limits
        rate = sent / max(due_at, 1e-9)
        if limits.requests is not None:
            unsent: float = limits.requests - self._measured + 1  # the one that was taken last is not sent
        else:
            unsent = rate * (self._end_moment() - due_at)
        gone = f"{sent:,} went out in {self.now():.1f} s"
        more = f"about {_about(unsent)} more were due"
        return f"the load generator could not send {_about(rate)} requests a second: {gone}, and {more}"

    # --- closed loop ------------------------------------------------------------------------------------------------

    async def _closed(self) -> None:
        async with asyncio.TaskGroup() as clients:
            for _ in range(self._limits.concurrency or 1):
                clients.create_task(self._guarded(self._client()))

    async def _client(self) -> None:
        while (free := self.now()) < self._end_moment() and self._take(free):
            record = await self._one(self._begin(free))
            if record.error is not None:
                await asyncio.sleep(min(record.retry_after_s or PAUSE_S, MOST_PAUSE_S))

    # --- both -------------------------------------------------------------------------------------------------------

    def _end_moment(self) -> float:
        duration = self._limits.duration_s
        return float("inf") if duration is None else self._limits.warm_up_s + duration

    def _take(self, moment: float) -> bool:
        """Whether one more request may start at this moment."""
        if moment < self._limits.warm_up_s:
            return True
        if self._limits.requests is not None and self._measured >= self._limits.requests:
            return False
        self._measured += 1
        return True

    def _begin(self, planned: float, due: Due | None = None) -> Request:
        """The next request; from now on it is owed a record."""
        request = self._plan.request(next(self._numbers), due)
        self._pending[request.number] = (request, planned, planned < self._limits.warm_up_s)
        self._tally.sent += 1
        return request

    async def _one(self, request: Request) -> RequestRecord:
        """Send a request; whatever becomes of it is its record."""
        answer, sent, failed = Answer(self.began), self.now(), None
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                await self._target.ask(request, answer)
        except Failed as error:
            failed = error
        except TimeoutError:
            failed = Failed("timeout", f"no end within {self._limits.timeout_s:g} s")
        except asyncio.CancelledError:
            self._end(request.number, answer, sent, Failed("interrupted", self._stop.reason or ""))
            raise
        except Exception as error:  # noqa: BLE001  a fault of this program's is counted, too, and ends no run
            failed = Failed(CLIENT, words_of(error))
        return self._end(request.number, answer, sent, failed)

    def _end(self, number: int, answer: Answer, sent: float, failed: Failed | None) -> RequestRecord:
        request, planned, warm_up = self._pending.pop(number)
        record = RequestRecord(
            number=number,
            adapter=request.adapter,
            planned=planned,
            sent=sent,
            ended=self.now(),
            arrivals=tuple(Arrival(moment, tokens) for moment, tokens in answer.arrivals),
            prompt_tokens=answer.prompt_tokens or _known_length(request),
            output_tokens=answer.output_tokens,
            streamed=self._target.streams,
            tokens_told=answer.tokens_told,
            warm_up=warm_up,
            error=failed.kind if failed else None,
            message=failed.message if failed else "",
            retry_after_s=failed.retry_after_s if failed else None,
        )
        self.records.append(record)
        self._tally.add(record)
        share = self._tally.error_share
        if share > self._limits.stop_on_errors:
            self._stop.set(f"{share:.0%} of the last {len(self._tally.recent)} requests failed, {_most(self._tally)}")
        return record

    async def _watch_busy(self) -> None:
        """From the end of the warm-up until it is cancelled, which is when the last request has ended."""
        await asyncio.sleep(self._limits.warm_up_s)
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            await asyncio.Event().wait()
        finally:
            self.busy = (time.thread_time() - cpu) / max(time.perf_counter() - wall, 1e-9)


def _known_length(request: Request) -> int:
    """Of a prompt of tokens, where the server did not tell."""
    return 0 if isinstance(request.prompt, str) else len(request.prompt)


def _about(count: float) -> str:
    return f"{float(f'{count:.2g}'):,.0f}"


def _most(tally: Tally) -> str:
    kind, count = tally.errors.most_common(1)[0]
    return f"most with {kind} ({count} so far)"


def lateness_p99(records: Sequence[RequestRecord]) -> float:
    """99th percentile of sent − planned, s, of what counts."""
    late = sorted(record.sent - record.planned for record in records if not record.warm_up)
    return late[min(int(0.99 * len(late)), len(late) - 1)] if late else 0.0
