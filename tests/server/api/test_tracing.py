"""Traces over both transports, from the client's traceparent to the spans of a real request."""

import grpc
import pytest

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.observe.calls import Calls
from perseid_server.observe.tracing import Tracing
from tests.server.observe.collector import collecting
from tests.server.stack import LiveStack, make_stack, serving

SECRET = "a users own words"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


async def over_http(live: LiveStack) -> None:
    body = {"model": "one", "prompt": SECRET, "max_tokens": 4}
    async with live.http() as client:
        assert (await client.post("/v1/completions", json=body, headers=HEADER)).status_code == 200
        assert (await client.get("/health", headers=HEADER)).status_code == 200


async def over_grpc(live: LiveStack) -> None:
    message = pb.GenerateRequest(prompt=SECRET, adapter="one", sampling=pb.SamplingParams(max_tokens=4))
    async with grpc.aio.insecure_channel(live.grpc) as channel:
        async for _ in stubs.GenerationStub(channel).GenerateStream(message, metadata=tuple(HEADER.items())):
            pass


@pytest.mark.parametrize(
    ("ask", "name"), [(over_http, "POST /v1/completions"), (over_grpc, "perseid.v1.Generation/GenerateStream")]
)
async def test_a_request_is_a_span_of_its_clients_trace(tmp_path, ask, name: str) -> None:
    with collecting() as collector:
        tracing = Tracing(collector.endpoint, 0.0)
        stack = make_stack(tmp_path, calls=Calls(log_prompts=True, on_close=tracing.tell))
        version = await stack.load("one")
        async with serving(stack) as live:
            await ask(live)
        tracing.stop()
    assert collector.tree()[name] == ["queue", "prefill", "decode"]
    assert collector.tree()["queue"] == ["adapter load"]
    call = collector.named(name)
    assert (call.trace, call.parent) == (TRACE, PARENT)
    assert call.attributes["gen_ai.response.model"] == f"one@{version[:12]}"
    assert call.attributes["gen_ai.request.max_tokens"] == 4
    assert call.attributes["gen_ai.usage.output_tokens"] == 4
    assert all(call.start <= span.start <= span.end <= call.end for span in collector.spans)
    assert SECRET not in str(collector.spans)
