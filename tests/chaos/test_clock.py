"""The wall clock jumps while a server runs: dates follow it, nothing that measures time does."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path

import grpc
import httpx
import pytest

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.access.keys import hash_text
from perseid_server.access.ledger import DAY_S
from tests.chaos.processes import wait_for
from tests.chaos.sites import fake_site, running_site
from tests.chaos.wall_clock import WallClock
from tests.e2e.running import RunningServer

YEAR_S = 365 * DAY_S
SHORT, LONG, ENDLESS = 20, 500, 1400  # tokens, of which a thousand take a second at most


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path)


@pytest.fixture
def server(clock: WallClock, tmp_path: Path) -> Iterator[RunningServer]:
    """A server that lives in that clock. Each key's secret is its name."""
    last_day = (datetime.now(UTC) + timedelta(days=30)).date()
    keys = {"free": "roles = ['generate', 'admin']", "slow": "requests_per_minute = 1", "poor": "tokens_per_day = 10"}
    keys["ends"] = f"expires = {last_day}"
    file = tmp_path / "keys.toml"
    file.write_text("\n".join(f"[keys.{name}]\nhash = '{hash_text(name)}'\n{more}" for name, more in keys.items()))
    file.chmod(0o600)
    options = ("--api-keys", str(file), "--step-timeout", "2", "--metrics-role", "none")
    with running_site(fake_site(tmp_path / "site"), tmp_path / "store", *options, **clock.environment) as running:
        yield running


@pytest.mark.parametrize(
    "jumps", [(YEAR_S,), pytest.param((DAY_S, -DAY_S, YEAR_S, -YEAR_S, 0), marks=pytest.mark.chaos)]
)
def test_a_wall_clock_that_jumps(clock: WallClock, server: RunningServer, jumps: tuple[int, ...]) -> None:
    alone = _ask(server, "free", LONG).json()["choices"][0]["text"]
    assert _ask(server, "slow", 1).status_code == 200
    with ThreadPoolExecutor(8) as pool, grpc.insecure_channel(server.grpc) as channel:
        for jump in jumps:
            patient = [pool.submit(_ask, server, "free", LONG, 60.0), pool.submit(_ask_grpc, channel, LONG, 60.0)]
            hasty = [pool.submit(_ask, server, "free", ENDLESS, 0.3), pool.submit(_ask_grpc, channel, ENDLESS, 0.3)]
            wait_for(lambda: server.metric("perseid_num_requests_running") == 4)
            clock.set(jump)
            wait_for(lambda jump=jump: abs(_seconds_off(server) - jump) < DAY_S / 2, "the jump to be seen")
            assert patient[0].result().json()["choices"][0]["text"] == alone
            assert patient[1].result() == "OK"
            assert hasty[0].result().status_code == 408
            assert hasty[1].result() == "DEADLINE_EXCEEDED"
            assert _ask(server, "free", SHORT, 60.0).status_code == 200, "one that comes after it"
            assert _ask_grpc(channel, SHORT, 60.0) == "OK"
            assert _ask_grpc(channel, ENDLESS, 0.3) == "DEADLINE_EXCEEDED"
            refused = _ask(server, "slow", 1)
            assert (refused.status_code, int(refused.headers["Retry-After"]) <= 60) == (429, True)
            assert _ask(server, "ends", 1).status_code == (401 if jump == YEAR_S else 200)
    assert server.metric("perseid_engine_restarts_total") == 0
    assert server.is_ready()


@pytest.mark.chaos
def test_a_quota_of_a_day_outlives_a_clock_that_was_a_year_ahead(clock: WallClock, server: RunningServer) -> None:
    def spend() -> int:
        return _ask(server, "poor", 5).status_code  # 3 tokens of prompt

    assert [spend(), spend()] == [200, 429]
    clock.set(YEAR_S)
    assert [spend(), spend()] == [200, 429], "another day"
    clock.set(0)
    refused = _ask(server, "poor", 5)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) <= DAY_S, "until this day ends, not that one"
    clock.set(DAY_S)
    assert [spend(), spend()] == [200, 429]


def _ask(server: RunningServer, key: str, num_tokens: int, timeout_s: float | None = None) -> httpx.Response:
    body = {"model": "tiny", "prompt": "say", "max_tokens": num_tokens, "ignore_eos": True, "timeout": timeout_s}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.http}/v1/completions", json=body, headers=headers, timeout=120)


def _ask_grpc(channel: grpc.Channel, num_tokens: int, timeout_s: float) -> str:
    """The status by name. This process keeps the true time, as a client on another machine does."""
    message = pb.GenerateRequest(prompt="say", sampling=pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    try:
        call = stubs.GenerationStub(channel).Generate
        call(message, timeout=timeout_s, metadata=(("authorization", "Bearer free"),))
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def _seconds_off(server: RunningServer) -> float:
    """By an answer's header."""
    told = httpx.get(f"{server.http}/health", timeout=60).headers["Date"]
    return (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds()
