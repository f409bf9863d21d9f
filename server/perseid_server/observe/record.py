"""What becomes of one call, written down while it runs.

A transport opens a `CallRecord` when a call comes and closes it, once, when the call is over (`calls.py`). In between
everybody who learns something of it notes it here. Nothing of what clients write is kept unless the operator wants
prompts in the log. Times are on the machine's monotonic clock, s. All methods run on one event loop.
"""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from perseid_server.access.caller import Caller
from perseid_server.errors import PerseidError

Transport = Literal["http", "grpc", "none"]

_CAMEL = re.compile(r"(?<!^)(?=[A-Z])")

ABORTED = "aborted"
"""The error of a call whose client left, or that the server cut off when it stopped."""
INTERNAL = "internal"


@dataclass(slots=True, eq=False)
class AnswerRecord:
    """One sequence that the engine was asked for."""

    submitted: float = field(default_factory=time.monotonic)
    first: float | None = None  # when its first output came
    last: float | None = None
    num_tokens: int = 0
    queue_s: float = 0.0  # arrival in the engine to first scheduling
    load_s: float = 0.0  # of that, while its adapters were not on the device
    prefill_s: float = 0.0  # first scheduling to first token
    finish_reason: str | None = None
    texts: list[str] | None = None  # where they are wanted
    sequence: str = ""  # its id in the engine, which no other has

    def saw(self, num_tokens: int, queue_s: float | None, prefill_s: float | None, load_s: float | None) -> None:
        """An output has come; its first one tells the times."""
        self.last = time.monotonic()
        if self.first is None:
            self.first = self.last
            self.queue_s, self.prefill_s, self.load_s = queue_s or 0.0, prefill_s or 0.0, load_s or 0.0
        self.num_tokens += num_tokens


@dataclass(slots=True, eq=False)
class GenerationRecord:
    """One prompt of a call, and what was made of it."""

    id: str = ""  # of the answer, as the client gets it; the engine's log names it too
    operation: Literal["chat", "text_completion"] = "text_completion"
    base: str = ""
    model: str = ""  # what was asked for
    adapter: str | None = None  # what that turned out to be, with its version; None: the base
    tier: str | None = None  # who chose it, where that was `auto`
    prompt_tokens: int = 0
    cached_tokens: int = 0
    settings: Mapping[str, float] = field(default_factory=dict)  # of sampling, by OpenTelemetry's names
    prompt: str | None = None  # where prompts are wanted
    keeps_text: bool = False
    answers: list[AnswerRecord] = field(default_factory=list)

    def answer(self, sequence: str = "") -> AnswerRecord:
        """One more sequence is submitted, under this id."""
        answer = AnswerRecord(texts=[] if self.keeps_text else None, sequence=sequence)
        self.answers.append(answer)
        return answer


@dataclass(slots=True, eq=False)
class CallRecord:
    """One call of a client. The properties are of all its generations together."""

    transport: Transport = "none"
    route: str = ""  # `POST /v1/completions`, or `perseid.v1.Generation/Generate`
    request_id: str = ""
    is_probe: bool = False  # health checks and scrapes, of which nobody wants to read
    keeps_text: bool = False
    trace_headers: Mapping[str, str] = field(default_factory=dict)  # W3C: traceparent, tracestate
    tenant: str = ""
    key: str = ""  # the name of an API key
    subject: str | None = None  # the name that an operator loads, unloads, pins
    version: str | None = None  # what that name stands for now
    status: int | str | None = None  # of HTTP, or the name of gRPC's
    error: str | None = None  # its kind, such as queue_full
    error_field: str | None = None
    generations: list[GenerationRecord] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)
    ended: float | None = None

    def recognised(self, caller: Caller) -> None:
        """Whose key it is, whether or not it may come in."""
        self.tenant, self.key = caller.tenant, caller.key

    def failed(self, error: BaseException) -> None:
        """Why it has no answer, or none to its end. The first reason is the one that counts."""
        if isinstance(error, PerseidError):
            self.refused(_CAMEL.sub("_", type(error).__name__).lower(), error.field)
        else:
            self.refused(INTERNAL if isinstance(error, Exception) else ABORTED)

    def refused(self, error: str, error_field: str | None = None) -> None:
        """As `failed`, in a word."""
        if self.error is None:
            self.error, self.error_field = error, error_field

    @property
    def duration_s(self) -> float:
        """From its arrival to its end, or till now."""
        return (time.monotonic() if self.ended is None else self.ended) - self.arrived

    @property
    def answers(self) -> Iterator[AnswerRecord]:
        """Of all its prompts."""
        return (answer for generation in self.generations for answer in generation.answers)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(generation.prompt_tokens for generation in self.generations)

    @property
    def generated_tokens(self) -> int:
        """Of all answers so far."""
        return sum(answer.num_tokens for answer in self.answers)

    @property
    def ttft_s(self) -> float | None:
        """Arrival to the first token of any answer."""
        firsts = [answer.first for answer in self.answers if answer.first is not None]
        return min(firsts) - self.arrived if firsts else None

    @property
    def queue_s(self) -> float | None:
        """The longest that one of its sequences waited in the engine for its turn."""
        return max((answer.queue_s for answer in self.answers if answer.first is not None), default=None)

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        """Of the answers that are complete, each once."""
        return tuple(dict.fromkeys(answer.finish_reason for answer in self.answers if answer.finish_reason))


_current: ContextVar[CallRecord | None] = ContextVar("call", default=None)


def current_call() -> CallRecord:
    """The call that this code runs for; one that nobody reads where there is none."""
    return _current.get() or CallRecord()


@contextmanager
def recording(call: CallRecord) -> Iterator[None]:
    """What runs inside runs for this call."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)


def record_for_task(call: CallRecord) -> None:
    """The rest of this task runs for this call."""
    _current.set(call)
