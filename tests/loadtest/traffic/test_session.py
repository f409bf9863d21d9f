"""A run's /metrics: read by the session's certificates and key, and why they were not."""

import ssl

import pytest

from perseid_loadtest.analysis import server_metrics
from perseid_loadtest.analysis.scraped import Scrape
from perseid_loadtest.traffic.driver import Limits
from perseid_loadtest.traffic.session import Session
from perseid_loadtest.traffic.tally import Stop
from tests.loadtest.traffic.fake_target import FakeTarget, plan

URL = "https://h:1"


async def run(monkeypatch: pytest.MonkeyPatch, *scrapes: Scrape, **session):
    """With these scrapes in turn; the arguments of the last."""
    coming, asked = iter(scrapes), []

    def scrape(*arguments):
        asked.append(arguments)
        return next(coming)

    monkeypatch.setattr(server_metrics, "scrape", scrape)
    result = await Session(FakeTarget(), **session).run(plan(), Limits(requests=1, concurrency=1), Stop())
    return result, asked


async def test_metrics_are_read_with_the_sessions_key_and_certificates(monkeypatch):
    tls = ssl.create_default_context()
    read = [Scrape({"a": 1.0}), Scrape({"a": 2.0})]
    found, asked = await run(monkeypatch, *read, metrics_url=URL, metrics_key="key", tls=tls)
    assert asked == [(URL, "key", tls)] * 2
    assert (found.server_before, found.server_after, found.server_untold) == ({"a": 1.0}, {"a": 2.0}, None)


async def test_why_metrics_were_not_read_is_kept(monkeypatch):
    found, _ = await run(monkeypatch, Scrape({"a": 1.0}), Scrape(failure="no answer"), metrics_url=URL)
    assert (found.server_after, found.server_untold) == ({}, "no answer")


async def test_without_an_address_nothing_is_read(monkeypatch):
    found, asked = await run(monkeypatch)
    assert (asked, found.server_untold) == ([], None)


async def test_a_run_tells_that_lengths_are_the_servers():
    target = FakeTarget()
    for refuses in (False, True):
        target.stops_at_eos = refuses
        result = await Session(target).run(plan(), Limits(requests=1, concurrency=1), Stop())
        assert result.stops_at_eos is refuses
