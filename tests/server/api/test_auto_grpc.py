"""Blends and `auto` over gRPC give what HTTP gives, and gate sets are described beside adapters."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.engine.adaptation import BASE_COLUMN, Routing
from tests.server.stack import LiveStack, certain_router, write_gate_set

SAMPLING = {"max_tokens": 4, "temperature": 0.0}
SHARES = {"tiny": 4 / 7, "b": 2 / 7, "a": 1 / 7}
"""What the fake gates choose of two adapters and the base."""


@pytest_asyncio.fixture
async def generation(live: LiveStack) -> AsyncIterator[stubs.GenerationStub]:
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        yield stubs.GenerationStub(channel)


@pytest_asyncio.fixture
async def versions(live: LiveStack) -> dict[str, str]:
    """Of adapters a and b, loaded."""
    return {name: await live.stack.load(name, seed=seed) for seed, name in enumerate("ab")}


def request(prompt: str = "say", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=prompt, sampling=pb.SamplingParams(**SAMPLING), **fields)


def blend(**weights: float) -> pb.Blend:
    return pb.Blend(adapters=[pb.WeightedAdapter(name=name, weight=weight) for name, weight in weights.items()])


async def over_http(live: LiveStack, prompt: str = "say", **body: Any) -> dict[str, Any]:
    async with live.http() as http:
        response = await http.post("/v1/completions", json={"prompt": prompt, **SAMPLING, **body})
    assert response.status_code == 200, response.text
    return response.json()


def told(shares: Any) -> dict[str, Any]:
    return {each.name: pytest.approx(each.share, abs=1e-6) for each in shares}


async def test_a_blend_is_the_same_on_both_transports(
    live: LiveStack, versions: dict[str, str], generation: stubs.GenerationStub
) -> None:
    answer = await generation.Generate(request(blend=blend(a=0.1, b=-0.7)))
    parts = [{"name": "a", "weight": 0.1}, {"name": "b", "weight": -0.7}]
    assert answer.choices[0].text == (await over_http(live, model="tiny", adapters=parts))["choices"][0]["text"]
    sent = [submit.adaptation for submit in live.stack.engine.submitted]
    assert sent[0] == sent[1], "not a bit of a weight is lost"
    assert [(part.name, part.version, part.weight) for part in answer.blend] == [
        ("a", versions["a"], 0.1), ("b", versions["b"], -0.7)
    ]  # fmt: skip
    assert not answer.HasField("adapter")
    assert not answer.HasField("auto")


async def test_a_weight_left_out_is_one(versions: dict[str, str], generation: stubs.GenerationStub) -> None:
    answer = await generation.Generate(request(blend=pb.Blend(adapters=[pb.WeightedAdapter(name="a")])))
    named = await generation.Generate(request(adapter="a"))
    assert (answer.choices, answer.adapter) == (named.choices, named.adapter)
    assert answer.adapter.version == versions["a"]


async def test_auto_is_the_same_on_both_transports(
    live: LiveStack, versions: dict[str, str], generation: stubs.GenerationStub
) -> None:
    gates = await live.stack.load_gates("g", "a", "b")
    options: dict[str, Any] = {"allow": ["b"], "k": 1, "temperature": 0.3, "null": True, "join": True}
    answer = await generation.Generate(request(auto=pb.Auto(**options, gate_set="g", tier=pb.TIER_TOKEN)))
    http = await over_http(live, model="auto", auto={**options, "gate_set": "g", "tier": "token"})
    assert answer.choices[0].text == http["choices"][0]["text"]
    sent = [submit.adaptation.routing for submit in live.stack.engine.submitted]
    assert sent == [Routing(gates, (None, versions["b"], BASE_COLUMN), 1, 0.3)] * 2
    assert (answer.auto.gate_set, answer.auto.version, answer.auto.tier) == ("g", gates, pb.TIER_TOKEN)
    assert not answer.HasField("routing")


async def test_what_is_left_out_is_the_gate_sets(
    live: LiveStack, versions: dict[str, str], generation: stubs.GenerationStub
) -> None:
    gates = await live.stack.load_gates("g", "a", "b", k=1, temperature=3.0)
    await generation.Generate(request(auto=pb.Auto()))
    routing = live.stack.engine.submitted[-1].adaptation.routing
    assert routing == Routing(gates, (*versions.values(), BASE_COLUMN), 1, 3.0)
    await generation.Generate(request(auto=pb.Auto(null=False)))
    assert live.stack.engine.submitted[-1].adaptation.routing.columns == (*versions.values(), None)


async def test_the_first_tiers_choice_is_told_as_the_adapter(
    live: LiveStack, versions: dict[str, str], generation: stubs.GenerationStub
) -> None:
    await live.stack.load_gates("g", "a", "b", router=certain_router("a", "b"))
    answer = await generation.Generate(request("aaaa", auto=pb.Auto(), routing_report=pb.ROUTING_REPORT_SUMMARY))
    assert answer.choices == (await generation.Generate(request("aaaa", adapter="a"))).choices
    assert (answer.adapter.name, answer.auto.tier) == ("a", pb.TIER_REQUEST)
    assert told(answer.routing.prompt) == told(answer.routing.completion) == {"a": 1.0}
    answer = await generation.Generate(request("cccc", auto=pb.Auto()))
    assert (answer.HasField("adapter"), answer.auto.tier) == (False, pb.TIER_REQUEST)


async def test_a_report_tells_shares_and_tokens(
    live: LiveStack, versions: dict[str, str], generation: stubs.GenerationStub
) -> None:
    await live.stack.load_gates("g", "a", "b")
    answer = await generation.Generate(request(auto=pb.Auto(), routing_report=pb.ROUTING_REPORT_TOKENS))
    assert told(answer.routing.prompt) == told(answer.routing.completion) == SHARES
    assert [[each.name for each in token.top] for token in answer.routing.tokens] == [["tiny", "b", "a"]] * 4
    answer = await generation.Generate(request(auto=pb.Auto(), routing_report=pb.ROUTING_REPORT_SUMMARY))
    assert (told(answer.routing.completion), len(answer.routing.tokens)) == (SHARES, 0)


async def test_a_stream_tells_who_first_tokens_as_they_come_and_the_summary_last(
    live: LiveStack, versions: dict[str, str], generation: stubs.GenerationStub
) -> None:
    await live.stack.load_gates("g", "a", "b")
    asked = request(auto=pb.Auto(), routing_report=pb.ROUTING_REPORT_TOKENS)
    chunks = [chunk async for chunk in generation.GenerateStream(asked)]
    assert [chunk.HasField("auto") for chunk in chunks] == [True, False, False, False]
    assert [len(chunk.routing.tokens) for chunk in chunks] == [1] * 4
    assert [len(chunk.routing.completion) for chunk in chunks] == [0, 0, 0, 3]
    assert told(chunks[-1].routing.prompt) == SHARES


async def test_a_stream_of_a_blend_tells_its_parts_once(
    versions: dict[str, str], generation: stubs.GenerationStub
) -> None:
    chunks = [chunk async for chunk in generation.GenerateStream(request(blend=blend(a=0.5, b=0.5)))]
    assert [len(chunk.blend) for chunk in chunks] == [2, 0, 0, 0]


@pytest.mark.parametrize(
    ("auto", "words"),
    [
        (pb.Auto(allow=["new"]), "'new' is not in the gate set"),
        (pb.Auto(allow=["nobody"]), "auto.allow.0"),
        (pb.Auto(k=4), "auto.k is 4"),
        (pb.Auto(tier=pb.TIER_REQUEST), "no request-level router"),
        (pb.Auto(gate_set="a"), "'a' is an adapter, not a gate set"),
    ],
    ids=["not in the set", "unknown", "k", "tier", "adapter"],
)
async def test_refusals_say_why(
    live: LiveStack, versions: dict[str, str], generation: stubs.GenerationStub, auto: pb.Auto, words: str
) -> None:
    await live.stack.load_gates("g", "a", "b")
    await live.stack.load("new", seed=3)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await generation.Generate(request(auto=auto))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in refused.value.details()


async def test_gate_sets_are_loaded_described_pinned_and_unloaded(live: LiveStack, versions: dict[str, str]) -> None:
    folder = write_gate_set(live.stack.root / "g", {"one": versions["a"], "two": "f" * 64}, method="arrow", k=1)
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        adapters = admin_stubs.AdapterAdminStub(channel)
        loaded = (await adapters.LoadAdapter(admin.LoadAdapterRequest(name="g", source="g"))).adapter
        assert (loaded.kind, loaded.rank, list(loaded.targets), loaded.num_layers) == ("gates", 0, ["q_proj"], 2)
        assert loaded.size_bytes == (folder / "gates.safetensors").stat().st_size
        columns = [(each.name, each.version, each.loaded, each.training_free) for each in loaded.gate_set.columns]
        assert columns == [("a", versions["a"], True, True), ("two", "f" * 64, False, True)]
        told_set = loaded.gate_set
        assert (told_set.null, told_set.method, told_set.k, told_set.temperature) == (True, "arrow", 1, 1.0)
        assert (await adapters.PinAdapter(admin.PinAdapterRequest(name="g", pinned=True))).adapter.pinned
        listed = (await adapters.ListAdapters(admin.ListAdaptersRequest())).adapters
        assert [(each.name, each.HasField("gate_set")) for each in listed] == [("a", False), ("b", False), ("g", True)]
        await adapters.UnloadAdapter(admin.UnloadAdapterRequest(name="g"))
        assert live.stack.engine.gate_sets == {}
