"""perseid.v1.AdapterAdmin."""

import functools
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, TypeVar

from perseid_protos.perseid.v1 import adapter_admin_pb2 as pb
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc
from perseid_server.api.grpc.errors import abort
from perseid_server.api.grpc.handlers import Context
from perseid_server.frontend.gate_sets import columns_of
from perseid_server.frontend.heads import whom
from perseid_server.frontend.loaded import Loaded, LoadedAdapter, LoadedGateSet, LoadedHeads
from perseid_server.frontend.registry import AdapterRegistry

Request = TypeVar("Request")
Response = TypeVar("Response")
Method = Callable[[Any, Request, Context], Awaitable[Response]]

_LOCATION = {"disk": pb.LOCATION_DISK, "host": pb.LOCATION_HOST, "device": pb.LOCATION_DEVICE}


def _mapped(handler: Method[Request, Response]) -> Method[Request, Response]:
    """Errors become statuses."""

    @functools.wraps(handler)
    async def wrapped(self: Any, request: Request, context: Context) -> Response:
        try:
            return await handler(self, request, context)
        except Exception as error:
            await abort(context, error)
            raise

    return wrapped


class AdapterAdminServicer(adapter_admin_pb2_grpc.AdapterAdminServicer):
    """Load, unload, get, list, pin."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry

    @_mapped
    async def LoadAdapter(self, request: pb.LoadAdapterRequest, _: Context) -> pb.LoadAdapterResponse:  # noqa: N802
        """Check, store and serve an adapter, a gate set or heads."""
        loaded = await self._registry.load(
            request.name,
            request.source,
            replace=request.replace,
            pin=request.pin,
            adapter=request.adapter or None,
        )
        return pb.LoadAdapterResponse(adapter=self._describe(loaded))

    @_mapped
    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, _: Context) -> pb.UnloadAdapterResponse:  # noqa: N802
        """Take a name away."""
        await self._registry.unload(request.name)
        return pb.UnloadAdapterResponse()

    @_mapped
    async def GetAdapter(self, request: pb.GetAdapterRequest, _: Context) -> pb.GetAdapterResponse:  # noqa: N802
        """Describe one adapter."""
        return pb.GetAdapterResponse(adapter=self._describe(self._registry.get(request.name)))

    @_mapped
    async def ListAdapters(self, _: pb.ListAdaptersRequest, __: Context) -> pb.ListAdaptersResponse:  # noqa: N802
        """Describe all adapters, gate sets and heads."""
        return pb.ListAdaptersResponse(adapters=[self._describe(loaded) for loaded in self._registry.list()])

    @_mapped
    async def PinAdapter(self, request: pb.PinAdapterRequest, _: Context) -> pb.PinAdapterResponse:  # noqa: N802
        """Keep an adapter on the device, or let it go."""
        loaded = await self._registry.pin(request.name, pinned=request.pinned)
        return pb.PinAdapterResponse(adapter=self._describe(loaded))

    def _describe(self, loaded: Loaded) -> pb.Adapter:
        state = self._registry.state(loaded)
        info = loaded.info
        told = pb.Adapter(
            name=loaded.name,
            version=loaded.version,
            source=loaded.entry.source,
            kind=info.kind,
            num_parameters=info.num_parameters,
            size_bytes=info.nbytes,
            location=_LOCATION[state.location] if state else pb.LOCATION_DISK,
            pinned=loaded.entry.pinned,
            loaded_at=loaded.entry.loaded_at,
            trained_on=info.trained_on or "",
            warnings=info.warnings,
            error=(state.error if state else None) or "",
        )
        match loaded:
            case LoadedAdapter(info=lora):
                told.rank, told.num_layers = lora.rank, len(lora.layers)
                told.targets.extend(lora.targets)
            case LoadedGateSet(info=gates):
                told.num_layers = gates.num_layers
                told.targets.extend(gates.targets)
                told.gate_set.CopyFrom(self._gate_set(loaded))
            case LoadedHeads(info=heads):
                told.num_layers = heads.num_layers
                told.heads.CopyFrom(self._heads(loaded))
        return told

    def _heads(self, heads: LoadedHeads) -> pb.Heads:
        served, info = whom(heads, self._registry), heads.info
        return pb.Heads(
            adapter=served.adapter or "",
            adapter_version=served.version or "",
            in_use=served.in_use,
            num_heads=info.num_heads,
            layout=info.layout,
            shares_lm_head=info.shares_lm_head,
            num_draft_tokens=info.num_draft_tokens,
            accuracy=[pb.HeadAccuracy(candidates=of_head) for of_head in info.accuracy],
            accuracy_measured=info.has_accuracy,
        )

    def _gate_set(self, gate_set: LoadedGateSet) -> pb.GateSet:
        config = gate_set.config
        return pb.GateSet(
            columns=[pb.GateColumn(**asdict(column)) for column in columns_of(gate_set, self._registry)],
            null=config.null,
            method=config.method,
            k=config.k,
            temperature=config.temperature,
            has_request_router=gate_set.router is not None,
        )
