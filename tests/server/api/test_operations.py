"""Health, readiness, metrics, version and the tokenizer's routes, over HTTP."""

import socket
import subprocess
import sys

import httpx
import pytest

from perseid_server import __version__
from perseid_server.access.keys import Allowance
from perseid_server.api.http.access import NEEDS
from perseid_server.api.server import ApiServer
from tests.server.access.rings import bearer, gate_of, key
from tests.server.stack import LiveStack, make_stack, serving, write_adapter
from tests.tools import require_tool

BODY = {"model": "tiny", "prompt": "say", "max_tokens": 4}


async def get(live: LiveStack, path: str) -> httpx.Response:
    async with live.http() as client:
        return await client.get(path)


async def post(live: LiveStack, path: str, body: dict) -> httpx.Response:
    async with live.http() as client:
        return await client.post(path, json=body)


async def test_a_server_that_drains_is_not_ready(live: LiveStack) -> None:
    await live.stack.service.drain(0)
    assert (await get(live, "/ready")).json() == {"status": "shutting down"}
    refused = await post(live, "/v1/completions", BODY)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")


async def test_version(live: LiveStack) -> None:
    assert (await get(live, "/version")).json() == {"version": __version__}


async def test_text_to_tokens_and_back(live: LiveStack) -> None:
    told = (await post(live, "/tokenize", {"prompt": "hé", "return_token_strs": True})).json()
    assert told == {
        "tokens": list("hé".encode()), "count": 3, "max_model_len": 256, "token_strs": ["h", "\ufffd", "\ufffd"]
    }  # fmt: skip
    assert (await post(live, "/detokenize", {"tokens": told["tokens"]})).json() == {"prompt": "hé"}


async def test_a_conversation_to_tokens(live: LiveStack) -> None:
    told = (await post(live, "/tokenize", {"messages": [{"role": "user", "content": "a"}]})).json()
    back = (await post(live, "/detokenize", {"tokens": told["tokens"]})).json()["prompt"]
    assert back == "<turn>user: a\n<turn>assistant: "


async def test_vllms_routes_load_replace_and_unload_adapters(live: LiveStack) -> None:
    write_adapter(live.stack.root / "one", seed=1)
    write_adapter(live.stack.root / "two", seed=2)
    body = {"lora_name": "mine", "lora_path": "one"}
    assert (await post(live, "/v1/load_lora_adapter", body)).status_code == 200
    assert (await post(live, "/v1/load_lora_adapter", body)).status_code == 409
    replacing = body | {"lora_path": "two", "load_inplace": True}
    assert (await post(live, "/v1/load_lora_adapter", replacing)).status_code == 200
    assert [adapter.entry.source for adapter in live.stack.registry.list()] == ["two"]
    assert (await post(live, "/v1/unload_lora_adapter", {"lora_name": "mine"})).status_code == 200
    assert live.stack.registry.list() == ()


async def test_a_scrape_is_clean_and_comes_without_a_redirect(live: LiveStack) -> None:
    await post(live, "/v1/completions", BODY)
    scrape = await get(live, "/metrics")
    assert scrape.status_code == 200
    assert scrape.headers["Content-Type"].startswith("text/plain")
    assert 'perseid_request_success_total{finished_reason="length"} 1.0' in scrape.text
    assert complaints(scrape.text) == (0, "")


def complaints(scrape: str) -> tuple[int, str]:
    """What promtool says of a scrape."""
    promtool = require_tool("promtool", "Debian package prometheus")
    done = subprocess.run([promtool, "check", "metrics"], input=scrape, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


async def test_every_answer_has_a_request_id(live: LiveStack) -> None:
    ids = {(await get(live, "/nowhere")).headers["X-Request-Id"] for _ in range(2)}
    assert len(ids) == 2


@pytest.mark.parametrize("stated", ["a b", "é".encode(), "x" * 129])
async def test_request_ids_that_do_not_fit_a_header_are_replaced(live: LiveStack, stated: str) -> None:
    async with live.http() as client:
        told = await client.get("/health", headers={"X-Request-Id": stated})
    assert len(told.headers["X-Request-Id"]) == 32


async def test_a_bug_is_an_internal_error_that_tells_nothing(live: LiveStack, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(live.stack.service.text, "encode", broken)
    told = await post(live, "/v1/completions", BODY)
    assert told.status_code == 500
    assert told.headers["X-Request-Id"] in told.json()["error"]["message"]
    assert "secret" not in told.text


def test_the_openapi_document_can_be_made(tmp_path) -> None:
    """In a process of its own: FastAPI keeps it, and what it warns of would be lost in the log."""
    code = (
        "import warnings; warnings.simplefilter('error')\nfrom pathlib import Path\n"
        "from tests.server.stack import make_stack\n"
        f"print(sorted(make_stack(Path({str(tmp_path)!r})).app.openapi()['paths'])[:2])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['/debug/state', '/detokenize']", done.stderr


def statuses(live: LiveStack, method: str, path: str) -> set[str]:
    """What the document says may be answered."""
    return set(live.stack.app.openapi()["paths"][path][method.lower()]["responses"])


async def test_the_document_has_the_refusals_of_a_key_that_asks_too_often(tmp_path) -> None:
    stack = make_stack(tmp_path, gate=gate_of(key("few", "admin", "generate", allowance=Allowance(1))))
    async with serving(stack) as live, live.http() as client:
        await client.get("/v1/models", headers=bearer("few"))
        for method, path in stack.routes()[1:]:
            told = await client.request(method, path.partition("{")[0], headers=bearer("few"), json={})
            assert told.status_code == 429 or NEEDS.get(path) == "open", path
            assert str(told.status_code) in statuses(live, method, path), path
            assert (NEEDS.get(path) == "open") == statuses(live, method, path).isdisjoint({"401", "403"}), path


async def test_the_document_has_the_refusals_of_a_server_that_drains(live: LiveStack) -> None:
    await live.stack.registry.drain(0)
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        body = {"lora_name": "x", "lora_path": "x"} if "/load" in path else {"lora_name": "x"}
        assert (await post(live, path, body)).status_code == 503
        assert "503" in statuses(live, "POST", path)


def test_fastapis_own_telemetry_is_off(live: LiveStack) -> None:
    settings = getattr(live.stack.app, "_telemetry", {})
    assert not any(settings.get(name) for name in ("tracing", "metrics", "logs", "auto_configure"))


def test_the_listener_says_it_is_tcp() -> None:
    """Only then does asyncio turn Nagle's algorithm off for its connections, and answers come without a wait."""
    server = ApiServer("127.0.0.1", 0, 0)
    assert server._socket.proto == socket.IPPROTO_TCP
    server._socket.close()
