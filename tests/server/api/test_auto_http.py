"""Blends and `auto` over HTTP, whole and streamed, and the gate sets among the models."""

import json
from typing import Any

import httpx
import pytest

from perseid_server.engine.adaptation import BASE_COLUMN, Adaptation, Routing
from tests.fakes import expected
from tests.server.stack import LiveStack, certain_router, write_gate_set

SHARES = {"a": 1 / 7, "b": 2 / 7, "tiny": 4 / 7}
"""What the fake gates choose of two adapters and the base."""


async def load(live: LiveStack, **options: Any) -> tuple[dict[str, str], str]:
    """Adapters a and b and gate set g: (versions by name, the gate set's)."""
    versions = {name: await live.stack.load(name, seed=seed) for seed, name in enumerate("ab")}
    return versions, await live.stack.load_gates("g", "a", "b", **options)


async def complete(live: LiveStack, **body: Any) -> dict[str, Any]:
    async with live.http() as http:
        response = await http.post("/v1/completions", json={"prompt": "say", "max_tokens": 4, "temperature": 0} | body)
    assert response.status_code == 200, response.text
    return response.json()


async def refused(live: LiveStack, **body: Any) -> tuple[int, str, str]:
    async with live.http() as http:
        response = await http.post("/v1/completions", json={"prompt": "say", "max_tokens": 4} | body)
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


async def stream(live: LiveStack, **body: Any) -> list[dict[str, Any]]:
    asked = {"prompt": "say", "max_tokens": 3, "temperature": 0, "stream": True} | body
    async with live.http() as http, http.stream("POST", "/v1/completions", json=asked) as response:
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def text_of(adaptation: Adaptation, prompt: str = "say", num_tokens: int = 4) -> str:
    """What the fake model answers: it takes an adaptation's key for the adapter."""
    return bytes(expected(tuple(prompt.encode()), adaptation.key, num_tokens)).decode()


def routed(versions: dict[str, str], gates: str, k: int = 2) -> Adaptation:
    return Adaptation(routing=Routing(gates, (versions["a"], versions["b"], BASE_COLUMN), k, 1.0))


async def test_a_blend_answers_as_its_sum_and_says_so(live: LiveStack) -> None:
    versions, _ = await load(live)
    parts = [{"name": "b", "weight": 0.25}, {"name": "a"}]
    answer = await complete(live, model="tiny", adapters=parts)
    sum_of = Adaptation(tuple(sorted([(versions["a"], 1.0), (versions["b"], 0.25)])))
    assert answer["choices"][0]["text"] == text_of(sum_of)
    assert answer["perseid"]["adapters"] == [
        {"name": "b", "version": versions["b"], "weight": 0.25},
        {"name": "a", "version": versions["a"], "weight": 1.0},
    ]
    assert answer["perseid"]["adapter"] is None


async def test_a_blend_of_one_is_the_explicit_request(live: LiveStack) -> None:
    versions, _ = await load(live)
    blend = await complete(live, model="tiny", adapters=[{"name": "a", "weight": 1}])
    named = await complete(live, model="a")
    assert blend["choices"] == named["choices"]
    assert blend["perseid"]["adapter"] == named["perseid"]["adapter"] == {"name": "a", "version": versions["a"]}
    assert "adapters" not in named["perseid"]


@pytest.mark.parametrize(
    ("model", "auto"), [("auto", None), ("auto:g", {}), ("tiny:auto", None), ("tiny:auto:g", {"gate_set": "g"})]
)
async def test_auto_answers_as_its_gates_and_says_so(live: LiveStack, model: str, auto: dict | None) -> None:
    versions, gates = await load(live)
    answer = await complete(live, model=model, auto=auto)
    assert answer["choices"][0]["text"] == text_of(routed(versions, gates))
    assert answer["model"] == model
    assert answer["perseid"]["auto"] == {"gate_set": "g", "version": gates, "tier": "token", "joined": []}
    assert answer["perseid"]["adapter"] is None
    assert "routing" not in answer["perseid"]


async def test_autos_options_arrive(live: LiveStack) -> None:
    versions, gates = await load(live)
    options = {"allow": ["b"], "k": 1, "temperature": 2, "tier": "token", "null": False, "join": True}
    await complete(live, model="auto", auto=options)
    assert live.stack.engine.submitted[-1].adaptation.routing == Routing(gates, (None, versions["b"], None), 1, 2.0)


async def test_the_first_tiers_choice_is_told_as_the_adapter(live: LiveStack) -> None:
    versions, _ = await load(live, router=certain_router("a", "b"))
    answer = await complete(live, model="auto", prompt="bbbb", routing="tokens")
    assert answer["choices"] == (await complete(live, model="b", prompt="bbbb"))["choices"]
    assert answer["perseid"]["adapter"] == {"name": "b", "version": versions["b"]}
    assert answer["perseid"]["auto"]["tier"] == "request"
    assert answer["perseid"]["routing"] == {
        "prompt": {"b": 1.0},
        "completion": {"b": 1.0},
        "tokens": [[["b", 1.0]]] * 4,
    }


async def test_several_prompts_may_be_served_by_several_choices(live: LiveStack) -> None:
    await load(live, router=certain_router("a", "b"))
    answer = await complete(live, model="auto", prompt=["aaaa", "cccc", "ab"])
    told = answer["perseid"]
    assert [(each["adapter"] or {}).get("name") for each in told["prompts"]] == ["a", None, None]
    assert [each["auto"]["tier"] for each in told["prompts"]] == ["request", "request", "token"]
    assert (told["adapter"], told["auto"]) == (None, None)


async def test_a_summary_tells_shares_by_name(live: LiveStack) -> None:
    await load(live)
    routing = (await complete(live, model="auto", routing="summary"))["perseid"]["routing"]
    assert routing == {"prompt": pytest.approx(SHARES), "completion": pytest.approx(SHARES)}
    assert next(iter(routing["prompt"])) == "tiny", "largest first"


async def test_tokens_tell_the_top_adapters_of_each(live: LiveStack) -> None:
    await load(live)
    routing = (await complete(live, model="auto", routing="tokens"))["perseid"]["routing"]
    assert [[name for name, _ in token] for token in routing["tokens"]] == [["tiny", "b", "a"]] * 4
    assert [share for _, share in routing["tokens"][0]] == pytest.approx([4 / 7, 2 / 7, 1 / 7])


@pytest.mark.parametrize("usage", [False, True])
async def test_a_stream_tells_tokens_with_each_chunk_and_the_summary_last(live: LiveStack, usage: bool) -> None:
    await load(live)
    options = {"stream_options": {"include_usage": True}} if usage else {}
    *chunks, last = await stream(live, model="auto", routing="tokens", **options)
    assert [len(chunk["perseid"]["routing"]["tokens"]) for chunk in chunks] == [1, 1, 1]
    assert last["choices"] == []
    assert ("usage" in last) == usage
    assert last["perseid"]["auto"]["tier"] == "token"
    assert last["perseid"]["routing"] == {"prompt": pytest.approx(SHARES), "completion": pytest.approx(SHARES)}


async def test_a_stream_without_a_report_is_as_it_was(live: LiveStack) -> None:
    await load(live)
    chunks = await stream(live, model="auto")
    assert all("perseid" not in chunk and chunk["choices"] for chunk in chunks)


async def test_refusals_say_why(live: LiveStack) -> None:
    await load(live)
    await live.stack.load("new", seed=3)
    status, param, message = await refused(live, model="auto", auto={"allow": ["new"]})
    assert (status, param) == (400, "auto.allow")
    assert "'new' is not in the gate set" in message
    assert (await refused(live, model="auto", auto={"allow": ["a", "x"]}))[:2] == (400, "auto.allow.1")
    assert (await refused(live, model="auto", auto={"k": 4}))[:2] == (400, "auto.k")
    assert (await refused(live, model="auto", auto={"tier": "request"}))[:2] == (400, "auto.tier")
    assert (await refused(live, model="g"))[:2] == (400, "model")
    assert (await refused(live, model="tiny", adapters=[{"name": "x"}]))[:2] == (404, "adapters.0.name")


async def test_models_list_gate_sets_and_what_auto_means(live: LiveStack) -> None:
    versions, gates = await load(live, k=1)
    await live.stack.registry.unload("b")
    async with live.http() as http:
        models = (await http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["tiny", "a", "auto:g", "auto"]
        assert models[2]["perseid"] == models[3]["perseid"]
        for name in ("auto:g", "auto"):
            assert (await http.get(f"/v1/models/{name}")).json()["id"] == name
        assert (await http.get("/v1/models/g")).status_code == 404
        assert (await http.get("/v1/models/auto:a")).status_code == 404
    told = models[2]["perseid"]
    assert {key: told[key] for key in ("name", "version", "kind", "method", "k", "null", "request_router")} == {
        "name": "g", "version": gates, "kind": "gates", "method": "trained", "k": 1, "null": True,
        "request_router": False,
    }  # fmt: skip
    assert told["adapters"] == [
        {"name": "a", "version": versions["a"], "loaded": True, "training_free": False},
        {"name": "b", "version": versions["b"], "loaded": False, "training_free": False},
    ]


async def test_of_several_gate_sets_auto_means_none(live: LiveStack) -> None:
    await load(live)
    await live.stack.load_gates("h", "a", seed=1)
    async with live.http() as http:
        models = (await http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in models] == ["tiny", "a", "b", "auto:g", "auto:h"]
    assert (await refused(live, model="auto"))[:2] == (400, "auto.gate_set")


async def test_vllms_routes_load_and_unload_gate_sets(live: LiveStack) -> None:
    versions, _ = await load(live)
    folder = write_gate_set(live.stack.root / "new", versions, method="arrow", null=False)

    async def post(http: httpx.AsyncClient, route: str, **body: Any) -> int:
        return (await http.post(f"/v1/{route}", json=body)).status_code

    async with live.http() as http:
        assert await post(http, "load_lora_adapter", lora_name="h", lora_path=str(folder), pin=True) == 200
        assert await post(http, "load_lora_adapter", lora_name="h", lora_path=str(folder)) == 409
        told = (await http.get("/v1/models/auto:h")).json()["perseid"]
        assert (told["pinned"], told["adapters"][0]["training_free"]) == (True, True)
        assert await post(http, "unload_lora_adapter", lora_name="h") == 200
        assert (await http.get("/v1/models/auto:h")).status_code == 404
