"""Who may come in: the queue is bounded by requests and by tokens, and what is too much is refused at once.

A request counts from its arrival to its end. In tokens it counts its prompt and, for each of its answers, what the
client allows (`max_tokens`), or `OPEN_ANSWER` where the client leaves that open: such answers rarely fill the context.
Tokens are known only when the prompt has been tokenized; before that a request is let in while any are left.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from perseid_server.access.caller import Caller
from perseid_server.errors import InvalidRequest, QueueFull
from perseid_server.frontend.drain_rate import DrainRate
from perseid_server.frontend.metrics import Metrics
from perseid_server.frontend.shared_limit import SharedLimit

Reason = Literal["queue_full", "tokens"]

OPEN_ANSWER = 256  # tokens
CACHES_IN_QUEUE = 16  # the usual limit in tokens, in sizes of the KV cache


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Of what is in progress at once, waiting or running."""

    max_requests: int  # each answer of a request counts
    max_tokens: int

    @classmethod
    def of(cls, max_queue: int, max_queue_tokens: int | None, kv_tokens: int) -> "AdmissionLimits":
        """`kv_tokens`: what the KV cache holds, from which the limit follows that an operator does not set."""
        return cls(max_queue, CACHES_IN_QUEUE * kv_tokens if max_queue_tokens is None else max_queue_tokens)


class Place:
    """One request's place in the queue."""

    def __init__(self, admission: "Admission", caller: Caller) -> None:
        self._admission = admission
        self.caller = caller
        self.tokens = 0

    def count_tokens(self, tokens: int) -> None:
        """What the request turned out to need. QueueFull when that is too much now."""
        self._admission.take_tokens(self, tokens)


class Admission:
    """The queue's bounds. All methods run on one event loop."""

    def __init__(self, limits: AdmissionLimits, metrics: Metrics, rate: DrainRate | None = None) -> None:
        self.limits = limits
        self._requests = SharedLimit(limits.max_requests)
        self._tokens = SharedLimit(limits.max_tokens)
        self._metrics = metrics
        self._rate = rate or DrainRate()

    @property
    def in_progress(self) -> int:
        """Answers waiting or running."""
        return self._requests.total

    @property
    def tokens_in_progress(self) -> int:
        """What they count in tokens."""
        return self._tokens.total

    @contextmanager
    def enter(self, caller: Caller, num_choices: int) -> Iterator[Place]:
        """A place for as long as the request lasts. QueueFull when there is none."""
        self.check(caller, num_choices)
        self._requests.take(caller, num_choices)
        self._rate.begin()
        place = Place(self, caller)
        try:
            yield place
        finally:
            self._requests.give_back(caller, num_choices)
            self._tokens.give_back(caller, place.tokens)
            self._rate.left(place.tokens)
            if not self.in_progress:
                self._rate.rest()

    def check_call(self, num_prompts: int, *, num_answers: int = 0, num_tokens: int = 0) -> None:
        """InvalidRequest for several prompts that never fit at once. A single one does, when it is alone."""
        for amount, most, what, option in (
            (num_answers, self.limits.max_requests, "answers", "--max-queue"),
            (num_tokens, self.limits.max_tokens, "tokens", "--max-queue-tokens"),
        ):
            if num_prompts > 1 and amount > most:
                raise InvalidRequest(
                    f"prompt: {num_prompts} prompts make {amount} {what} or more, and {most} may be in progress at "
                    f"once ({option}); send fewer prompts in one request",
                    field="prompt",
                )

    def check(self, caller: Caller, num_choices: int = 1) -> None:
        """QueueFull when no request could come in now, however short; it counts as refused."""
        self._check(self._requests, caller, num_choices, "queue_full")
        self._check(self._tokens, caller, 1, "tokens")

    def take_tokens(self, place: Place, tokens: int) -> None:
        """Count a request's tokens. QueueFull when they are too many now."""
        self._check(self._tokens, place.caller, tokens, "tokens")
        self._tokens.take(place.caller, tokens)
        place.tokens += tokens

    def retry_after_s(self) -> float:
        """When to ask again, by what is in progress and how fast it went lately."""
        return self._rate.retry_after_s(self._tokens.total)

    def _check(self, shared: SharedLimit, caller: Caller, amount: int, reason: Reason) -> None:
        if shared.fits(amount) and shared.is_fair(caller, amount):
            return
        self._metrics.rejected(reason)
        what = "requests" if reason == "queue_full" else "tokens"
        if shared.fits(amount):
            message = f"this API key's tenant has its share of the {what} in progress; try again"
        else:
            message = f"{shared.total} {what} are in progress, the limit is {shared.limit}; try again"
        raise QueueFull(message, retry_after_s=self.retry_after_s())
