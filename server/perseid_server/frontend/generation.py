"""An accepted request, and what comes of it."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from perseid_server.frontend.adaptation import Resolved
from perseid_server.frontend.loaded import LoadedAdapter
from perseid_server.frontend.requests import GenerationRequest
from perseid_server.frontend.routing_report import RoutingTally, Shares
from perseid_server.model.sampling_params import TokenLogprobs

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


@dataclass(slots=True)
class Generation:
    """A request that has been accepted. Iterate it once."""

    request: GenerationRequest
    resolved: Resolved
    prompt_token_ids: tuple[int, ...]
    deltas: AsyncIterator[Delta]
    usage: Usage = field(default_factory=Usage)
    created: int = field(default_factory=lambda: int(time.time()))
    routing: RoutingTally | None = None  # complete when the deltas have ended; when asked for

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self.deltas

    @property
    def adapter(self) -> LoadedAdapter | None:
        """The one adapter that answers, where it is one."""
        return self.resolved.adapter
