"""vLLM's routes for loading and unloading adapters, and OpenAI's list of models."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from perseid_server.api.http.errors import model_not_found
from perseid_server.api.http.schemas import LoadAdapterBody, UnloadAdapterBody
from perseid_server.frontend.loaded import LoadedAdapter
from perseid_server.frontend.registry import AdapterRegistry
from perseid_server.frontend.service import GenerationService

_OWNER = "perseid"


class AdapterRoutes:
    """/v1/models, /v1/load_lora_adapter, /v1/unload_lora_adapter."""

    def __init__(self, registry: AdapterRegistry, service: GenerationService, base: str, root: str) -> None:
        self._registry = registry
        self._service = service
        self._base = base
        self._root = root
        self._created = 0
        self.router = APIRouter()
        add = self.router.add_api_route
        add("/v1/models", self.models, methods=["GET"])
        add("/v1/models/{model:path}", self.model, methods=["GET"])
        add("/v1/load_lora_adapter", self.load, methods=["POST"], response_model=None)
        add("/v1/unload_lora_adapter", self.unload, methods=["POST"], response_model=None)

    async def models(self) -> dict[str, Any]:
        """The base first, then the adapters in the order they were loaded."""
        cards = [self._base_card(), *(self._card(adapter) for adapter in self._registry.list())]
        return {"object": "list", "data": cards}

    async def model(self, model: str) -> dict[str, Any]:
        """One model."""
        if model == self._base:
            return self._base_card()
        adapter = self._registry.find(model)
        if adapter is None:
            raise model_not_found(model)
        return self._card(adapter)

    async def load(self, body: LoadAdapterBody) -> Response:
        """Load an adapter; `load_inplace` replaces one of that name."""
        await self._registry.load(body.lora_name, body.lora_path, replace=body.load_inplace, pin=body.pin)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, body: UnloadAdapterBody) -> Response:
        """Unload an adapter."""
        await self._registry.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _base_card(self) -> dict[str, Any]:
        return {
            "id": self._base,
            "object": "model",
            "created": self._created,
            "owned_by": _OWNER,
            "root": self._root,
            "parent": None,
            "max_model_len": self._service.max_model_len,
        }

    def _card(self, adapter: LoadedAdapter) -> dict[str, Any]:
        state = self._registry.state(adapter)
        return {
            "id": adapter.name,
            "object": "model",
            "created": int(adapter.entry.loaded_at),
            "owned_by": _OWNER,
            "root": adapter.entry.source,
            "parent": self._base,
            "max_model_len": self._service.max_model_len,
            "perseid": {
                "version": adapter.version,
                "kind": adapter.info.kind,
                "rank": adapter.info.rank,
                "targets": list(adapter.info.targets),
                "pinned": adapter.entry.pinned,
                "warnings": list(adapter.info.warnings),
                "error": state.error if state else None,
            },
        }
