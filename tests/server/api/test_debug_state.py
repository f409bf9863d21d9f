"""GET /debug/state: what the server has at hand, in bounds, and at once."""

import asyncio
import json
from typing import Any

import grpc
import pytest

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server import __version__
from perseid_server.api.http import debug
from tests.fakes import BLOCK_SIZE
from tests.server.access.rings import bearer, gate_of, key
from tests.server.stack import LiveStack, make_stack

SECRET = "a users own words"
BODY = {"model": "one", "prompt": SECRET, "max_tokens": 100, "stream": True}


@pytest.fixture
def stack(tmp_path):
    return make_stack(tmp_path, gate=gate_of(key("user"), key("root", "admin")), num_pages=8)


async def state_of(live: LiveStack) -> dict[str, Any]:
    async with live.http() as client, asyncio.timeout(20):
        told = await client.get("/debug/state", headers=bearer("root"))
    assert told.status_code == 200
    assert SECRET not in told.text
    return told.json()


async def test_a_server_with_nothing_to_do(live: LiveStack) -> None:
    told = await state_of(live)
    assert told["uptime_s"] >= 0
    call = told["calls"]["shown"][0]
    assert told == {
        "status": "ready", "version": __version__, "uptime_s": told["uptime_s"], "draining": False,
        "engine": {
            "status": "ready", "trouble": None, "restarts": 0, "pid": None, "step_age_s": None, "answered": True
        },
        "queue": {"requests": 0, "max_requests": 100, "tokens": 0, "max_tokens": 1 << 20},
        "calls": {"total": 1, "shown": [call]},
        "sequences": {"running": 0, "waiting": 0, "shown": []},
        "adapters": {
            "on_device": 0, "in_host_memory": 0, "on_disk": 0, "pinned": 0, "loading": 0, "pages_used": 0,
            "pages_free": 1000, "shown": [],
        },
        "kv": {"blocks": 512, "used": 0, "free": 512, "cached": 0, "block_tokens": BLOCK_SIZE},
    }  # fmt: skip
    assert (call["route"], call["key"]) == ("GET /debug/state", "root")


async def test_requests_adapters_and_kv(live: LiveStack) -> None:
    version = await live.stack.load("one")
    await live.stack.load("two", seed=1)
    live.stack.engine.hold_after(4)
    headers = bearer("user") | {"X-Request-Id": "mine-7"}
    async with live.http() as client, client.stream("POST", "/v1/completions", json=BODY, headers=headers) as answer:
        pieces = answer.aiter_lines()
        await anext(pieces)
        told = await state_of(live)
        live.stack.engine.go_on()
        text = "".join([piece async for piece in pieces])
    call = told["calls"]["shown"][0]
    (sequence,) = told["sequences"]["shown"]
    assert {name: call[name] for name in ("request_id", "transport", "route", "tenant", "key", "model", "adapter")} == {
        "request_id": "mine-7", "transport": "http", "route": "POST /v1/completions", "tenant": "user", "key": "user",
        "model": "one", "adapter": f"one@{version[:12]}",
    }  # fmt: skip
    assert call["answers"][0] in text
    assert call["prompt_tokens"] == sequence["prompt_tokens"] == len(SECRET)
    assert sequence["generated_tokens"] >= call["generated_tokens"] >= 1
    assert (sequence["request_id"], sequence["tenant"], sequence["stage"]) == ("mine-7", "user", "decode")
    assert sequence["adapters"] == [{"name": "one", "version": version}]
    assert sequence["id"].startswith(call["answers"][0])
    assert sequence["age_s"] > 0 < call["age_s"]
    assert told["sequences"]["running"] == 1
    assert (told["queue"]["requests"], told["queue"]["tokens"]) == (1, len(SECRET) + 100)
    adapters = told["adapters"]
    assert (adapters["on_device"], adapters["on_disk"], adapters["pages_used"]) == (1, 1, 1)
    assert [(one["name"], one["location"], one["users"]) for one in adapters["shown"]] == [
        ("one", "device", 1), ("two", "disk", 0)
    ]  # fmt: skip
    assert told["kv"]["used"] == sequence["kv_blocks"] > 0
    assert told["kv"]["used"] + told["kv"]["free"] == told["kv"]["blocks"]


async def test_a_version_that_lost_its_name_is_told_by_its_hash(live: LiveStack) -> None:
    version = await live.stack.load("one")
    live.stack.engine.hold_after(4)
    posted = {"json": BODY, "headers": bearer("user")}
    async with live.http() as client, client.stream("POST", "/v1/completions", **posted) as answer:
        pieces = answer.aiter_lines()  # held: it closes the answer when it goes
        await anext(pieces)
        await live.stack.registry.unload("one")
        told = await state_of(live)
        live.stack.engine.go_on()
    assert told["sequences"]["shown"][0]["adapters"] == [{"name": None, "version": version}]


async def test_lists_are_cut_and_numbers_are_not(live: LiveStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "MOST_SHOWN", 2)
    for seed, name in enumerate("abc"):
        await live.stack.load(name, seed=seed)
    live.stack.engine.hold()
    async with live.http() as client:
        body = BODY | {"model": "tiny", "stream": False}
        waiting = [
            asyncio.create_task(client.post("/v1/completions", json=body, headers=bearer("user"))) for _ in range(4)
        ]
        await live.stack.engine.submissions(4)
        told = await state_of(live)
        live.stack.engine.go_on()
        assert {one.status_code for one in await asyncio.gather(*waiting)} == {200}
    assert (told["calls"]["total"], len(told["calls"]["shown"])) == (5, 2)
    assert (told["sequences"]["waiting"], len(told["sequences"]["shown"])) == (4, 2)
    assert (told["adapters"]["on_disk"], len(told["adapters"]["shown"])) == (3, 2)


async def test_an_engine_that_hangs_or_is_gone(live: LiveStack) -> None:
    live.stack.engine.hold()
    async with live.http() as client:
        posted = {"json": BODY | {"model": "tiny", "stream": False}, "headers": bearer("user")}
        waiting = asyncio.create_task(client.post("/v1/completions", **posted))
        await live.stack.engine.submissions(1)
        live.stack.engine.hangs = True
        hanging = await state_of(live)
        live.stack.engine.trouble, live.stack.engine.num_restarts = "was ended by SIGKILL", 2
        live.stack.engine.die()
        gone = await state_of(live)
        await waiting
    for told in (hanging, gone):
        assert (told["sequences"], told["adapters"], told["kv"], told["engine"]["answered"]) == (
            None,
            None,
            None,
            False,
        )
    assert (hanging["status"], hanging["calls"]["shown"][0]["model"]) == ("ready", "tiny")
    assert gone["status"] == "engine restarting: it was ended by SIGKILL"
    assert (gone["engine"]["status"], gone["engine"]["trouble"]) == ("restarting", "was ended by SIGKILL")
    assert gone["engine"]["restarts"] == 2


async def test_a_server_that_drains_says_so(live: LiveStack) -> None:
    await live.stack.service.drain(0)
    told = await state_of(live)
    assert (told["status"], told["draining"]) == ("shutting down", True)


def test_the_document_has_its_schema(live: LiveStack) -> None:
    told = live.stack.app.openapi()
    assert "DebugState" in json.dumps(told["paths"]["/debug/state"])
    assert {"sequences", "adapters", "kv"} <= set(told["components"]["schemas"]["DebugState"]["properties"])


async def test_calls_that_choose_the_same_id_are_told_apart(live: LiveStack) -> None:
    """gRPC's answers have the id of their call, which the client may choose."""
    live.stack.engine.hold()
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        stub, asked = stubs.GenerationStub(channel), pb.GenerateRequest(prompt="a", request_id="same")
        calls = []
        for name in ("first", "second"):
            metadata = (*bearer("user").items(), ("x-request-id", name))
            calls.append(stub.Generate(asked, metadata=metadata))
            await live.stack.engine.submissions(len(calls))
        told = await state_of(live)
        live.stack.engine.go_on()
        await asyncio.gather(*calls)
    assert [one["request_id"] for one in told["sequences"]["shown"]] == ["first", "second"]
    assert {one["id"].partition("#")[0] for one in told["sequences"]["shown"]} == {"same"}
