"""Loads, replaces and unloads adapters while traffic runs, as operators and tenants do."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perseid_loadtest.traffic.record import ChurnRecord
from perseid_loadtest.traffic.target import CLIENT, Failed, Target, words_of
from perseid_server.config import NamedSource
from perseid_server.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Change:
    """One step of the churn."""

    action: str  # "load", "replace" or "unload"
    adapter: str
    source: str = ""


def parse_churn(texts: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """NAME=SOURCE, a name's sources in order. InvalidRequest when a text is not of that form."""
    sources: dict[str, tuple[str, ...]] = {}
    for text in texts:
        try:
            named = NamedSource.parse(text)
        except ValueError as error:
            raise InvalidRequest(f"--churn: {error}", field="churn") from error
        sources[named.name] = (*sources.get(named.name, ()), _full_path(named.source))
    return sources


def _full_path(source: str) -> str:
    """The server does not know our working folder."""
    return str(Path(source).absolute()) if Path(source).is_dir() else source


def changes(sources: Mapping[str, Sequence[str]], asked_for: frozenset[str]) -> Iterator[Change]:
    """Without end, each name in turn. A name that traffic asks for is only ever replaced, since its requests would
    rightly fail while it is not there; the others are loaded, replaced and unloaded."""
    lines = [_of(name, own, asked_for) for name, own in sources.items()]
    while lines:
        for line in lines:
            yield next(line)


def _of(name: str, sources: Sequence[str], asked_for: frozenset[str]) -> Iterator[Change]:
    following = itertools.cycle([*sources[1:], sources[0]])
    while True:
        if name in asked_for:
            yield Change("replace", name, next(following))
        else:
            yield Change("load", name, sources[0])
            yield Change("replace", name, sources[-1])
            yield Change("unload", name)


class Churn:
    """One change every `every_s`, one at a time. What it changed it puts back at the end. `before_load` gets each
    source just before it is loaded."""

    def __init__(
        self,
        target: Target,
        sources: Mapping[str, Sequence[str]],
        asked_for: frozenset[str],
        every_s: float,
        before_load: Callable[[str], None] | None = None,
    ) -> None:
        self._target = target
        self._sources = sources
        self._asked_for = asked_for
        self._every_s = every_s
        self._before_load = before_load
        self._last: dict[str, Change] = {}  # the last that succeeded, by name
        self.records: list[ChurnRecord] = []

    async def run(self, now: Callable[[], float], begin_s: float) -> None:
        """Until cancelled; the change that is under way then still ends. `now` tells seconds since the run began."""
        await asyncio.sleep(begin_s)
        for change in changes(self._sources, self._asked_for):
            changing = asyncio.ensure_future(self._change(change, now))
            try:
                await asyncio.shield(changing)
            except asyncio.CancelledError:
                await asyncio.gather(changing, return_exceptions=True)  # a fault is in the records
                raise
            await asyncio.sleep(self._every_s)

    async def put_back(self, now: Callable[[], float]) -> None:
        """Unload what was loaded; give replaced names their first source again. What fails keeps none of the others
        from it."""
        for change in list(self._undoing()):
            with contextlib.suppress(Exception):  # it is in the records
                await self._change(change, now)

    def _undoing(self) -> Iterator[Change]:
        for name, last in self._last.items():
            if name in self._asked_for:
                if last.source != self._sources[name][0]:
                    yield Change("replace", name, self._sources[name][0])
            elif last.action != "unload":
                yield Change("unload", name)

    async def _change(self, change: Change, now: Callable[[], float]) -> None:
        """Do it and write down how it ended; what no server tells is raised, too."""
        started = now()
        try:
            if change.action == "unload":
                await self._target.unload(change.adapter)
            else:
                if self._before_load is not None:
                    self._before_load(change.source)
                await self._target.load(change.adapter, change.source, replace=change.action == "replace")
            self._last[change.adapter] = change
        except Failed as failed:
            self._record(change, started, now(), f"{failed.kind}: {failed.message}")
        except Exception as fault:
            self._record(change, started, now(), f"{CLIENT}: {words_of(fault)}")
            raise
        else:
            self._record(change, started, now(), None)

    def _record(self, change: Change, started: float, ended: float, error: str | None) -> None:
        self.records.append(ChurnRecord(change.action, change.adapter, started, ended, error))
