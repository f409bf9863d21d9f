"""Requests and adapters that may be what ends the engine, so that they cannot end it again and again.

Whatever a step runs when it ends the engine is suspect: each request's content, and each version that adapts one. A
suspect that is answered is cleared: what ends the engine never is. One that was there MOST_CRASHES times and was never
answered in between is refused for a while, then tried once more; each time that ends the engine again, the while is
twice as long. Crashes that are long ago count no more: who is there at three in as many weeks was there by chance.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from perseid_server.engine.messages import Submit
from perseid_server.errors import Unavailable

MOST_CRASHES = 3
FIRST_REFUSAL_S = 60.0
_MOST_DOUBLINGS = 6  # 64 minutes
_MOST_SUSPECTS = 4096
FORGOTTEN_AFTER_S = 6 * 3600.0  # without another crash


@dataclass(slots=True)
class _Record:
    num_crashes: int = 0
    last_crash: float = 0.0
    refused_until: float = 0.0


class Suspects:
    """Times are monotonic, in s."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()  # the one that was suspect last, last

    def crashed(self, running: Iterable[Submit], now: float) -> None:
        """The engine has ended while it ran these."""
        for suspect in {suspect: None for request in running for suspect in _suspects_of(request)}:
            record = self._records.setdefault(suspect, _Record())
            self._records.move_to_end(suspect)
            if now - record.last_crash > FORGOTTEN_AFTER_S:
                record.num_crashes = 0
            record.num_crashes += 1
            record.last_crash = now
            again = record.num_crashes - MOST_CRASHES
            if again >= 0:
                record.refused_until = now + FIRST_REFUSAL_S * 2 ** min(again, _MOST_DOUBLINGS)
        while len(self._records) > _MOST_SUSPECTS:
            self._records.popitem(last=False)

    def answered(self, request: Submit) -> None:
        """A request has been answered to the end: neither it nor what adapts it ends the engine."""
        if self._records:
            for suspect in _suspects_of(request):
                self._records.pop(suspect, None)

    def left(self, request: Submit) -> None:
        """A request's client has had some of its answer and wants no more: what adapts it does not end the engine. The
        request itself might have, later."""
        for version in request.adaptation.versions:
            self._records.pop(_of_version(version), None)

    def check(self, request: Submit, now: float) -> None:
        """Unavailable for a request that is refused now."""
        if not self._records:
            return
        for suspect in _suspects_of(request):
            record = self._records.get(suspect)
            if record is not None and record.num_crashes >= MOST_CRASHES and now < record.refused_until:
                what = "this request" if suspect.startswith("request") else "an adapter of this request"
                raise Unavailable(
                    f"{what} was running each of the {record.num_crashes} times that the engine crashed; it is tried "
                    "again later",
                    retry_after_s=record.refused_until - now,
                )


def _suspects_of(request: Submit) -> list[str]:
    """Names no content: a digest of the request's, and the versions that adapt it."""
    content = repr((request.prompt_token_ids, request.adaptation.key)).encode()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return [f"request {digest}", *map(_of_version, request.adaptation.versions)]


def _of_version(version: str) -> str:
    return f"version {version}"
