"""Two tenants on one server: whatever the one asks, it is answered as if the other had loaded nothing.

Every route and every method is walked twice, on a server with the other's adapters, gate sets and heads and on one
without, and the answers are compared byte by byte, apart from ids and times.
"""

import itertools
import json
import re
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.access.caller import calling
from perseid_server.adapters.store import version_of
from perseid_server.api.grpc.server import SERVICES
from perseid_server.engine.adaptation import BASE
from perseid_server.errors import Forbidden
from perseid_server.frontend.adaptation_options import AdaptationOptions, AutoOptions, Named
from perseid_server.frontend.heads import HeadsChooser
from perseid_server.frontend.requests import GenerationRequest, SamplingOptions, TextInput
from tests.fakes import BLOCK_SIZE
from tests.server.access.rings import bearer, gate_of, key
from tests.server.speculation.heads_folders import medusa_v2, write_heads
from tests.server.stack import (
    LiveStack,
    Stack,
    background,
    certain_router,
    known,
    make_stack,
    serving,
    write_adapter,
    write_gate_set,
)

A = key("a", "generate", "admin", adapters=("a-*", "shared"))
B = key("b", "generate", "admin", adapters=("b-*", "shared"))
NAMES = ("a-one", "a-gates", "a-heads", "a-none", "b-one", "b-none", "b-gates", "shared", "auto", "a-one.x", "x" * 200)
SAMPLING = {"max_tokens": 3, "temperature": 0}
PROMPT = "say what both tenants say"  # several KV blocks, which A has in the cache already
SURE = "a" * 20  # the request-level router is sure that it is for A's adapter


async def server(folder: Path, *, with_a: bool) -> Stack:
    """B has an adapter, a gate set that claims A's adapter by its version, and one of both tenants' adapters is shared.
    A has adapters, one of them B's own, a gate set and heads, and has asked what B will ask; or it has nothing."""
    stack = make_stack(folder, gate=gate_of(A, B), default_gate_set="a-gates")
    root, load = stack.root, stack.registry.load
    versions = {name: version_of(write_adapter(root / name, seed=seed)) for seed, name in enumerate(("a-one", "b-one"))}
    write_gate_set(root / "shared", versions, router=certain_router(*versions))
    write_gate_set(root / "b-gates", {"b-claim": versions["a-one"], "b-one": versions["b-one"]})
    write_adapter(root / "a-same", seed=1)
    write_gate_set(root / "a-gates", {"a-one": versions["a-one"]})
    write_heads(root / "a-heads", medusa_v2(3))
    for name in ("a-one", "a-same", "a-gates", "a-heads") if with_a else ():
        await load(name, name, pin=name == "a-one")
    for name in ("b-one", "b-gates", "shared"):
        await load(name, name)
    if with_a:
        await ask_as_a(stack)
    return stack


async def ask_as_a(stack: Stack) -> None:
    """Fill the prefix cache."""
    asked: tuple[AdaptationOptions | None, ...] = (
        None,
        Named("a-one"),
        Named("a-same"),
        AutoOptions("shared"),
        AutoOptions("a-gates"),
    )
    for adaptation, text in itertools.product(asked, (PROMPT, SURE)):
        for _ in range(2):
            request = GenerationRequest("a", TextInput(text), adaptation, SamplingOptions(**SAMPLING), caller=A.caller)
            with calling(A.caller):
                async with stack.service.generate(request) as generation:
                    assert [one async for one in generation.deltas]
        assert generation.usage.cached_tokens >= BLOCK_SIZE, "A itself finds what it has put there"


def http_calls() -> list[tuple[str, str, dict | None]]:
    """What B asks over HTTP: every route, every name in every place."""
    calls: list[tuple[str, str, dict | None]] = [
        ("GET", path, None)
        for path in ("/openapi.json", "/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/medusa_heads")
    ]
    calls += [
        ("POST", "/v1/completions", {"prompt": PROMPT, "model": model, **SAMPLING}) for model in ("tiny", "b-one")
    ]
    calls += [("POST", "/tokenize", {"prompt": "say"}), ("POST", "/detokenize", {"tokens": [104]})]
    for name in NAMES:
        models = (name, f"auto:{name}", f"tiny:{name}")
        calls += [("GET", f"/v1/models/{model}", None) for model in models]
        calls += [("GET", f"/v1/medusa_heads/{name}", None)]
        asked = [{"model": model} for model in models]
        asked += [{"model": "tiny", "adapters": [{"name": "b-one"}, {"name": name}]}]
        asked += [{"model": "auto", "auto": {"gate_set": name, "join": join}} for join in (False, True)]
        asked += [{"model": "auto:shared", "auto": {"allow": [name], "join": join}} for join in (False, True)]
        asked += [{"model": "auto:shared", "auto": {"tier": "token"}, "routing": "tokens"}]
        asked += [{"model": "auto:shared", "prompt": SURE, "routing": "summary"}]
        for body, stream in itertools.product(asked, (False, True)):
            common = {"stream": stream, **SAMPLING, **body}
            told = common.pop("prompt", PROMPT)
            calls += [("POST", "/v1/completions", {"prompt": told, **common})]
            turn = {"role": "user", "content": told}
            calls += [("POST", "/v1/chat/completions", {"messages": [turn], **common})]
        for path, adapter in itertools.product(
            ("a-one", "b-one", "nothing", "./a-one", "b-one/../a-one"), (None, name)
        ):
            load = {"lora_name": name, "lora_path": path, "adapter": adapter}
            if name != "b-one":
                calls += [("POST", "/v1/load_lora_adapter", load | {"load_inplace": new}) for new in (False, True)]
        calls += [("POST", "/v1/unload_lora_adapter", {"lora_name": name})] if name.startswith("a-") else []
    calls += [("POST", "/v1/unload_lora_adapter", {"lora_name": "b-none"})]
    return calls


async def walk_http(live: LiveStack) -> list[tuple]:
    assert {(m, p.partition("{")[0]) for m, p in live.stack.routes()} <= {
        (method, re.sub(r"(models|medusa_heads)/.*", r"\1/", path)) for method, path, _ in http_calls()
    }
    told = []
    async with live.http() as client:
        for method, path, body in http_calls():
            answer = await client.request(method, path, json=body, headers=bearer("b"))
            kept = {name: answer.headers.get(name) for name in ("content-type", "retry-after", "www-authenticate")}
            told.append((method, path, json.dumps(body), answer.status_code, kept, plain(answer.text)))
    return told


def grpc_calls(channel: grpc.aio.Channel) -> list[tuple]:
    """What B asks over gRPC: every method, every name in every place."""
    generation, adapters = stubs.GenerationStub(channel), admin_stubs.AdapterAdminStub(channel)
    calls: list[tuple] = [(adapters.ListAdapters, admin.ListAdaptersRequest())]
    for name in NAMES:
        sampling = pb.SamplingParams(**SAMPLING)
        for more in (
            {"adapter": name},
            {"blend": pb.Blend(adapters=[pb.WeightedAdapter(name="b-one"), pb.WeightedAdapter(name=name)])},
            {"auto": pb.Auto(gate_set=name)},
            {"auto": pb.Auto(gate_set="shared", join=True), "routing_report": pb.ROUTING_REPORT_TOKENS},
            {"auto": pb.Auto(gate_set="shared", allow=[name])},
            {"auto": pb.Auto(gate_set="shared"), "prompt": SURE},
            {},
        ):
            asked = pb.GenerateRequest(**{"prompt": PROMPT, "sampling": sampling} | more)
            calls += [(generation.Generate, asked), (generation.GenerateStream, asked)]
        calls += [(adapters.GetAdapter, admin.GetAdapterRequest(name=name))]
        calls += [(adapters.PinAdapter, admin.PinAdapterRequest(name=name, pinned=on)) for on in (True, False)]
        if name not in {"b-one", "shared"}:
            calls += [(adapters.LoadAdapter, admin.LoadAdapterRequest(name=name, source="a-one", adapter=name))]
            calls += [(adapters.UnloadAdapter, admin.UnloadAdapterRequest(name=name))]
    return calls


async def walk_grpc(live: LiveStack) -> list[tuple]:
    told = []
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        calls = grpc_calls(channel)
        for method, message in calls:
            try:
                call = method(message, metadata=tuple(bearer("b").items()))
                answers = [one async for one in call] if hasattr(call, "__aiter__") else [await call]
                told.append((str(message), plain("".join(map(str, answers)))))
            except grpc.aio.AioRpcError as error:
                told.append((str(message), error.code(), error.details(), list(error.trailing_metadata() or ())))
        told += [await health_and_reflection(channel)]
    services = (pb.DESCRIPTOR.services_by_name["Generation"], admin.DESCRIPTOR.services_by_name["AdapterAdmin"])
    asked = {type(message).__name__ for _, message in calls}
    assert {method.input_type.name for service in services for method in service.methods} == asked
    return told


async def health_and_reflection(channel: grpc.aio.Channel) -> tuple[str, ...]:
    health, reflection = health_pb2_grpc.HealthStub(channel), reflection_pb2_grpc.ServerReflectionStub(channel)
    metadata = tuple(bearer("b").items())
    told = [await health.Check(health_pb2.HealthCheckRequest(service=name)) for name in ("", *SERVICES)]
    question = reflection_pb2.ServerReflectionRequest
    asked = [question(list_services=""), *(question(file_containing_symbol=name) for name in SERVICES)]
    told += [one async for one in reflection.ServerReflectionInfo(iter(asked), metadata=metadata)]
    return tuple(map(str, told))


def plain(text: str) -> str:
    """Without ids and times."""
    text = re.sub(r'("created": ?|loaded_at: )[\d.e+]+', r"\1", text)
    return re.sub(r'((chat)?cmpl-|request_id: ")[0-9a-f]{32}', r"\1", text)


@pytest.mark.parametrize("walk", [walk_http, walk_grpc])
async def test_a_tenant_is_answered_as_if_the_other_had_nothing(walk, tmp_path: Path) -> None:
    told = {}
    for with_a in (True, False):
        stack = await server(tmp_path / str(with_a), with_a=with_a)
        async with serving(stack) as live:
            told[with_a] = await walk(live)
        await background(stack)
        assert ({"a-one", "a-same", "a-gates", "a-heads"} <= {one.name for one in stack.registry.list()}) == with_a
        assert with_a <= (stack.registry.names().keys() >= known(stack) - {""})
        stack.store.close()
    differing = [(one, other) for one, other in zip(told[True], told[False], strict=True) if one != other]
    assert not differing, differing[0]
    for *asked, answer in told[True]:
        for name in ("a-one", "a-same", "a-gates", "a-heads"):
            assert name not in str(answer) or name in str(asked), (asked, answer)
    assert "a-one" in str(told[True])  # asked for
    assert sum("b-one" in str(one) for one in told[True]) > 5


async def test_what_a_tenant_asks_for_in_vain_does_not_exist(tmp_path: Path) -> None:
    stack = await server(tmp_path, with_a=True)
    async with serving(stack) as live:
        told = [one for one in await walk_http(live) if one[1].startswith(("/v1/models/a-", "/v1/medusa_heads/a-"))]
    answers = {
        (status, re.sub(r"a-[a-z.]+|x{20,}", "NAME", text), path.startswith("/v1/models"))
        for _, path, _, status, _, text in told
    }
    assert {status for status, _, _ in answers} == {404}
    assert len(answers) == 2  # one for models, one for heads, whether there is such a name or not


async def test_versions_of_others_survive_what_a_tenant_unloads(tmp_path: Path) -> None:
    stack = await server(tmp_path, with_a=True)
    theirs = stack.registry.get("a-one").version
    with calling(B.caller):
        await stack.registry.unload("b-one")
    await background(stack)
    assert stack.store.folder(theirs).is_dir()


async def test_others_heads_draft_for_nobody_else(tmp_path: Path) -> None:
    stack = await server(tmp_path, with_a=True)
    chooser = HeadsChooser(stack.registry)
    with calling(A.caller):
        assert chooser.heads_for(BASE) is not None
    with calling(B.caller):
        assert chooser.heads_for(BASE) is None


async def test_a_gate_set_never_chooses_what_the_caller_does_not_see(tmp_path: Path) -> None:
    stack = await server(tmp_path, with_a=True)
    body = {"model": "auto:shared", "prompt": "say", "auto": {"tier": "token"}, "routing": "tokens", **SAMPLING}
    async with serving(stack) as live, live.http() as client:
        told = (await client.post("/v1/completions", json=body, headers=bearer("b"))).json()
        card = (await client.get("/v1/models/auto:shared", headers=bearer("b"))).json()
    assert "a-one" not in json.dumps(told)
    assert "b-one" in json.dumps(told["perseid"]["routing"])
    assert [column["name"] for column in card["perseid"]["adapters"]] == ["b-one"]


async def test_names_and_folders_of_others_cannot_be_loaded(tmp_path: Path) -> None:
    stack = await server(tmp_path, with_a=True)
    with calling(B.caller):
        for source in ("a-one", str(stack.root / "a-one"), "b-one/../a-one", "nothing"):
            with pytest.raises(Forbidden, match="not a folder below"):
                await stack.registry.load("b-new", source)
        for name in ("a-one", "a-free"):
            with pytest.raises(Forbidden, match="may use only 'b-\\*', 'shared'"):
                await stack.registry.load(name, "b-one", replace=True)
