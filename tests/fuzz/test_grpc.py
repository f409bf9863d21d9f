"""Any RPC with anything in its messages, over a real socket: every call ends with a status that says whose mistake it
was, and never with ours."""

from collections.abc import Iterator
from random import Random

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from perseid_protos.perseid.v1 import adapter_admin_pb2, adapter_admin_pb2_grpc, generation_pb2
from perseid_server.api.grpc.server import SERVICES
from tests.fuzz.campaign import Campaign, fuzzer
from tests.fuzz.messages import changed, message, wire
from tests.fuzz.served import attacked_server, no_traceback
from tests.server.stack import LiveStack

Code = grpc.StatusCode
ALLOWED = {
    Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.PERMISSION_DENIED,
    Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE, Code.CANCELLED,
}  # fmt: skip
FILES = (generation_pb2, adapter_admin_pb2, health_pb2, reflection_pb2)
METHODS: tuple[MethodDescriptor, ...] = tuple(
    method for file in FILES for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods
)
OFTEN = [method for method in METHODS for _ in range(5 if method.input_type.name == "GenerateRequest" else 1)]
ENDLESS = ("Watch",)
"""Streams that go on until the client leaves."""
TIMEOUT_S = 30.0

pb = generation_pb2
GOOD: dict[str, list[Message]] = {
    "GenerateRequest": [
        pb.GenerateRequest(prompt="ab", sampling=pb.SamplingParams(max_tokens=3)),
        pb.GenerateRequest(prompt="ab", adapter="one", sampling=pb.SamplingParams(max_tokens=3, logprobs=2, n=2)),
        pb.GenerateRequest(
            chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]),
            sampling=pb.SamplingParams(max_tokens=2, stop=["x"], logit_bias={97: 1.0}, seed=3),
        ),
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[1, 2, 3]), auto=pb.Auto(gate_set="gates", k=1), routing_report=3,
            sampling=pb.SamplingParams(max_tokens=2),
        ),
        pb.GenerateRequest(
            prompt="ab", blend=pb.Blend(adapters=[pb.WeightedAdapter(name="one"), pb.WeightedAdapter(name="two")]),
            sampling=pb.SamplingParams(max_tokens=2, echo=True), acceptance=2, typical=pb.Typical(epsilon=0.1),
        ),
    ],
    "LoadAdapterRequest": [
        adapter_admin_pb2.LoadAdapterRequest(name="mine", source="source", replace=True),
        adapter_admin_pb2.LoadAdapterRequest(name="drafts", source="heads", replace=True, adapter="one"),
    ],
    "UnloadAdapterRequest": [adapter_admin_pb2.UnloadAdapterRequest(name="mine")],
    "PinAdapterRequest": [adapter_admin_pb2.PinAdapterRequest(name="mine", pinned=True)],
    "GetAdapterRequest": [adapter_admin_pb2.GetAdapterRequest(name="gates")],
    "ServerReflectionRequest": [
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="perseid.v1.Generation"),
        reflection_pb2.ServerReflectionRequest(list_services="*"),
        reflection_pb2.ServerReflectionRequest(
            file_containing_extension=reflection_pb2.ExtensionRequest(containing_type="perseid.v1.Auto")
        ),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    with attacked_server(tmp_path_factory.mktemp("server")) as live:
        yield live


@pytest.fixture(scope="module")
def channel(live: LiveStack) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(live.grpc) as channel:
        yield channel


def test_no_rpc_is_left_out(channel: grpc.Channel) -> None:
    """What the server says it has is what the fuzzer sends to."""
    ask = reflection_pb2.ServerReflectionRequest(list_services="*")
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    (answer,) = stub.ServerReflectionInfo(iter([ask]), timeout=TIMEOUT_S)
    served = {service.name for service in answer.list_services_response.service}
    assert set(SERVICES) < served
    assert served == {method.containing_service.full_name for method in METHODS}


def call(channel: grpc.Channel, method: MethodDescriptor, sent: list[bytes]) -> tuple[Code, str]:
    """Send bytes; the answers must be messages of the method's type. Returns how the call ended."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    answer = GetMessageClass(method.output_type)
    do = channel.stream_stream(path, request_serializer=None, response_deserializer=answer.FromString)
    timeout = 0.05 if method.name in ENDLESS else TIMEOUT_S
    try:
        for _ in do(iter(sent), timeout=timeout):
            if method.name in ENDLESS:
                break
    except grpc.RpcError as error:
        if error.code() is Code.DEADLINE_EXCEEDED and method.name not in ENDLESS:
            raise AssertionError(f"{path} hangs") from error
        return error.code(), error.details() or ""
    return Code.OK, ""


def request(random: Random, method: MethodDescriptor) -> Message:
    """Something of the type that the method takes."""
    good = GOOD.get(method.input_type.name)
    if good and random.random() < 0.8:
        return random.choice(good) if random.random() < 0.3 else changed(random, random.choice(good))
    return message(random, method.input_type)


def restore(channel: grpc.Channel) -> None:
    """Load again what the others ask for."""
    stub = adapter_admin_pb2_grpc.AdapterAdminStub(channel)
    for name, source in {"one": "one-0", "two": "two-1", "gates": "gates", "heads": "heads"}.items():
        stub.LoadAdapter(
            adapter_admin_pb2.LoadAdapterRequest(name=name, source=source, replace=True), timeout=TIMEOUT_S
        )


def check_call(channel: grpc.Channel, method: MethodDescriptor, sent: list[bytes]) -> None:
    """One call ends as it may."""
    code, details = call(channel, method, sent)
    shown = [raw[:200] for raw in sent]
    assert code in ALLOWED, f"{method.full_name} ends with {code}: {details[:300]}; sent {shown}"
    no_traceback(details)
    if code not in {Code.OK, Code.CANCELLED}:
        assert details, f"{method.full_name} ends with {code} and no word; sent {shown}"
    if code is Code.OK and method.name in {"LoadAdapter", "UnloadAdapter"}:
        restore(channel)


@fuzzer(short=500, long=5000)
def test_grpc_messages(campaign: Campaign, channel: grpc.Channel) -> None:
    def check(random: Random) -> None:
        method = random.choice(OFTEN)
        repeated = random.choice((0, 1, 1, 3)) if method.client_streaming else random.choices((0, 1, 2), (1, 20, 1))[0]
        check_call(channel, method, [wire(random, request(random, method)) for _ in range(repeated)])

    campaign.run(check)
