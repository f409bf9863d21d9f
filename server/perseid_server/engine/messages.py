"""What crosses between the API process and the engine process. Frozen dataclasses of plain values only.

The codec (msgpack over a Unix socket) lives in `perseid_server.ipc`; nothing here needs more than the standard
library, so that the engine runs without the API's packages.
"""

from dataclasses import dataclass, field
from typing import Literal

from perseid_server.model.sampling_params import SamplingParams, TokenLogprobs
from perseid_server.model.spec import BaseSpec

FinishReason = Literal["stop", "length", "error"]


# --- API process → engine ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    """One sequence to generate. `adapter` is a version (content hash) registered before, or None for the base."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: str | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop a sequence and free all it holds before the next step. Unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RegisterAdapter:
    """Make a version known to the engine. `path` is a folder in the adapter store, already checked."""

    version: str
    path: str
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class PinAdapter:
    """Keep a version on the device whether used or not (or stop doing so)."""

    version: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class ForgetAdapter:
    """No new sequence will name this version. It leaves memory when the last one that uses it has ended."""

    version: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the engine process."""


ToEngine = Submit | Abort | RegisterAdapter | PinAdapter | ForgetAdapter | Shutdown


# --- engine → API process ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one step brought one sequence. Concatenate `token_ids` over a sequence's outputs to get its answer."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # once, with the first token; [0] is None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the end or stop token that finished it; not part of token_ids
    error: str | None = None  # with finish_reason "error"
    cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    queue_s: float | None = None  # with the first output: seconds from arrival in the engine to first scheduling
    prefill_s: float | None = None  # with the first output: seconds from first scheduling to the first token


@dataclass(frozen=True, slots=True)
class AdapterState:
    """Where a registered version lives now."""

    version: str
    location: Literal["disk", "host", "device"]
    error: str | None = None  # why it cannot be loaded; sequences that wanted it have ended with it


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges as they are now; counters since the engine started (the API process turns them into increments)."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0  # tokens
    prefix_cache_hits: int = 0  # tokens
    adapter_pages_used: int = 0
    adapter_pages_total: int = 0
    adapter_lookups: int = 0  # admissions that named an adapter
    adapter_hits: int = 0  # ... whose adapter was on the device already
    running_adapters: tuple[str, ...] = ()  # versions
    waiting_adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """All that one step produced, in one message. `iteration_tokens` counts the rows of its forward pass."""

    outputs: tuple[SequenceOutput, ...] = ()
    stats: EngineStats = field(default_factory=EngineStats)
    adapters: tuple[AdapterState, ...] = ()  # those whose location changed since the last message
    iteration_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The first message of an engine process: what it serves."""

    spec: BaseSpec
    weight_bytes: int  # packed weights as they lie in memory, embeddings and norms included
    max_model_len: int  # tokens, prompt + completion, after fitting to the KV memory
    adapter_pages_total: int
    device: str


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine could not start: `error` is for the operator."""

    error: str


FromEngine = StepOutputs | EngineReady | EngineFailed
