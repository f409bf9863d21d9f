"""Hostile folders, names, sources and paths over both transports: refused in words, and the server goes on."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import grpc
import httpx
import huggingface_hub
import pytest

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from perseid_server.api.http.access import need_of
from tests.server.access.rings import bearer, gate_of, key
from tests.server.adapters.hostile import HOSTILE, WORDS, write
from tests.server.stack import LiveStack, Stack, make_stack, serving, serving_in_thread, write_adapter


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    """One server for all, with one adapter `good`: nothing that is refused leaves anything behind."""
    folder = tmp_path_factory.mktemp("server")
    with serving_in_thread(folder, "good") as live:
        versions = sorted((folder / "store" / "versions").iterdir())
        yield live
        assert sorted((folder / "store" / "versions").iterdir()) == versions
        assert list((folder / "store" / "tmp").iterdir()) == []
        assert [loaded.name for loaded in live.stack.registry.list()] == ["good"]


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the hub was asked for."""
    asked: list[object] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **_: asked.append(args))
    return asked


GRPC_FIELDS = {"name": "name", "path": "source"}


def over_http(http: httpx.Client, name: str, source: str) -> tuple[int, str]:
    """The words as gRPC has them: vLLM's route calls its fields otherwise."""
    body = json.dumps({"lora_name": name, "lora_path": source})
    answer = http.post("/v1/load_lora_adapter", content=body, headers={"content-type": "application/json"})
    message = answer.json()["error"]["message"]
    return answer.status_code, re.sub("^lora_(name|path)", lambda field: GRPC_FIELDS[field[1]], message)


def over_grpc(live: LiveStack, name: str, source: str) -> tuple[grpc.StatusCode, str]:
    with grpc.insecure_channel(live.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        admin_stubs.AdapterAdminStub(channel).LoadAdapter(
            admin.LoadAdapterRequest(name=name, source=source), timeout=20
        )
    return refused.value.code(), refused.value.details()


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder(case: str, live: LiveStack, http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(case, live.stack.root / re.sub(r"\W+", "-", case))
    with caplog.at_level(logging.ERROR):
        status, message = over_http(http, "x", folder.name)
        code, detail = over_grpc(live, "x", folder.name)
    assert status in {400, 413}
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert WORDS[case] in message
    assert detail == message
    assert str(live.stack.root.parent) not in message
    assert not caplog.records


SOURCES = [
    "http://169.254.169.254/latest/meta-data",
    "http://[::ffff:169.254.169.254]/x",
    "//169.254.169.254/x",
    "https://huggingface.co/org/name",
    "hf://org/name",
    "file:///etc/passwd",
    "file://localhost/etc",
    "\\\\host\\share",
    "good-0%2f..%2f..%2fstore",
    "%2e%2e%2fstore",
    "..%00",
    "/proc/self/root",
    "/dev/fd/0",
    "..\u2215store",
    "\uff0e\uff0e/store",
    "..\u29f8store",
    "good-0\u200b",
    "good-0/../../store/versions",
    "~/x",
    "$HOME",
    "`id`",
    "org/name",
]
"""Not the folders of a root. Three are what the hub could be asked for, which nobody has allowed."""


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_elsewhere(source: str, live: LiveStack, http: httpx.Client, downloads: list[object]) -> None:
    status, message = over_http(http, "x", source)
    assert (status, over_grpc(live, "x", source)) == (403, (grpc.StatusCode.PERMISSION_DENIED, message))
    assert not downloads


NAMES = [
    "..",
    "../good",
    "good/..",
    "/good",
    "good/",
    "a//b",
    "a/b/c",
    "%2e%2e",
    "good%00",
    "good\0",
    "good\n",
    "go\u200bod",
    "good\ufeff",
    "\u202edoog",
    "g\u043e\u043ed",
    "\uff47ood",
    "\ufb01ne",
    "\u212aelvin",
    "a\u0301",
    "auto",
    "base",
    "tiny",
    "auto:good",
    "tiny:good",
    "good@main",
    "-rf",
    ".hidden",
    " good",
    "",
    "x" * 129,
    "\U0001f600",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_looks_like_another(name: str, live: LiveStack, http: httpx.Client) -> None:
    status, message = over_http(http, name, "good-0")
    assert status == 400
    assert over_grpc(live, name, "good-0") == (grpc.StatusCode.INVALID_ARGUMENT, message)
    assert "name" in message


def test_half_a_character_in_a_name_or_a_source(http: httpx.Client) -> None:
    assert over_http(http, "\ud800", "good-0")[0] == 400
    assert over_http(http, "x", "\ud800")[0] in {400, 403}


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in {"auto", "base", "tiny", "tiny:good"}], ids=ascii
)
def test_a_name_that_nothing_has_is_not_found(name: str, http: httpx.Client) -> None:
    answer = http.get(f"/v1/models/{quote(name, safe='')}")
    assert answer.status_code == 404
    asked = http.post("/v1/completions", json={"model": name or "nothing", "prompt": "hi", "max_tokens": 1})
    assert asked.status_code == (404 if name != "auto:good" else 400)  # an adapter is no gate set
    gone = http.post("/v1/unload_lora_adapter", json={"lora_name": name})
    assert gone.status_code in {400, 404}


# --- paths ----------------------------------------------------------------------------------------------------------

PATHS = [
    b"/v1/models/%2e%2e%2fmetrics",
    b"/v1/models/../../metrics",
    b"/v1/models/..%2f..%2fmetrics",
    b"/v1/models/%252e%252e%252fmetrics",
    b"/v1/%2e%2e/metrics",
    b"/health/../metrics",
    b"/health%2f..%2fmetrics",
    b"//metrics",
    b"/./metrics",
    b"/%6detrics",
    b"/metrics%00",
    b"/metrics%20",
    b"/metrics/",
    b"/metrics;x",
    b"/METRICS",
    b"/v1/models/%00",
    b"/v1/models/%c0%ae%c0%ae/metrics",
    b"/v1/models/%ff%fe",
    b"/v1/models/%ed%a0%80",
    b"/v1/models/%zz",
    b"/v1/models/\xff",
    b"/v1/%6coad_lora_adapter",
    b"/v1/load_lora_adapter/",
    b"/v1//load_lora_adapter",
    b"http://127.0.0.1/metrics",
    b"http://elsewhere/metrics",
    b"*",
]


async def raw_status(live: LiveStack, method: str, path: bytes, secret: str | None, body: bytes = b"") -> int:
    """The status of a request whose path is sent as it stands."""
    reader, writer = await asyncio.open_connection(live.addresses.host, live.addresses.http_port)
    head = [b"%s %s HTTP/1.1" % (method.encode(), path), b"Host: x", b"Connection: close"]
    head += [b"Content-Type: application/json", b"Content-Length: %d" % len(body)]
    head += [f"Authorization: Bearer {secret}".encode()] if secret else []
    writer.write(b"\r\n".join(head) + b"\r\n\r\n" + body)
    status = await asyncio.wait_for(reader.readline(), 20)
    writer.close()
    return int(status.split()[1])


@pytest.fixture
def guarded(tmp_path: Path) -> Stack:
    """Keys with one role each, and one for some adapters."""
    gate = gate_of(key("user"), key("root", "admin"), key("part", "admin", adapters=("p-*",)))
    return make_stack(tmp_path, gate=gate)


async def test_no_spelling_of_a_path_leads_elsewhere(guarded: Stack) -> None:
    async with serving(guarded) as live:
        for path in PATHS:
            for method in ("GET", "POST", "HEAD", "OPTIONS"):
                assert await raw_status(live, method, path, None) in {400, 401, 404}, (method, path)
                for secret in ("user", "part"):
                    told = await raw_status(live, method, path, secret)
                    assert 400 <= told < 500 or told == 307, (method, path, secret, told)
        async with live.http() as client:
            assert (await client.get("/v1/models", headers=bearer("user"))).status_code == 200


DISGUISES = (
    "%0a",
    "%0A",
    "%0d%0a",
    "%00",
    "%20",
    "%09",
    "%c2%a0",
    "%e2%80%8b",
    "%e2%80%a8",
    "/",
    "//",
    "/.",
    ";",
    "%2f",
)


@pytest.mark.parametrize("end", DISGUISES)
async def test_what_stands_behind_a_path_is_no_way_round_its_role(end: str, guarded: Stack) -> None:
    """A line break once was: routes match with one at their end."""
    write_adapter(guarded.root / "plain")
    load = json.dumps({"lora_name": "x", "lora_path": "plain"}).encode()
    say = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 1}).encode()
    async with serving(guarded) as live:
        for method, path in guarded.routes():
            need = need_of(path.partition("{")[0], live.stack.gate)
            for secret, role in (("user", "generate"), ("root", "admin")):
                if need in {"generate", "admin", "operator"} and not need.startswith(role):
                    body = load if "load" in path else say
                    spelt = re.sub(r"{.*}", "x", path).encode() + end.encode()
                    told = await raw_status(live, method, spelt, secret, body)
                    assert told in {403, 404, 405, 307} or (secret, path) == ("root", "/metrics"), (spelt, secret, told)
    assert not guarded.registry.list()


async def test_a_folder_of_a_root_is_loaded_after_all_that(tmp_path: Path) -> None:
    stack = make_stack(tmp_path)
    write_adapter(stack.root / "plain")
    async with serving(stack) as live, live.http() as client:
        told = await client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "plain"})
        assert told.status_code == 200
        assert (await client.get("/v1/models/%78")).json()["id"] == "x"
