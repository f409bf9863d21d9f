"""What crosses between the API process and the engine process. Frozen dataclasses of plain values only.

The codec (msgpack over a Unix socket) lives in `perseid_server.ipc`; nothing here needs more than the standard
library, so that the engine runs without the API's packages.
"""

from dataclasses import dataclass, field
from typing import Literal

from perseid_server.engine.adaptation import BASE, Adaptation
from perseid_server.engine.state import EngineState
from perseid_server.model.sampling_params import SamplingParams, TokenLogprobs
from perseid_server.model.spec import BaseSpec
from perseid_server.speculation.options import OFF, Speculation

FinishReason = Literal["stop", "length", "error"]
ErrorKind = Literal["failed", "unavailable", "deadline"]  # unavailable: the same request may do better later


# --- API process → engine ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    """One sequence to generate. The versions that `adaptation` names were registered before."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adaptation: Adaptation = BASE
    priority: int = 0
    report_routing: bool = False  # tell what the gates chose
    speculation: Speculation = OFF
    deadline: float | None = None  # on the machine's monotonic clock, s: the sequence ends with an error after it
    tenant: str = ""  # whose fair share it runs on
    weight: float = 1.0  # of the tenant's share
    cache_salt: str = ""  # KV blocks are shared only among equal salts


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
class RegisterGateSet:
    """Make a gate set known to the engine. Its columns are `adapters`, then the base if `null`.

    `path` is a folder in the store, already checked, with the gates of the first adapters (and of the null column);
    adapters beyond those it names, and all of them without a path, get training-free gates, computed when the set is
    loaded. Registering a version again changes nothing but the pin.
    """

    version: str
    path: str | None
    adapters: tuple[str, ...]  # versions
    null: bool
    pinned: bool = False  # load it at once, not when it is first needed


@dataclass(frozen=True, slots=True)
class ForgetGateSet:
    """No new sequence will name this gate set. It leaves memory when the last one that uses it has ended."""

    version: str


@dataclass(frozen=True, slots=True)
class RegisterHeads:
    """Make Medusa heads known to the engine, which loads them at once. `path` is a folder in the store, already
    checked. Registering a version again changes nothing."""

    version: str
    path: str


@dataclass(frozen=True, slots=True)
class ForgetHeads:
    """These heads draft no more, also for requests that run. What the requests say does not depend on it."""

    version: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the engine process."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Go round the loop once, so that its pulse shows that it can."""


@dataclass(frozen=True, slots=True)
class DescribeState:
    """Answer with an `EngineState` before the next step."""

    limit: int  # of its lists


ToEngine = (
    Submit
    | Abort
    | RegisterAdapter
    | PinAdapter
    | ForgetAdapter
    | RegisterGateSet
    | ForgetGateSet
    | RegisterHeads
    | ForgetHeads
    | Shutdown
    | Ping
    | DescribeState
)


# --- engine → API process ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """What the gates chose, as shares per column: Σ of w over all gates of a forward pass ÷ gates."""

    prompt: tuple[float, ...] | None = None  # mean over the prompt's tokens that were computed; with the first output
    tokens: tuple[tuple[float, ...], ...] = ()  # for each of token_ids: of the row it was sampled from


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
    error_kind: ErrorKind = "failed"  # with an error
    cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    queue_s: float | None = None  # with the first output: seconds from arrival in the engine to first scheduling
    prefill_s: float | None = None  # with the first output: seconds from first scheduling to the first token
    load_s: float | None = None  # with the first output: of queue_s, while its adapters were not on the device
    routing: RoutingReport | None = None  # when asked for
    drafted_tokens: int = 0  # drafts that this step checked
    accepted_tokens: int = 0  # of token_ids, those that had been drafted


@dataclass(frozen=True, slots=True)
class AdapterState:
    """Where a registered version lives now."""

    version: str
    location: Literal["disk", "host", "device"]
    error: str | None = None  # why it cannot be loaded; sequences that wanted it have ended with it


BLENDED, ROUTED = "blend", "auto"
"""Stand for blends and for gates where figures are told by adapter; versions are content hashes."""


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Counters of the decode steps of sequences that ask for drafts, since the engine started."""

    adapter: str  # version, "" the base, BLENDED or ROUTED
    steps: int = 0  # sequences × steps, with drafts or without
    tokens: int = 0  # what they brought
    drafted: int = 0
    accepted: int = 0
    seconds_saved: float = 0.0  # estimated: what the accepted tokens would have cost, less what drafting did


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
    routed_tokens: tuple[
        tuple[str, float], ...
    ] = ()  # by adapter version, "" the base: Σ over routed rows of its share
    gate_entropy: float = 0.0  # Σ over routed rows of the mean entropy of their gates, nats
    speculation: tuple[SpeculationStats, ...] = ()  # of what the last step counted
    draft_budget: int = 0  # rows that the last step had for drafts


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
    kv_tokens: int = 0  # what the KV cache holds; 0: not told


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine could not start: `error` is for the operator."""

    error: str


FromEngine = StepOutputs | EngineReady | EngineFailed | EngineState
