"""The JSON of GET /debug/state. Lists are cut; the numbers beside them are of all. Times are in seconds."""

from typing import Literal

from pydantic import BaseModel

Stage = Literal["prefill", "decode", "turn", "adapters", "kv_blocks"]


class EngineInfo(BaseModel):
    """What the API process knows of the engine."""

    status: str
    trouble: str | None  # how the last engine process ended, while there is no other
    restarts: int
    pid: int | None
    step_age_s: float | None  # how long the running step runs already; null between steps
    answered: bool  # without, sequences, adapters and kv are null


class QueueInfo(BaseModel):
    """What is in progress, and how much may be."""

    requests: int
    max_requests: int
    tokens: int
    max_tokens: int


class CallInfo(BaseModel):
    """One call that is open, as the API process sees it."""

    request_id: str
    transport: str
    route: str
    tenant: str
    key: str
    model: str | None
    adapter: str | None
    answers: list[str]  # ids of what it asked for; the engine's sequences begin with them
    prompt_tokens: int
    generated_tokens: int
    age_s: float


class Calls(BaseModel):
    """Open calls, the oldest first."""

    total: int
    shown: list[CallInfo]


class AdapterName(BaseModel):
    """A version and a name that it has; null where no name stands for it any more."""

    name: str | None
    version: str


class SequenceInfo(BaseModel):
    """One sequence of the engine. The stages turn, adapters and kv_blocks say what it waits for."""

    id: str
    request_id: str | None  # of its call
    tenant: str
    stage: Stage
    adapters: list[AdapterName]
    prompt_tokens: int
    computed_tokens: int
    generated_tokens: int
    kv_blocks: int
    age_s: float


class Sequences(BaseModel):
    """Running ones, then waiting ones in the order in which they are to start."""

    running: int
    waiting: int
    shown: list[SequenceInfo]


class ResidentInfo(BaseModel):
    """An adapter or a gate set, and where it is."""

    name: str | None
    version: str
    kind: Literal["adapter", "gate_set"]
    location: Literal["device", "host", "disk"]
    pages: int
    users: int
    pinned: bool
    loading: bool
    error: str | None


class Adapters(BaseModel):
    """Residency: what is loading first, then what is on the device."""

    on_device: int
    in_host_memory: int
    on_disk: int
    pinned: int
    loading: int
    pages_used: int
    pages_free: int
    shown: list[ResidentInfo]


class KvInfo(BaseModel):
    """KV blocks; cached ones are free, and can be found by their content."""

    blocks: int
    used: int
    free: int
    cached: int
    block_tokens: int


class DebugState(BaseModel):
    """What the server has at hand."""

    status: str  # as GET /ready says it
    version: str
    uptime_s: float
    draining: bool
    engine: EngineInfo
    queue: QueueInfo
    calls: Calls
    sequences: Sequences | None
    adapters: Adapters | None
    kv: KvInfo | None
