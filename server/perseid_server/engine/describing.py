"""From the engine's own structures to what an operator is told of them."""

import time
from collections import Counter
from itertools import chain, islice

from perseid_server.adapters.state import Resident
from perseid_server.engine.kv_blocks import BlockAllocator
from perseid_server.engine.ports import Residency
from perseid_server.engine.scheduler import Scheduler
from perseid_server.engine.sequence import Sequence
from perseid_server.engine.state import EngineState, SequenceState, Stage

_NEAREST = ("device", "host", "disk")


def describe(scheduler: Scheduler, residency: Residency, blocks: BlockAllocator, limit: int) -> EngineState:
    """The state now, with lists of at most `limit`."""
    residents = list(residency.residents())
    stats = residency.stats()
    shown = islice(chain(scheduler.running, scheduler.waiting.in_order()), limit)
    return EngineState(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        sequences=tuple(_of(sequence, scheduler, residency) for sequence in shown),
        num_residents=tuple(Counter(one.location for one in residents).items()),
        num_pinned=sum(one.is_pinned for one in residents),
        num_loading=sum(one.is_loading for one in residents),
        residents=tuple(sorted(residents, key=_interest)[:limit]),
        pages_used=stats.pages_used,
        pages_total=stats.pages_total,
        kv_blocks_total=blocks.num_blocks,
        kv_blocks_used=blocks.num_blocks - blocks.num_free,
        kv_blocks_cached=blocks.num_cached,
        kv_block_tokens=blocks.block_size,
    )


def _interest(resident: Resident) -> tuple[bool, int, str]:
    return not resident.is_loading, _NEAREST.index(resident.location), resident.version


def _of(sequence: Sequence, scheduler: Scheduler, residency: Residency) -> SequenceState:
    return SequenceState(
        request_id=sequence.id,
        tenant=sequence.request.tenant,
        stage=_stage(sequence, scheduler, residency),
        versions=sequence.adaptation.versions,
        prompt_tokens=sequence.num_prompt,
        computed_tokens=sequence.num_computed,
        generated_tokens=sequence.num_output,
        kv_blocks=len(sequence.blocks),
        age_s=time.perf_counter() - sequence.arrived_at,
    )


def _stage(sequence: Sequence, scheduler: Scheduler, residency: Residency) -> Stage:
    if sequence not in scheduler.waiting:
        return "decode" if sequence.num_to_compute == 1 else "prefill"
    if any(residency.location(version) != "device" for version in sequence.adaptation.versions):
        return "adapters"
    return "kv_blocks" if sequence.was_preempted or sequence.unfit_since is not None else "turn"
