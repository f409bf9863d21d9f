"""Who may call which method. The key is looked at before the message is read."""

from collections.abc import Mapping
from typing import Any

import grpc

from perseid_server.access.caller import call_as
from perseid_server.access.gate import Gate, Need, secret_of
from perseid_server.api.grpc.errors import abort
from perseid_server.api.grpc.handlers import Continuation, Found, Handler, service_of
from perseid_server.errors import PerseidError
from perseid_server.observe.record import current_call

_NEEDS: Mapping[str, Need] = {
    "perseid.v1.Generation": "generate",
    "perseid.v1.AdapterAdmin": "admin",
    "grpc.health.v1.Health": "open",
    "grpc.reflection.v1alpha.ServerReflection": "any",
}


def need_of(method: str) -> Need:
    """What `/package.Service/Method` needs; what is not listed is the operator's."""
    return _NEEDS.get(service_of(method), "operator")


class Access(grpc.aio.ServerInterceptor):
    """Finds out who calls. Every call has a task of its own, interceptors and all, which runs for the caller to its
    end."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Found:
        """grpc.aio."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method
            return handler
        secret = secret_of(*(_values(handler_call_details, name) for name in ("authorization", "x-api-key")))
        try:
            call_as(self._gate.enter(secret, need_of(handler_call_details.method), current_call().recognised))
        except PerseidError as error:
            return _refusing(handler, error)
        return handler


def _values(details: grpc.HandlerCallDetails, name: str) -> list[str]:
    metadata = details.invocation_metadata or ()
    return [value for told, value in metadata if told == name and isinstance(value, str)]


def _refusing(handler: Handler, error: PerseidError) -> Handler:
    """A handler that ends every call. It takes a stream of messages, whatever the method has, and so none is read."""

    async def refuse(_: Any, context: Any) -> None:
        await abort(context, error)

    streaming = handler.response_streaming
    make = grpc.stream_stream_rpc_method_handler if streaming else grpc.stream_unary_rpc_method_handler
    refusing: Handler = make(refuse)
    return refusing
