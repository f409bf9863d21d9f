"""Clients of both transports that take nothing on trust: an answer is whole, or says once that there is none."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import grpc
import httpx
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs

TIMEOUT_S = 120
"""An answer that takes longer hangs."""

Kind = Literal["complete", "unavailable", "refused"]


@dataclass(frozen=True)
class Ask:
    """One greedy request."""

    transport: Literal["http", "grpc"]
    stream: bool
    model: str
    prompt: str
    max_tokens: int

    @property
    def question(self) -> tuple[str, str, int]:
        """What decides the answer."""
        return self.model, self.prompt, self.max_tokens


@dataclass(frozen=True)
class Answer:
    """What a client got. `text`: also of a stream that broke."""

    kind: Kind
    text: str = ""
    tokens: tuple[int, ...] = ()  # gRPC tells them
    retry_after_s: float | None = None
    message: str = ""


class Clients:
    """An HTTP client and a gRPC channel to one server."""

    def __init__(self, http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
        self.http = http
        self._stub = stubs.GenerationStub(channel)

    async def ask(self, ask: Ask) -> Answer:
        """The one answer. AssertionError for anything else: another status, two ends, none, or text after the end."""
        if ask.transport == "grpc":
            return await self._grpc(ask)
        body = {"model": ask.model, "prompt": ask.prompt, "max_tokens": ask.max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": ask.stream}
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 200 and ask.stream:
                return _of_events([line async for line in response.aiter_lines() if line])
            told = json.loads(await response.aread())
        if response.status_code == 200:
            choice = told["choices"][0]
            assert choice["finish_reason"] == "length", choice
            return Answer("complete", choice["text"])
        kind = {503: "unavailable", 429: "refused"}.get(response.status_code)
        assert kind is not None, (response.status_code, told)
        return Answer(kind, "", (), float(response.headers["Retry-After"]), told["error"]["message"])

    async def _grpc(self, ask: Ask) -> Answer:
        message = pb.GenerateRequest(
            prompt=ask.prompt,
            sampling=pb.SamplingParams(max_tokens=ask.max_tokens, temperature=0.0, ignore_eos=True),
        )
        if ask.model == "auto":
            message.auto.SetInParent()
        else:
            message.adapter = ask.model
        text, tokens, num_ends = "", (), 0
        try:
            if ask.stream:
                async for chunk in self._stub.GenerateStream(message, timeout=TIMEOUT_S):
                    assert num_ends == 0, "a chunk after the end"
                    text, tokens = text + chunk.text, (*tokens, *chunk.token_ids)
                    num_ends += chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED
            else:
                choice = (await self._stub.Generate(message, timeout=TIMEOUT_S)).choices[0]
                text, tokens, num_ends = choice.text, tuple(choice.token_ids), 1
        except grpc.aio.AioRpcError as error:
            return _of_status(error, text, tokens)
        assert num_ends == 1, "a stream that ends well has one end"
        return Answer("complete", text, tokens)


def _of_events(lines: list[str]) -> Answer:
    assert lines[-1:] == ["data: [DONE]"], f"a stream without an end: {lines[-2:]}"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    errors = [event["error"] for event in events if "error" in event]
    choices = [choice for event in events for choice in event.get("choices", ())]
    text = "".join(choice["text"] for choice in choices)
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    if errors:
        assert (len(errors), ends, "error" in events[-1]) == (1, [], True), events
        assert errors[0]["type"] == "service_unavailable_error", errors
        return Answer("unavailable", text, message=errors[0]["message"])
    assert ends == ["length"], ends
    assert choices[-1]["finish_reason"], "text after the end"
    return Answer("complete", text)


def _of_status(error: grpc.aio.AioRpcError, text: str, tokens: tuple[int, ...]) -> Answer:
    codes = {grpc.StatusCode.UNAVAILABLE: "unavailable", grpc.StatusCode.RESOURCE_EXHAUSTED: "refused"}
    kind = codes.get(error.code())
    assert kind is not None, (error.code(), error.details())
    status = rpc_status.from_call(error)
    assert status is not None, f"a status without details: {error.details()}"
    for detail in status.details:
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            return Answer(kind, text, tokens, retry.retry_delay.ToMilliseconds() / 1000, status.message)
    raise AssertionError(f"no time to come again: {status}")


@asynccontextmanager
async def clients_of(http: str, grpc_address: str) -> AsyncIterator[Clients]:
    """Clients with as many connections as are asked for."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with (
        httpx.AsyncClient(base_url=http, timeout=TIMEOUT_S, limits=limits) as client,
        grpc.aio.insecure_channel(grpc_address) as channel,
    ):
        yield Clients(client, channel)
