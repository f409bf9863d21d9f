"""An accepted request, and what comes of it."""

import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import astuple, dataclass, field
from typing import Literal

from perseid_server.access.limits import Meter
from perseid_server.engine.messages import SequenceOutput
from perseid_server.frontend.adaptation import Resolved
from perseid_server.frontend.deadline import Deadline
from perseid_server.frontend.loaded import LoadedAdapter
from perseid_server.frontend.requests import GenerationRequest
from perseid_server.frontend.routing_report import RoutingTally, Shares
from perseid_server.model.sampling_params import TokenLogprobs
from perseid_server.observe.record import GenerationRecord
from perseid_server.speculation.options import OFF, Speculation

StopReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step brought one choice."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()  # one for each token, when asked for
    finish_reason: StopReason | None = None
    stop_reason: str | int | None = None  # the stop text or token that ended it
    is_prompt: bool = False  # the echo of the prompt; logprobs[0] is None
    routing: tuple[Shares, ...] = ()  # one for each token, when asked for


@dataclass(slots=True)
class Usage:
    """Counts of tokens so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    accepted_tokens: int = 0  # of completion_tokens, those that had been drafted
    rejected_tokens: int = 0  # drafts that did not become part of an answer

    def count(self, output: SequenceOutput) -> None:
        """Add what an output brought, beside `cached_tokens`, which all choices share."""
        self.completion_tokens += len(output.token_ids)
        self.accepted_tokens += output.accepted_tokens
        self.rejected_tokens += output.drafted_tokens - output.accepted_tokens

    @staticmethod
    def total(parts: Iterable["Usage"]) -> "Usage":
        """Of several generations together."""
        counts = zip(*(astuple(part) for part in parts), strict=True)
        return Usage(*(sum(each) for each in counts))


@dataclass(slots=True)
class Generation:
    """A request that has been accepted. Iterate it once."""

    request: GenerationRequest
    resolved: Resolved
    prompt_token_ids: tuple[int, ...]
    deltas: AsyncIterator[Delta]
    deadline: Deadline = field(default_factory=Deadline.none)
    usage: Usage = field(default_factory=Usage)
    created: int = field(default_factory=lambda: int(time.time()))
    routing: RoutingTally | None = None  # complete when the deltas have ended; when asked for
    speculation: Speculation = OFF
    meter: Meter = field(default_factory=Meter)  # of the caller's limits
    record: GenerationRecord = field(default_factory=GenerationRecord)  # for the operator

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self.deltas

    @property
    def adapter(self) -> LoadedAdapter | None:
        """The one adapter that answers, where it is one."""
        return self.resolved.adapter

    @property
    def is_lossy(self) -> bool:
        """Whether drafts may change what is said. Greedy requests take the likeliest token, whatever is typical."""
        is_typical = self.speculation.acceptance == "typical" and self.speculation.mode != "off"
        return is_typical and self.request.sampling.temperature > 0.0
