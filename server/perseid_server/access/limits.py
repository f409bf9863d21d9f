"""What one key may ask for: requests and tokens a minute, tokens a day and in all. Standard library only.

Rates are token buckets on the monotonic clock: `limit` fit in, `limit`/60 come back every second, and what was taken
too much (an answer's length is not known before) has to come back first. A request takes its prompt's tokens when it
begins and its answer's as they come. All methods run on one event loop.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from perseid_server.access.caller import Caller
from perseid_server.access.keys import Allowance, Key
from perseid_server.access.ledger import DAY_S, Ledger
from perseid_server.errors import PerseidError, RateLimited

Reason = Literal["rate_limit", "quota"]


class QuotaSpent(RateLimited):
    """The key's tokens of the day, or all it had, are used up."""


class Bucket:
    """At most `limit` in a burst, and `limit` a minute."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = now

    def level(self, now: float) -> float:
        """What is left; less than nothing where too much was taken."""
        self._level = min(float(self.limit), self._level + max(0.0, now - self._at) * self.limit / 60)
        self._at = max(self._at, now)
        return self._level

    def wait_s(self, amount: float, now: float) -> float:
        """How long until so much can be taken; more than ever fits in waits for a full bucket."""
        missing = min(amount, self.limit) - self.level(now)
        return 60 * missing / self.limit if missing > 1e-9 else 0.0

    def take(self, amount: float, now: float) -> None:
        """Take it, whether or not it is there; less than nothing is given back."""
        self._level = min(float(self.limit), self.level(now) - amount)

    def resized(self, limit: int | None, now: float) -> "Bucket | None":
        """With another limit; what was taken stays taken."""
        if limit is None or limit == self.limit:
            return None if limit is None else self
        bucket = Bucket(limit, now)
        bucket.take(self.limit - self.level(now), now)
        return bucket


@dataclass(slots=True)
class _State:
    """One key's."""

    allowance: Allowance
    requests: Bucket | None = None
    tokens: Bucket | None = None


@dataclass(slots=True)
class Meter:
    """Counts the tokens of one request while it runs."""

    _spend: Callable[[int], None] = lambda _: None
    answered: int = 0

    def spend(self, tokens: int) -> None:
        """Tokens of the answer."""
        self.answered += tokens
        self._spend(tokens)


class Limiter:
    """All keys' limits. Callers without a key have none."""

    def __init__(self, ledger: Ledger | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.ledger = ledger or Ledger()
        self._clock = clock
        self._states: dict[str, _State] = {}
        self._on_refusal: Callable[[Reason], None] = lambda _: None

    def on_refusal(self, callback: Callable[[Reason], None]) -> None:
        """Be told why a request was refused."""
        self._on_refusal = callback

    def count_request(self, key: Key) -> None:
        """A request of a key has come. RateLimited when it is one too many, which does not count."""
        state, now = self._state(key), self._clock()
        if state.requests is None:
            return
        wait_s = state.requests.wait_s(1, now)
        if wait_s:
            self._refuse(state.requests.limit, "requests", wait_s)
        state.requests.take(1, now)

    @contextmanager
    def metered(self, caller: Caller, num_prompt: int, is_late: Callable[[], bool] = lambda: False) -> Iterator[Meter]:
        """Run a request of so many prompt tokens. RateLimited when its key has too few left; a request that the server
        refuses or cannot answer costs nothing. Who leaves pays, but for those who leave when the request `is_late`."""
        state = self._states.get(caller.key)
        if state is None:
            yield Meter()
            return

        def spend(tokens: int) -> None:
            self.ledger.add(caller.key, tokens)
            self._take(caller.key, tokens)

        self._check_tokens(caller.key, state, num_prompt)
        day = self.ledger.add(caller.key, num_prompt)
        self._take(caller.key, num_prompt)
        meter = Meter(spend)
        try:
            yield meter
        except BaseException as error:
            if not meter.answered and (isinstance(error, PerseidError) or is_late()):
                self.ledger.give_back(caller.key, num_prompt, day)
                self._take(caller.key, -num_prompt)
            raise

    def headers(self, key: str) -> Mapping[str, str]:
        """What is left, in the words of OpenAI's headers."""
        state = self._states.get(key)
        told: dict[str, str] = {}
        for name, bucket in (("requests", state.requests), ("tokens", state.tokens)) if state else ():
            if bucket is not None:
                left = bucket.level(self._clock())
                told[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
                told[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(left + 1e-9)))
                told[f"x-ratelimit-reset-{name}"] = _span(60 * (bucket.limit - left) / bucket.limit)
        return told

    def _state(self, key: Key) -> _State:
        """The key's, with the limits that its file says now."""
        state = self._states.get(key.name)
        if state is None or state.allowance != key.allowance:
            wanted, now = key.allowance, self._clock()
            state = _State(
                wanted,
                _bucket(state.requests if state else None, wanted.requests_per_minute, now),
                _bucket(state.tokens if state else None, wanted.tokens_per_minute, now),
            )
            self._states[key.name] = state
        return state

    def _check_tokens(self, key: str, state: _State, num_prompt: int) -> None:
        wait_s = state.tokens.wait_s(num_prompt, self._clock()) if state.tokens is not None else 0.0
        if state.tokens is not None and wait_s:
            self._refuse(state.tokens.limit, "tokens", wait_s)
        used, allowance = self.ledger.used(key), state.allowance
        if allowance.tokens_total is not None and used.total + num_prompt > allowance.tokens_total:
            self._refuse_quota("in all", allowance.tokens_total, used.total, num_prompt, DAY_S)
        if allowance.tokens_per_day is not None and used.today + num_prompt > allowance.tokens_per_day:
            until = self.ledger.until_tomorrow_s(key)
            self._refuse_quota("a day", allowance.tokens_per_day, used.today, num_prompt, until)

    def _take(self, key: str, tokens: int) -> None:
        bucket = self._states[key].tokens  # as it is now: limits may have changed meanwhile
        if bucket is not None:
            bucket.take(tokens, self._clock())

    def _refuse(self, limit: int, of: str, wait_s: float) -> None:
        self._on_refusal("rate_limit")
        raise RateLimited(
            f"this API key may use {limit} {of} a minute; try again in {_span(wait_s)}", retry_after_s=wait_s
        )

    def _refuse_quota(self, span: str, limit: int, used: int, wanted: int, wait_s: float) -> None:
        self._on_refusal("quota")
        raise QuotaSpent(
            f"this API key may use {limit} tokens {span} and has used {used}; the prompt takes {wanted} more",
            retry_after_s=wait_s,
        )


def _bucket(before: Bucket | None, limit: int | None, now: float) -> Bucket | None:
    if before is not None:
        return before.resized(limit, now)
    return Bucket(limit, now) if limit is not None else None


def _span(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1s, 6m0s. Never less than it is."""
    millis = math.ceil(max(0.0, seconds) * 1000 - 1e-6)
    if millis < 1000:
        return f"{millis}ms"
    whole = math.ceil(millis / 1000)
    return f"{whole}s" if whole < 60 else f"{whole // 60}m{whole % 60}s"
