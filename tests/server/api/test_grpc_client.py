"""The real gRPC server: generated stubs, a client that knows only reflection, health."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pool, json_format, message_factory
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.api.grpc.server import SERVICES, GrpcServer
from perseid_server.api.server import ApiServer
from perseid_server.engine.messages import AdapterState
from perseid_server.errors import Conflict
from tests.fakes import expected
from tests.server.stack import LiveStack, make_stack, serving, write_adapter


@pytest_asyncio.fixture
async def channel(live: LiveStack) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        yield channel


@pytest.fixture
def generation(channel: grpc.aio.Channel) -> stubs.GenerationStub:
    return stubs.GenerationStub(channel)


@pytest.fixture
def adapters(channel: grpc.aio.Channel) -> admin_stubs.AdapterAdminStub:
    return admin_stubs.AdapterAdminStub(channel)


def request(prompt: str = "say", adapter: str = "", **sampling) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=prompt, adapter=adapter, sampling=pb.SamplingParams(**{"max_tokens": 6} | sampling)
    )


async def test_a_whole_answer(generation: stubs.GenerationStub) -> None:
    told = await generation.Generate(request(logprobs=1))
    tokens = expected(tuple(b"say"), None, 6)
    assert (told.choices[0].text, tuple(told.choices[0].token_ids)) == (bytes(tokens).decode(), tokens)
    assert told.choices[0].finish_reason == pb.FINISH_REASON_LENGTH
    assert (told.usage.prompt_tokens, told.usage.completion_tokens) == (3, 6)
    assert [logprob.token_id for logprob in told.choices[0].logprobs] == list(tokens)
    assert told.choices[0].logprobs[0].top[0].logprob == -0.5
    assert not told.HasField("adapter")


async def test_an_adapter_answers_under_its_version(live: LiveStack, generation: stubs.GenerationStub) -> None:
    version = await live.stack.load("one")
    told = await generation.Generate(request(adapter="one"))
    assert told.choices[0].text == bytes(expected(tuple(b"say"), version, 6)).decode()
    assert (told.adapter.name, told.adapter.version) == ("one", version)


async def test_the_base_may_be_named(generation: stubs.GenerationStub) -> None:
    assert await generation.Generate(request(adapter="tiny")) is not None


@pytest.mark.parametrize(
    "source",
    [
        {"token_ids": pb.TokenIds(ids=b"<hi>")},
        {"prompt": "<hi>"},
    ],
    ids=["tokens", "text"],
)
async def test_inputs(live: LiveStack, generation: stubs.GenerationStub, source: dict) -> None:
    await generation.Generate(pb.GenerateRequest(**source, sampling=pb.SamplingParams(max_tokens=1)))
    assert live.stack.engine.submitted[0].prompt_token_ids == tuple(b"<hi>")


@pytest.mark.parametrize(("stated", "ending"), [({}, "assistant: "), ({"add_generation_prompt": False}, "hi\n")])
async def test_a_conversation(live: LiveStack, generation: stubs.GenerationStub, stated: dict, ending: str) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")], **stated)
    await generation.Generate(pb.GenerateRequest(chat=chat, sampling=pb.SamplingParams(max_tokens=1)))
    prompt = live.stack.engine.submitted[0].prompt_token_ids
    assert live.stack.service.text.decode(prompt).endswith(ending)


async def test_a_stream_says_what_the_whole_says(live: LiveStack, generation: stubs.GenerationStub) -> None:
    await live.stack.load("one")
    asked = request(adapter="one", n=2, logprobs=0, echo=True)
    whole = await generation.Generate(asked)
    chunks = [chunk async for chunk in generation.GenerateStream(asked)]
    for choice in whole.choices:
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(chunk.text for chunk in mine) == choice.text
        assert [token for chunk in mine for token in chunk.token_ids] == list(choice.token_ids)
        assert [told for chunk in mine for told in chunk.logprobs] == list(choice.logprobs)
        assert [chunk.finish_reason for chunk in mine if chunk.finish_reason] == [choice.finish_reason]
    assert [place for place, chunk in enumerate(chunks) if chunk.HasField("adapter")] == [0]
    assert [place for place, chunk in enumerate(chunks) if chunk.HasField("usage")] == [len(chunks) - 1]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12


async def test_what_ended_an_answer_is_told(live: LiveStack, generation: stubs.GenerationStub) -> None:
    live.stack.says("one two")
    assert (await generation.Generate(request(max_tokens=20, stop=["tw"]))).choices[0].stop_reason == "tw"
    assert (await generation.Generate(request(max_tokens=20, stop_token_ids=[ord("w")]))).choices[0].stop_reason == "w"


async def test_a_full_queue_says_when_to_try_again(tmp_path) -> None:
    stack = make_stack(tmp_path, max_queue=1)
    async with serving(stack) as live, grpc.aio.insecure_channel(live.grpc) as channel:
        stub = stubs.GenerationStub(channel)
        stack.engine.hold()
        running = asyncio.ensure_future(stub.Generate(request()))
        await stack.engine.submissions(1)
        with pytest.raises(grpc.aio.AioRpcError) as full:
            await stub.Generate(request())
        stack.engine.go_on()
        await running
    assert full.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry = error_details_pb2.RetryInfo()
    assert (await asyncio.to_thread(rpc_status.from_call, _Call(full.value))).details[0].Unpack(retry)
    assert retry.retry_delay.ToTimedelta().total_seconds() > 0


class _Call:
    """An asyncio error as `rpc_status` wants it."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.trailing_metadata = error.trailing_metadata
        self.code, self.details = error.code, error.details


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engines_death_is_unavailable(
    live: LiveStack, generation: stubs.GenerationStub, stream: bool
) -> None:
    live.stack.engine.hold()
    call = generation.GenerateStream(request()).read() if stream else generation.Generate(request())
    running = asyncio.ensure_future(call)
    await live.stack.engine.submissions(1)
    live.stack.engine.die()
    with pytest.raises(grpc.aio.AioRpcError) as died:
        await running
    assert died.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_error_of_ours_is_internal_and_tells_nothing(
    live: LiveStack, generation: stubs.GenerationStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(live.stack.service.text, "encode", broken)
    with pytest.raises(grpc.aio.AioRpcError) as bug:
        await generation.Generate(request())
    assert (bug.value.code(), bug.value.details()) == (grpc.StatusCode.INTERNAL, "internal error")


async def test_adapters_are_loaded_listed_pinned_and_unloaded(
    live: LiveStack, adapters: admin_stubs.AdapterAdminStub
) -> None:
    folder = write_adapter(live.stack.root / "one")
    loaded = (await adapters.LoadAdapter(admin.LoadAdapterRequest(name="one", source="one"))).adapter
    assert (loaded.name, loaded.kind, loaded.rank, list(loaded.targets)) == ("one", "LoRA", 2, ["q_proj"])
    assert (loaded.num_layers, loaded.location) == (2, admin.LOCATION_DISK)
    assert loaded.size_bytes == (folder / "adapter_model.safetensors").stat().st_size
    with pytest.raises(grpc.aio.AioRpcError) as taken:
        await adapters.LoadAdapter(admin.LoadAdapterRequest(name="one", source="one"))
    assert taken.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert (await adapters.PinAdapter(admin.PinAdapterRequest(name="one", pinned=True))).adapter.pinned
    assert (await adapters.GetAdapter(admin.GetAdapterRequest(name="one"))).adapter.version == loaded.version
    await adapters.UnloadAdapter(admin.UnloadAdapterRequest(name="one"))
    assert not (await adapters.ListAdapters(admin.ListAdaptersRequest())).adapters


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("/etc", grpc.StatusCode.PERMISSION_DENIED),
        ("org/name", grpc.StatusCode.PERMISSION_DENIED),
        ("", grpc.StatusCode.INVALID_ARGUMENT),
        ("empty", grpc.StatusCode.INVALID_ARGUMENT),
        ("語" * 4096, grpc.StatusCode.PERMISSION_DENIED),
        ("x" * 5000, grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=["outside", "hub", "nothing", "no adapter", "long", "too long"],
)
async def test_sources_that_are_refused(
    live: LiveStack, adapters: admin_stubs.AdapterAdminStub, source: str, code: grpc.StatusCode
) -> None:
    (live.stack.root / "empty").mkdir()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await adapters.LoadAdapter(admin.LoadAdapterRequest(name="one", source=source))
    assert refused.value.code() is code


async def test_an_adapter_that_cannot_be_loaded_any_more_says_why(
    live: LiveStack, adapters: admin_stubs.AdapterAdminStub
) -> None:
    write_adapter(live.stack.root / "one")
    loaded = (await adapters.LoadAdapter(admin.LoadAdapterRequest(name="one", source="one"))).adapter
    assert not loaded.error
    live.stack.engine.adapter_states[loaded.version] = AdapterState(loaded.version, "disk", "the file is damaged")
    assert (await adapters.GetAdapter(admin.GetAdapterRequest(name="one"))).adapter.error == "the file is damaged"


@pytest.mark.parametrize("method", ["UnloadAdapter", "GetAdapter", "PinAdapter"])
async def test_unknown_adapters_are_not_found(adapters: admin_stubs.AdapterAdminStub, method: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await getattr(adapters, method)(getattr(admin, f"{method}Request")(name="nobody"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_client_that_knows_only_reflection(live: LiveStack) -> None:
    def generate() -> dict:
        with grpc.insecure_channel(live.grpc) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert set(SERVICES) < set(database.get_services())
            pool = descriptor_pool.DescriptorPool(database)
            method = pool.FindServiceByName("perseid.v1.Generation").FindMethodByName("Generate")
            asked, told = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
            call = channel.unary_unary("/perseid.v1.Generation/Generate", asked.SerializeToString, told.FromString)
            message = json_format.ParseDict({"prompt": "say", "sampling": {"maxTokens": 6}}, asked())
            return json_format.MessageToDict(call(message, timeout=20))

    told = await asyncio.to_thread(generate)
    assert told["choices"][0]["text"] == bytes(expected(tuple(b"say"), None, 6)).decode()


async def test_a_taken_port_is_a_conflict(live: LiveStack, tmp_path) -> None:
    with pytest.raises(Conflict, match="HTTP cannot listen"):
        ApiServer("127.0.0.1", live.addresses.http_port, 0)
    other = make_stack(tmp_path / "other")
    server = GrpcServer(other.service, other.registry, other.status, "tiny")
    with pytest.raises(Conflict, match="gRPC cannot listen"):
        server.bind("127.0.0.1", live.addresses.grpc_port)
    await server.stop(0)
