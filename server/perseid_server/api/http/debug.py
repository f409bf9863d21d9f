"""GET /debug/state: what the server has at hand, for an operator who wonders.

The engine answers between two steps. While it hangs, starts or restarts nobody waits for it: the answer comes within
`ENGINE_TIMEOUT_S` with what the API process knows, and says so.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from fastapi import APIRouter

from perseid_server import __version__
from perseid_server.api.http import debug_schemas as schemas
from perseid_server.api.status import ServerStatus
from perseid_server.engine.state import EngineState, SequenceState
from perseid_server.frontend.admission import Admission
from perseid_server.frontend.registry import AdapterRegistry
from perseid_server.frontend.service import GenerationService
from perseid_server.observe.calls import Calls
from perseid_server.observe.line import shortened
from perseid_server.observe.record import CallRecord

ENGINE_TIMEOUT_S = 1.0
MOST_SHOWN = 100
"""Calls, sequences and adapters, each."""
_MOST_ANSWERS = 8


class DescribedEngine(Protocol):
    """What is asked of the engine: `ipc.engine_client.EngineProcess`, or a fake."""

    @property
    def status(self) -> str: ...

    @property
    def pid(self) -> int | None: ...

    @property
    def trouble(self) -> str: ...

    @property
    def num_restarts(self) -> int: ...

    def step_age_s(self) -> float | None: ...

    async def describe(self, limit: int, timeout_s: float) -> EngineState | None: ...


@dataclass(frozen=True, slots=True)
class DebugSources:
    """Where the state is found."""

    engine: DescribedEngine
    registry: AdapterRegistry
    service: GenerationService
    admission: Admission
    status: ServerStatus
    calls: Calls


class DebugRoutes:
    """/debug/state. It names everybody's adapters and keys: for the operator only."""

    def __init__(self, sources: DebugSources) -> None:
        self._sources = sources
        self._started = time.monotonic()
        self.router = APIRouter()
        self.router.add_api_route("/debug/state", self.state, methods=["GET"], response_model=schemas.DebugState)

    async def state(self) -> schemas.DebugState:
        """Requests, residency, KV use. At most 100 of each are listed."""
        sources = self._sources
        found = await sources.engine.describe(MOST_SHOWN, ENGINE_TIMEOUT_S)
        names = sources.registry.names()
        return schemas.DebugState(
            status=sources.status.describe(),
            version=__version__,
            uptime_s=time.monotonic() - self._started,
            draining=sources.service.draining.has_begun,
            engine=_engine(sources.engine, answered=found is not None),
            queue=_queue(sources.admission),
            calls=_calls(sources.calls),
            sequences=_sequences(found, names, sources.calls) if found is not None else None,
            adapters=_adapters(found, names) if found is not None else None,
            kv=_kv(found) if found is not None else None,
        )


def _engine(engine: DescribedEngine, *, answered: bool) -> schemas.EngineInfo:
    return schemas.EngineInfo(
        status=engine.status,
        trouble=engine.trouble or None,
        restarts=engine.num_restarts,
        pid=engine.pid,
        step_age_s=engine.step_age_s(),
        answered=answered,
    )


def _queue(admission: Admission) -> schemas.QueueInfo:
    return schemas.QueueInfo(
        requests=admission.in_progress,
        max_requests=admission.limits.max_requests,
        tokens=admission.tokens_in_progress,
        max_tokens=admission.limits.max_tokens,
    )


def _calls(calls: Calls) -> schemas.Calls:
    found = [call for call in calls.open_calls if not call.is_probe]
    return schemas.Calls(total=len(found), shown=[_call(call) for call in found[:MOST_SHOWN]])


def _call(call: CallRecord) -> schemas.CallInfo:
    first = call.generations[0] if call.generations else None
    return schemas.CallInfo(
        request_id=call.request_id,
        transport=call.transport,
        route=shortened(call.route),
        tenant=call.tenant,
        key=call.key,
        model=shortened(first.model) if first else call.subject and shortened(call.subject),
        adapter=first.adapter and shortened(first.adapter) if first else None,
        answers=[one.id for one in islice(call.generations, _MOST_ANSWERS)],
        prompt_tokens=call.prompt_tokens,
        generated_tokens=call.generated_tokens,
        age_s=call.duration_s,
    )


def _sequences(found: EngineState, names: Mapping[str, str], calls: Calls) -> schemas.Sequences:
    call_of = {answer.sequence: call.request_id for call in calls.open_calls for answer in call.answers}
    shown = [_sequence(one, names, call_of) for one in found.sequences]
    return schemas.Sequences(running=found.num_running, waiting=found.num_waiting, shown=shown)


def _sequence(one: SequenceState, names: Mapping[str, str], call_of: Mapping[str, str]) -> schemas.SequenceInfo:
    return schemas.SequenceInfo(
        id=one.request_id,
        request_id=call_of.get(one.request_id),
        tenant=one.tenant,
        stage=one.stage,
        adapters=[schemas.AdapterName(name=names.get(version), version=version) for version in one.versions],
        prompt_tokens=one.prompt_tokens,
        computed_tokens=one.computed_tokens,
        generated_tokens=one.generated_tokens,
        kv_blocks=one.kv_blocks,
        age_s=one.age_s,
    )


def _adapters(found: EngineState, names: Mapping[str, str]) -> schemas.Adapters:
    count = dict(found.num_residents)
    return schemas.Adapters(
        on_device=count.get("device", 0),
        in_host_memory=count.get("host", 0),
        on_disk=count.get("disk", 0),
        pinned=found.num_pinned,
        loading=found.num_loading,
        pages_used=found.pages_used,
        pages_free=found.pages_total - found.pages_used,
        shown=[
            schemas.ResidentInfo(
                name=names.get(one.version),
                version=one.version,
                kind=one.kind,
                location=one.location,
                pages=one.pages,
                users=one.users,
                pinned=one.is_pinned,
                loading=one.is_loading,
                error=one.error and shortened(one.error),
            )
            for one in found.residents
        ],
    )


def _kv(found: EngineState) -> schemas.KvInfo:
    return schemas.KvInfo(
        blocks=found.kv_blocks_total,
        used=found.kv_blocks_used,
        free=found.kv_blocks_total - found.kv_blocks_used,
        cached=found.kv_blocks_cached,
        block_tokens=found.kv_block_tokens,
    )
