"""vLLM's routes for loading and unloading adapters, which take gate sets and Medusa heads too; OpenAI's list of models,
and a list of heads, which are no models."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from perseid_server.adapters.names import MAX_LENGTH
from perseid_server.api.http.answer_schemas import Card, Cards
from perseid_server.api.http.document import answers, errors
from perseid_server.api.http.errors import model_not_found
from perseid_server.api.http.schemas import LoadAdapterBody, UnloadAdapterBody
from perseid_server.errors import NotFound, PerseidError
from perseid_server.frontend.gate_sets import columns_of
from perseid_server.frontend.heads import whom
from perseid_server.frontend.loaded import Loaded, LoadedAdapter, LoadedGateSet, LoadedHeads
from perseid_server.frontend.registry import AdapterRegistry
from perseid_server.frontend.service import GenerationService

_OWNER = "perseid"
_AUTO = "auto:"
_FIELDS = {"name": "lora_name", "source": "lora_path"}


class AdapterRoutes:
    """/v1/models, /v1/medusa_heads, /v1/load_lora_adapter, /v1/unload_lora_adapter."""

    def __init__(self, registry: AdapterRegistry, service: GenerationService, base: str, root: str) -> None:
        self._registry = registry
        self._service = service
        self._base = base
        self._root = root
        self._created = 0
        self.router = APIRouter()
        add = self.router.add_api_route
        cards, card = answers(Cards), answers(Card, 404)
        add("/v1/models", self.models, methods=["GET"], response_model=None, responses=cards)
        add("/v1/models/{model:path}", self.model, methods=["GET"], response_model=None, responses=card)
        add("/v1/medusa_heads", self.all_heads, methods=["GET"], response_model=None, responses=cards)
        add("/v1/medusa_heads/{name:path}", self.heads, methods=["GET"], response_model=None, responses=card)
        text, load, unload = PlainTextResponse, errors(404, 409, 503), errors(404, 503)
        add("/v1/load_lora_adapter", self.load, methods=["POST"], response_class=text, responses=load)
        add("/v1/unload_lora_adapter", self.unload, methods=["POST"], response_class=text, responses=unload)

    async def models(self) -> dict[str, Any]:
        """The base first, then adapters and gate sets in the order they were loaded, then what `auto` alone means."""
        listed = (loaded for loaded in self._registry.list() if not isinstance(loaded, LoadedHeads))
        cards = [self._base_card(), *(self._card(loaded) for loaded in listed)]
        meant = self._service.gate_sets.meant_by_auto()
        if meant is not None:
            cards.append(self._gate_set_card(meant, "auto"))
        return {"object": "list", "data": cards}

    async def model(self, model: str) -> dict[str, Any]:
        """One model, as a request would name it."""
        if model == self._base:
            return self._base_card()
        if model == "auto" and (meant := self._service.gate_sets.meant_by_auto()) is not None:
            return self._gate_set_card(meant, "auto")
        loaded = self._registry.find(model.removeprefix(_AUTO))
        wanted = LoadedGateSet if model.startswith(_AUTO) else LoadedAdapter
        if not isinstance(loaded, wanted):
            raise model_not_found(model)
        return self._card(loaded)

    async def all_heads(self) -> dict[str, Any]:
        """Medusa heads in the order they were loaded. Of several that fit a request, those loaded last draft."""
        return {"object": "list", "data": [self._heads_card(heads) for heads in self._registry.heads()]}

    async def heads(self, name: str) -> dict[str, Any]:
        """One set of heads."""
        loaded = self._registry.find(name)
        if not isinstance(loaded, LoadedHeads):
            raise NotFound(f"no Medusa heads {name[:MAX_LENGTH]!r} are loaded", field="name")
        return self._heads_card(loaded)

    async def load(self, body: LoadAdapterBody) -> Response:
        """Load an adapter, a gate set or heads; `load_inplace` replaces what has that name."""
        with _named_as_here():
            await self._registry.load(
                body.lora_name, body.lora_path, replace=body.load_inplace, pin=body.pin, adapter=body.adapter
            )
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, body: UnloadAdapterBody) -> Response:
        """Unload an adapter, a gate set or heads."""
        with _named_as_here():
            await self._registry.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _base_card(self) -> dict[str, Any]:
        return {"id": self._base, "created": self._created, "root": self._root, "parent": None} | self._common()

    def _common(self) -> dict[str, Any]:
        return {"object": "model", "owned_by": _OWNER, "max_model_len": self._service.max_model_len}

    def _card(self, loaded: LoadedAdapter | LoadedGateSet) -> dict[str, Any]:
        if isinstance(loaded, LoadedGateSet):
            return self._gate_set_card(loaded, f"{_AUTO}{loaded.name}")
        told = {"rank": loaded.info.rank, "targets": list(loaded.info.targets)}
        return self._loaded_card(loaded, loaded.name, told)

    def _gate_set_card(self, gate_set: LoadedGateSet, model: str) -> dict[str, Any]:
        config = gate_set.config
        told = {
            "name": gate_set.name,
            "adapters": [asdict(column) for column in columns_of(gate_set, self._registry)],
            "null": config.null,
            "method": config.method,
            "k": config.k,
            "temperature": config.temperature,
            "request_router": gate_set.router is not None,
        }
        return self._loaded_card(gate_set, model, told)

    def _heads_card(self, heads: LoadedHeads) -> dict[str, Any]:
        info, state = heads.info, self._registry.state(heads)
        told = {
            "for": asdict(whom(heads, self._registry)),
            "num_heads": info.num_heads,
            "num_layers": info.num_layers,
            "layout": info.layout,
            "shares_lm_head": info.shares_lm_head,
            "num_draft_tokens": info.num_draft_tokens,
            "accuracy": [list(of_head) for of_head in info.accuracy],
            "accuracy_measured": info.has_accuracy,
            "location": state.location if state else "disk",
        }
        return self._loaded_card(heads, heads.name, told) | {"object": "medusa_heads"}

    def _loaded_card(self, loaded: Loaded, model: str, told: dict[str, Any]) -> dict[str, Any]:
        state = self._registry.state(loaded)
        perseid = {
            "version": loaded.version,
            "kind": loaded.info.kind,
            **told,
            "pinned": loaded.entry.pinned,
            "warnings": list(loaded.info.warnings),
            "error": state.error if state else None,
        }
        card = {"id": model, "created": int(loaded.entry.loaded_at), "root": loaded.entry.source, "parent": self._base}
        return card | self._common() | {"perseid": perseid}


@contextmanager
def _named_as_here() -> Iterator[None]:
    """Errors name the fields as gRPC has them; vLLM's have other names."""
    try:
        yield
    except PerseidError as error:
        field = error.field or ""
        if field in _FIELDS:
            error.field = _FIELDS[field]
            if error.message.startswith(field):
                error.message = error.field + error.message.removeprefix(field)
        raise
