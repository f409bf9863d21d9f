"""What an engine has at hand, for an operator who looks (`GET /debug/state`). Frozen dataclasses of plain values."""

from dataclasses import dataclass
from typing import Literal

from perseid_server.adapters.state import Resident

Stage = Literal["prefill", "decode", "turn", "adapters", "kv_blocks"]
"""The first two run; the others wait: for their turn, for what adapts the base to come to the device, for KV blocks."""


@dataclass(frozen=True, slots=True)
class SequenceState:
    """One sequence, without anything of what it says."""

    request_id: str
    tenant: str
    stage: Stage
    versions: tuple[str, ...]  # what it needs on the device
    prompt_tokens: int
    computed_tokens: int  # whose K and V are there
    generated_tokens: int
    kv_blocks: int
    age_s: float  # since it arrived in the engine


@dataclass(frozen=True, slots=True)
class EngineState:
    """Between two steps. Lists are cut to what was asked for; numbers are of all."""

    num_running: int
    num_waiting: int
    sequences: tuple[SequenceState, ...]  # running ones, then waiting ones in the order in which they are to start
    num_residents: tuple[tuple[str, int], ...]  # by location
    num_pinned: int
    num_loading: int
    residents: tuple[Resident, ...]  # what is loading, on the device, in host memory, on disk, in that order
    pages_used: int
    pages_total: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_cached: int  # nobody holds them, and they can be found by their content
    kv_block_tokens: int
