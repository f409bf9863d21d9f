"""What comes over gRPC, and how it fails by its status."""

from collections.abc import AsyncIterator

import grpc
import pytest

from perseid_loadtest.traffic.grpc_target import GrpcTarget
from perseid_loadtest.traffic.plan import Request
from perseid_loadtest.traffic.target import Answer, Failed
from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.api.grpc.errors import abort
from perseid_server.errors import Conflict, PerseidError, QueueFull


class Generation(stubs.GenerationServicer):
    """`adapter` says how to behave."""

    def __init__(self) -> None:
        self.asked: list[pb.GenerateRequest] = []
        self.metadata: list[dict] = []

    async def GenerateStream(self, request, context):
        self.asked.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if request.adapter == "full":
            await abort(context, QueueFull("too many", retry_after_s=2.5))
        yield pb.GenerateChunk(token_ids=[1, 2])
        if request.adapter == "cut":
            return
        if request.adapter == "breaks":
            await context.abort(grpc.StatusCode.INTERNAL, "broken")
        yield pb.GenerateChunk(token_ids=[3], finish_reason="FINISH_REASON_LENGTH", usage=pb.Usage(prompt_tokens=4))

    async def Generate(self, request, context):
        usage = pb.Usage(prompt_tokens=4, completion_tokens=3)
        return pb.GenerateResponse(choices=[pb.Choice(token_ids=[1, 2, 3])], usage=usage)


class Admin(admin_stubs.AdapterAdminServicer):
    """Two adapters, gates and heads."""

    async def ListAdapters(self, request, context):
        kinds = {"a": "LoRA", "gates": "gates", "b": "rsLoRA", "heads": "heads"}
        return admin.ListAdaptersResponse(adapters=[admin.Adapter(name=n, kind=k) for n, k in kinds.items()])

    async def LoadAdapter(self, request, context):
        await abort(context, Conflict("taken"))


@pytest.fixture
async def served() -> AsyncIterator[tuple[Generation, str]]:
    server, generation = grpc.aio.server(), Generation()
    stubs.add_GenerationServicer_to_server(generation, server)
    admin_stubs.add_AdapterAdminServicer_to_server(Admin(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield generation, f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def target(served) -> AsyncIterator[GrpcTarget]:
    one = GrpcTarget(served[1], api_key="secret")
    await one.open()
    yield one
    await one.close()


async def test_a_stream_is_read_to_its_end(served, target: GrpcTarget):
    answer = Answer(0.0)
    await target.ask(Request(0, "a", (7, 8), 3), answer)
    assert ([tokens for _, tokens in answer.arrivals], answer.prompt_tokens, answer.output_tokens) == ([2, 1], 4, 3)
    sent = served[0].asked[0]
    assert (sent.adapter, list(sent.token_ids.ids), sent.sampling.max_tokens) == ("a", [7, 8], 3)
    assert served[0].metadata[0]["authorization"] == "Bearer secret"
    assert target.names == ("a", "b")


async def test_a_proxy_of_the_environment_is_not_asked(served, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int):
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{unused_tcp_port}")
    for name in ("no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    direct = GrpcTarget(served[1])
    await direct.open()
    await direct.close()
    assert direct.names == ("a", "b")


async def test_a_whole_answer_is_one_arrival(served):
    whole = GrpcTarget(served[1], stream=False)
    await whole.open()
    answer = Answer(0.0)
    await whole.ask(Request(0, "", "text", 3), answer)
    await whole.close()
    assert ([tokens for _, tokens in answer.arrivals], answer.prompt_tokens) == ([3], 4)


@pytest.mark.parametrize(
    ("adapter", "kind", "retry_after_s", "tokens"),
    [("full", "RESOURCE_EXHAUSTED", 2.5, 0), ("breaks", "INTERNAL", None, 2), ("cut", "cut off", None, 2)],
)
async def test_failures_by_status(target: GrpcTarget, adapter, kind, retry_after_s, tokens):
    answer = Answer(0.0)
    with pytest.raises(Failed) as failed:
        await target.ask(Request(0, adapter, (7,), 3), answer)
    assert (failed.value.kind, failed.value.retry_after_s, answer.output_tokens) == (kind, retry_after_s, tokens)


async def test_changes_that_fail_tell_their_status(target: GrpcTarget):
    with pytest.raises(Failed, match="ALREADY_EXISTS"):
        await target.load("a", "x", replace=False)
    with pytest.raises(Failed, match="UNIMPLEMENTED"):
        await target.unload("a")


async def test_nobody_there_is_one_line(unused_tcp_port: int):
    target = GrpcTarget(f"127.0.0.1:{unused_tcp_port}")
    with pytest.raises(PerseidError, match="is a gRPC server running there"):
        await target.open()
    await target.close()
