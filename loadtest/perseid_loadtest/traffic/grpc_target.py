"""Perseid over gRPC: perseid.v1.Generation and AdapterAdmin."""

import asyncio
import os
from collections.abc import Sequence

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from perseid_loadtest.traffic.plan import Request
from perseid_loadtest.traffic.target import CLIENT, OWN_LIMITS, Answer, Failed
from perseid_loadtest.traffic.tls import HINT, Pem
from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs
from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs
from perseid_server.errors import PerseidError

OPEN_TIMEOUT_S = 10.0
ADMIN_TIMEOUT_S = 120.0
DIRECT = (("grpc.enable_http_proxy", 0),)
"""No proxy of the environment, as over HTTP: it would be measured instead of the server."""
_NOT_ADAPTERS = {"gates", "heads"}


class GrpcTarget:
    """GenerateStream, or Generate where answers are not to be streamed. Plain where `tls` is None."""

    stops_at_eos = False

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        stream: bool = True,
        tls: Pem | None = None,
    ) -> None:
        self.address = address
        self.streams = stream
        self._metadata = [("authorization", f"Bearer {api_key}")] if api_key is not None else []
        self._credentials = grpc.ssl_channel_credentials(*tls) if tls is not None else None
        self._channel: grpc.aio.Channel | None = None
        self._names: tuple[str, ...] = ()

    @property
    def names(self) -> Sequence[str] | None:
        """Adapters that the server lists; None where there are none, or it does not let us ask."""
        return self._names or None

    async def open(self) -> None:
        """Connect and list the adapters. PerseidError when nothing answers."""
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        if self._credentials is not None:
            self._channel = grpc.aio.secure_channel(self.address, self._credentials, DIRECT)
        else:
            self._channel = grpc.aio.insecure_channel(self.address, DIRECT)
        self._generation = stubs.GenerationStub(self._channel)
        self._admin = admin_stubs.AdapterAdminStub(self._channel)
        try:
            listing = self._admin.ListAdapters(
                admin.ListAdaptersRequest(), timeout=OPEN_TIMEOUT_S, metadata=self._metadata
            )
            told = await listing
        except grpc.aio.AioRpcError as error:
            self._refuse_absent(error)
        else:
            self._names = tuple(each.name for each in told.adapters if each.kind not in _NOT_ADAPTERS)

    def _refuse_absent(self, error: grpc.aio.AioRpcError) -> None:
        """A server that answers, but not this, may still generate: a key without the right to list adapters."""
        if error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
            hint = f"is a gRPC server running there?{HINT if self._credentials is not None else ''}"
            raise PerseidError(f"{self.address}: {error.details()}; {hint}") from error
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise PerseidError(f"{self.address}: {error.details()}; it wants another --api-key") from error

    async def close(self) -> None:
        """Give the connection back."""
        if self._channel is not None:
            await self._channel.close()

    async def vocabulary(self) -> Sequence[int] | None:
        """This service has no tokenizer."""
        return None

    async def ask(self, request: Request, answer: Answer) -> None:
        """Send it and read what comes. Failed names the status."""
        message = message_of(request)
        try:
            if self.streams:
                await self._read(self._generation.GenerateStream(message, metadata=self._metadata), answer)
            else:
                whole = await self._generation.Generate(message, metadata=self._metadata)
                _count(answer, sum(len(choice.token_ids) for choice in whole.choices), whole.usage)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from error
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            raise Failed("CANCELLED", "the connection was closed") from error  # by the channel, not by the driver

    async def load(self, name: str, source: str, *, replace: bool) -> None:
        """LoadAdapter."""
        message = admin.LoadAdapterRequest(name=name, source=source, replace=replace)
        try:
            await self._admin.LoadAdapter(message, timeout=ADMIN_TIMEOUT_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from error

    async def unload(self, name: str) -> None:
        """UnloadAdapter."""
        message = admin.UnloadAdapterRequest(name=name)
        try:
            await self._admin.UnloadAdapter(message, timeout=ADMIN_TIMEOUT_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from error

    async def _read(
        self, call: "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateChunk]", answer: Answer
    ) -> None:
        is_complete = False
        try:
            while isinstance(chunk := await call.read(), pb.GenerateChunk):  # at the end it is grpc.aio.EOF
                _count(answer, len(chunk.token_ids), chunk.usage)
                is_complete |= chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        finally:
            call.cancel()  # nothing where it has ended
        if not is_complete:
            raise Failed("cut off", "the stream ended without a finish reason")


def message_of(request: Request) -> pb.GenerateRequest:
    """Greedy, going on after an end token."""
    sampling = pb.SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
    if isinstance(request.prompt, str):
        return pb.GenerateRequest(prompt=request.prompt, adapter=request.adapter, sampling=sampling)
    ids = pb.TokenIds(ids=request.prompt)
    return pb.GenerateRequest(token_ids=ids, adapter=request.adapter, sampling=sampling)


def _count(answer: Answer, tokens: int, usage: pb.Usage) -> None:
    if tokens:
        answer.arrivals.append((answer.now(), tokens))
        answer.output_tokens += tokens
    if usage.prompt_tokens:
        answer.prompt_tokens = usage.prompt_tokens


def _failed(error: grpc.aio.AioRpcError) -> Failed:
    details = error.details() or ""
    kind = CLIENT if _is_own_limit(details) else error.code().name
    return Failed(kind, details, _retry_after(error))


def _is_own_limit(details: str) -> bool:
    """The channel tells what the system says in words; a server may say the same of itself, but not that it could not
    connect."""
    return details.startswith("failed to connect") and any(os.strerror(number) in details for number in OWN_LIMITS)


def _retry_after(error: grpc.aio.AioRpcError) -> float | None:
    """google.rpc.RetryInfo of the status, in seconds."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                return _delay(status_pb2.Status.FromString(value))
            except DecodeError:
                return None
    return None


def _delay(status: status_pb2.Status) -> float | None:
    for detail in status.details:
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return None
