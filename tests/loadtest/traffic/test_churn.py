"""Adapters that come and go while traffic runs, and are as before afterwards."""

import asyncio
import itertools
from pathlib import Path

import pytest

from perseid_loadtest.traffic.arrivals import Gamma
from perseid_loadtest.traffic.churn import Change, changes, parse_churn
from perseid_loadtest.traffic.driver import Limits
from perseid_loadtest.traffic.session import Session
from perseid_loadtest.traffic.tally import Stop
from perseid_loadtest.traffic.target import Failed
from perseid_server.errors import InvalidRequest
from tests.loadtest.traffic.fake_target import FakeTarget, plan


def first(count: int, sources, asked_for=frozenset()) -> list[Change]:
    return list(itertools.islice(changes(sources, asked_for), count))


def test_a_name_without_traffic_is_loaded_replaced_and_unloaded():
    round_ = [Change("load", "a", "one"), Change("replace", "a", "two"), Change("unload", "a")]
    assert first(6, {"a": ("one", "two")}) == round_ * 2


def test_a_name_with_traffic_is_only_replaced():
    found = first(4, {"a": ("one", "two")}, frozenset({"a"}))
    assert [(change.action, change.source) for change in found] == [("replace", "two"), ("replace", "one")] * 2


def test_names_take_turns():
    assert [change.adapter for change in first(4, {"a": ("x",), "b": ("y",)})] == ["a", "b", "a", "b"]


def test_sources_as_they_are_written(tmp_path: Path):
    assert parse_churn([f"a={tmp_path}", "a=org/name", "b=x"]) == {"a": (str(tmp_path), "org/name"), "b": ("x",)}
    with pytest.raises(InvalidRequest, match="--churn: expected NAME=SOURCE"):
        parse_churn(["a"])


async def run(target: FakeTarget, sources, asked_for=frozenset(), seconds: float = 0.25, before_load=None):
    session = Session(target, churn=sources, asked_for=asked_for, churn_every_s=0.04, before_load=before_load)
    return await session.run(plan(Gamma(200.0)), Limits(duration_s=seconds), Stop())


async def test_churn_runs_beside_traffic_and_is_put_back():
    target = FakeTarget(lambda _: asyncio.sleep(0.01))
    sources = {"extra": ("one",), "asked": ("one", "two")}
    result = await run(target, sources, frozenset({"asked"}))
    assert {change.action for change in result.churn} >= {"load", "replace"}
    assert all(change.error is None and change.ended >= change.started for change in result.churn)
    assert all(record.error is None for record in result.records)
    last = {change[1]: change for change in target.changes}
    assert last["extra"] == ("unload", "extra")
    assert last["asked"] == ("replace", "asked", "one")


async def test_a_source_is_told_before_each_load_of_it():
    target = FakeTarget()
    await run(target, {"a": ("one",)}, before_load=lambda source: target.changes.append(("before", source)))
    loads = [place for place, change in enumerate(target.changes) if change[0] in ("load", "replace")]
    assert len(loads) >= 1
    assert all(target.changes[place - 1] == ("before", "one") for place in loads)
    assert sum(change[0] == "before" for change in target.changes) == len(loads)


async def test_a_change_that_fails_is_written_down_and_nothing_is_put_back():
    target = FakeTarget()
    target.refuses_changes = True
    result = await run(target, {"a": ("one",)})
    assert {change.error for change in result.churn} == {"409: no"}
    assert target.changes == []


async def test_what_cannot_be_put_back_is_written_down_by_itself():
    """The server is left as it should not be; figures of the run are without it, as it came after."""

    class KeepsAll(FakeTarget):
        async def unload(self, name: str) -> None:
            raise Failed("409", "in use")

    result = await run(KeepsAll(), {"a": ("one",)}, seconds=0.02)
    [left] = result.not_put_back
    assert left not in result.churn
    assert (left.action, left.adapter, left.error) == ("unload", "a", "409: in use")
    assert (await run(FakeTarget(), {"a": ("one",)}, seconds=0.02)).not_put_back == ()


async def test_a_fault_while_changing_adapters_ends_the_run_and_keeps_its_records():
    def fail(_: str) -> None:
        raise ZeroDivisionError("oh")

    result = await run(FakeTarget(), {"a": ("one",)}, seconds=60.0, before_load=fail)
    assert result.stopped_early == "changing adapters failed: ZeroDivisionError: oh"
    assert [(change.action, change.error) for change in result.churn] == [("load", "client: ZeroDivisionError: oh")]
    assert result.seconds < 60.0


async def test_a_fault_while_putting_back_keeps_the_records_and_the_others_are_put_back():
    class Breaks(FakeTarget):
        async def unload(self, name: str) -> None:
            if name == "a":
                raise ZeroDivisionError("oh")
            await super().unload(name)

    target = Breaks()
    result = await run(target, {"a": ("one",), "b": ("one",)}, seconds=0.06)
    assert [(change.adapter, change.error) for change in result.not_put_back] == [
        ("a", "client: ZeroDivisionError: oh")
    ]
    assert target.changes[-1] == ("unload", "b")
    assert (result.stopped_early, len(result.records) > 0) == (None, True)
