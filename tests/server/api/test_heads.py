"""Medusa heads over both transports: loaded, bound to an adapter, listed, shown, unloaded; never a model."""

import grpc
import httpx
import pytest

from perseid_protos.perseid.v1 import adapter_admin_pb2 as pb
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as stubs
from perseid_protos.perseid.v1 import generation_pb2, generation_pb2_grpc
from perseid_server.engine.messages import AdapterState
from perseid_server.speculation.heads_config import HeadsConfig
from tests.server.speculation.heads_folders import medusa_v1, medusa_v2, write_heads
from tests.server.stack import LiveStack

ACCURACY = ((0.5, 0.25), (0.25, 0.125))


@pytest.fixture
def live(live: LiveStack) -> LiveStack:
    """A server whose clients may load heads `two` (for an adapter's hash that is not loaded) and `three`."""
    config = HeadsConfig("a" * 64, (1, 4, 5), ACCURACY)
    write_heads(live.stack.root / "two", medusa_v1(2, rows=3), config=config)
    write_heads(live.stack.root / "three", medusa_v2(3))
    return live


async def request(live: LiveStack, method: str, path: str, **body: object) -> httpx.Response:
    async with live.http() as client:
        return await client.request(method, path, json=body or None)


async def load(live: LiveStack, name: str, folder: str, **body: object) -> httpx.Response:
    return await request(live, "POST", "/v1/load_lora_adapter", lora_name=name, lora_path=folder, **body)


async def test_heads_over_http(live: LiveStack) -> None:
    version = await live.stack.load("a")
    assert (await load(live, "h", "two")).status_code == 200
    assert (await load(live, "g", "three", adapter="a")).status_code == 200
    listed = (await request(live, "GET", "/v1/medusa_heads")).json()
    assert (listed["object"], [card["id"] for card in listed["data"]]) == ("list", ["h", "g"])
    card = (await request(live, "GET", "/v1/medusa_heads/h")).json()
    assert card == listed["data"][0]
    assert (card["object"], card["parent"], card["root"]) == ("medusa_heads", "tiny", "two")
    assert card["perseid"] == {
        "version": live.stack.registry.get("h").version,
        "kind": "heads",
        "for": {"adapter": None, "version": "a" * 64, "in_use": False},
        "num_heads": 2,
        "num_layers": 1,
        "layout": "Medusa v1",
        "shares_lm_head": False,
        "num_draft_tokens": 3,
        "accuracy": [list(of_head) for of_head in ACCURACY],
        "accuracy_measured": True,
        "location": "disk",
        "pinned": False,
        "warnings": [],
        "error": None,
    }
    other = listed["data"][1]["perseid"]
    assert other["for"] == {"adapter": "a", "version": version, "in_use": True}
    assert (other["shares_lm_head"], other["accuracy_measured"], other["num_draft_tokens"]) == (True, False, 258)
    assert (await request(live, "POST", "/v1/unload_lora_adapter", lora_name="h")).status_code == 200
    assert (await request(live, "GET", "/v1/medusa_heads/h")).status_code == 404
    assert (await request(live, "GET", "/v1/medusa_heads/a")).status_code == 404


async def test_heads_are_no_models(live: LiveStack) -> None:
    await live.stack.load("a")
    await load(live, "h", "three")
    models = (await request(live, "GET", "/v1/models")).json()["data"]
    assert [model["id"] for model in models] == ["tiny", "a"]
    for name in ("h", "auto:h"):
        assert (await request(live, "GET", f"/v1/models/{name}")).status_code == 404
    told = await request(live, "POST", "/v1/completions", model="h", prompt="say", max_tokens=1)
    assert (told.status_code, "'h' is a set of Medusa heads, where an adapter is expected" in told.text) == (400, True)
    told = await request(live, "POST", "/v1/completions", model="auto:h", prompt="say", max_tokens=1)
    assert (told.status_code, "'h' is a set of Medusa heads, not a gate set" in told.text) == (400, True)


async def test_where_the_engine_has_them_and_why_not(live: LiveStack) -> None:
    await load(live, "h", "three")
    version = live.stack.registry.get("h").version
    live.stack.engine.adapter_states[version] = AdapterState(version, "device", "they cannot be read")
    told = (await request(live, "GET", "/v1/medusa_heads/h")).json()["perseid"]
    assert (told["location"], told["error"]) == ("device", "they cannot be read")
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        shown = (await stubs.AdapterAdminStub(channel).GetAdapter(pb.GetAdapterRequest(name="h"))).adapter
    assert (shown.location, shown.error) == (pb.LOCATION_DEVICE, "they cannot be read")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"lora_path": "three", "adapter": "nobody"}, 404, "adapter: no adapter 'nobody' is loaded"),
        ({"lora_path": "a-0", "adapter": "a"}, 400, "adapter: only Medusa heads are for an adapter"),
        ({"lora_path": "three", "adapter": 3}, 400, "adapter"),
    ],
)
async def test_whom_heads_are_for_is_checked(live: LiveStack, body: dict, status: int, words: str) -> None:
    await live.stack.load("a")
    told = await request(live, "POST", "/v1/load_lora_adapter", lora_name="h", **body)
    assert (told.status_code, words in told.text) == (status, True), told.text
    assert live.stack.registry.find("h") is None


async def test_heads_over_grpc(live: LiveStack) -> None:
    version = await live.stack.load("a")
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        admin = stubs.AdapterAdminStub(channel)
        asked = pb.LoadAdapterRequest(name="h", source="two", adapter="a")
        loaded = (await admin.LoadAdapter(asked)).adapter
        assert (loaded.kind, loaded.rank, loaded.num_layers, list(loaded.targets)) == ("heads", 0, 1, [])
        assert loaded.num_parameters == 2 * (8 * 8 + 8 + 3 * 8)
        assert not loaded.HasField("gate_set")
        assert loaded.heads == pb.Heads(
            adapter="a",
            adapter_version=version,
            in_use=True,
            num_heads=2,
            layout="Medusa v1",
            shares_lm_head=False,
            num_draft_tokens=3,
            accuracy=[pb.HeadAccuracy(candidates=of_head) for of_head in ACCURACY],
            accuracy_measured=True,
        )
        assert (await admin.GetAdapter(pb.GetAdapterRequest(name="h"))).adapter == loaded
        listed = (await admin.ListAdapters(pb.ListAdaptersRequest())).adapters
        assert [(one.name, one.HasField("heads")) for one in listed] == [("a", False), ("h", True)]
        await admin.UnloadAdapter(pb.UnloadAdapterRequest(name="a"))
        shown = (await admin.GetAdapter(pb.GetAdapterRequest(name="h"))).adapter.heads
        assert (shown.adapter, shown.adapter_version, shown.in_use) == ("a", "", False)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.LoadAdapter(pb.LoadAdapterRequest(name="i", source="three", adapter="h"))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        generate = generation_pb2_grpc.GenerationStub(channel).Generate
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(generation_pb2.GenerateRequest(prompt="say", adapter="h"))
        assert "'h' is a set of Medusa heads, where an adapter is expected" in caught.value.details()
