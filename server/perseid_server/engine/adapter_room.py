"""Who gets the room for adapters: requests for hot ones must not keep a cold one out for ever.

The first waiting sequence whose adapters are not there has a claim until it starts. It alone may evict what came for
others that wait. Where there is no room because everything is in use, some of the adapters in use are closed: no
further sequence starts with them, so they become idle when those that run have ended. They are taken from those who
have been served most, as few as make enough room, and stay closed until the claimant starts or ends. Meanwhile
sequences start on what is there, but nothing else is brought.
"""

from collections.abc import Iterable

from perseid_server.adapters.state import Admission
from perseid_server.engine.fairness import Shares
from perseid_server.engine.load_waits import LoadWaits
from perseid_server.engine.ports import Residency
from perseid_server.engine.sequence import Sequence


class AdapterRoom:
    """Asks for the adapters of waiting sequences on behalf of the scheduler."""

    def __init__(self, residency: Residency, shares: Shares) -> None:
        self._residency = residency
        self._shares = shares
        self._is_short = False  # the claimant found no room
        self._closed: list[str] = []  # versions
        self._is_full = False  # somebody without a claim found no room in this round
        self._loads = LoadWaits()
        self.claimant: Sequence | None = None

    def begin_round(self) -> None:
        """Waiting sequences are asked for anew."""
        self._is_full = False

    def acquire(self, sequence: Sequence, running: Iterable[Sequence]) -> Admission:
        """Take what the sequence needs on the device if it is there, and see that it comes there otherwise."""
        versions = sequence.adaptation.versions
        has_claim = self._may_claim(sequence)
        if not has_claim and self._is_kept_out(versions):
            self._miss(versions)
            return "no_room"
        admission = self._residency.acquire(*versions, evict_wanted=has_claim)
        if admission == "ready":
            if sequence.scheduled_at is None:
                sequence.load_s = self._loads.waited_s(versions, sequence.arrived_at)
        else:
            self._miss(versions)
        self._is_full = self._is_full or (admission == "no_room" and not has_claim)
        if admission in ("ready", "failed"):
            self.leave(sequence)
        elif has_claim:
            self._claim(sequence, running, is_short=admission == "no_room")
        return admission

    @property
    def claimed(self) -> tuple[str, ...]:
        """What the claimant needs on the device."""
        return self.claimant.adaptation.versions if self.claimant is not None else ()

    def came(self, version: str) -> None:
        """It is on the device now."""
        self._loads.came(version)

    def gone(self, version: str) -> None:
        """No new request names it."""
        self._loads.forget(version)

    def leave(self, sequence: Sequence | None) -> None:
        """It starts, or has ended: its claim is over, if it had one."""
        if sequence is self.claimant:
            self.claimant = None
            self._is_short = False
            self._closed = []

    def _miss(self, versions: Iterable[str]) -> None:
        for version in versions:
            if self._residency.location(version) != "device":
                self._loads.missed(version)

    def _may_claim(self, sequence: Sequence) -> bool:
        other = self.claimant
        return other is None or other is sequence or sequence.request.priority < other.request.priority

    def _is_kept_out(self, versions: tuple[str, ...]) -> bool:
        if not self._is_short and not self._is_full:
            return False
        return any(version in self._closed or self._residency.location(version) != "device" for version in versions)

    def _claim(self, sequence: Sequence, running: Iterable[Sequence], *, is_short: bool) -> None:
        if sequence is not self.claimant:
            self.leave(self.claimant)
        self.claimant = sequence
        self._is_short = self._is_short or is_short  # also while the rest of what it needs is read
        if not is_short:
            return
        versions = sequence.adaptation.versions
        for other in sorted(running, key=lambda each: self._shares[each].service, reverse=True):
            for version in other.adaptation.versions:
                if self._residency.has_room(*versions, without=self._closed):
                    return
                if version not in self._closed and version not in versions:
                    self._closed.append(version)
