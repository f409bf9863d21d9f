"""What the engine needs of others, and what it tells them. No torch here: tests bring fakes."""

from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Protocol

from perseid_server.adapters.state import Admission, Location, ResidencyEvents, ResidencyStats, Resident
from perseid_server.engine.sequence import Sequence
from perseid_server.model.sampling_params import TokenLogprobs
from perseid_server.speculation.draft import Candidates, Draft


@dataclass(frozen=True, slots=True)
class Chunk:
    """The rows of one sequence in a step: tokens `start … start + count` of `sequence.token_ids`, then its drafts."""

    sequence: Sequence
    start: int
    count: int
    draft: Draft | None = None  # may follow the last token, which then is the only one

    @property
    def samples(self) -> bool:
        """Whether the chunk ends at the sequence's last token, so that the next one is sampled."""
        return self.start + self.count == len(self.sequence.token_ids)

    @property
    def num_rows(self) -> int:
        """Rows of the batch, drafted ones among them."""
        return self.count if self.draft is None else self.count + len(self.draft.tree)


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """One forward pass."""

    chunks: tuple[Chunk, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the forward pass."""
        return sum(chunk.num_rows for chunk in self.chunks)

    @property
    def num_drafts(self) -> int:
        """Of these, drafted ones."""
        return sum(chunk.num_rows - chunk.count for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class RoutedChunk:
    """What the gates chose for a chunk's rows, but for drafts that were not accepted. Shares per column of a row sum
    to 1."""

    shares: tuple[float, ...]  # summed over the rows
    prompt_shares: tuple[float, ...]  # of those, summed over rows of the prompt
    sampled: tuple[tuple[float, ...], ...]  # of the last row, and of each accepted draft's: tokens were sampled from
    entropy: float  # summed over the rows: the mean entropy of a row's gates, nats


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What the forward pass brought one chunk: no token where nothing is sampled, one, or one more than drafts were
    accepted. `accepted` are those drafts' nodes, from the root's child on."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    accepted: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of tokens start + 1 … start + count, as far as the prompt goes
    error: str | None = None
    routed: RoutedChunk | None = None


class Runner(Protocol):
    """Runs the model over a step."""

    def run(self, step: ScheduledStep) -> tuple[ChunkResult, ...]:
        """One result for each chunk, in order. Writes the rows' K and V into the sequences' blocks."""
        ...


class Heads(Protocol):
    """Medusa heads on the device. All calls come from the engine's thread."""

    @property
    def is_loading(self) -> bool: ...

    def register(self, version: str, path: str) -> None: ...

    def forget(self, version: str) -> None: ...

    def poll(self) -> ResidencyEvents: ...

    @property
    def retry_in_s(self) -> float | None:
        """After how long a poll has something to try, though nothing loads. None: not of itself."""
        ...

    def knows(self, version: str) -> bool: ...

    def location(self, version: str) -> Location: ...

    def error(self, version: str) -> str | None: ...

    def can_propose(self, sequence: Sequence) -> bool:
        """Whether the sequence's heads are there, and the hidden state they look at."""
        ...

    def propose(self, sequences: ListOf[Sequence]) -> list[Candidates]:
        """What each sequence's heads say of the tokens after its last one."""
        ...


class Residency(Protocol):
    """Brings adapters to the device and keeps those in use there. All calls come from the engine's thread."""

    @property
    def is_loading(self) -> bool: ...

    def register(self, version: str, path: str) -> None: ...

    def register_gate_set(
        self, version: str, path: str | None, adapters: tuple[str, ...], *, null: bool, pinned: bool
    ) -> None: ...

    def forget(self, version: str) -> None: ...

    def pin(self, version: str, pinned: bool) -> None: ...

    def acquire(self, *versions: str, evict_wanted: bool = True) -> Admission:
        """Take a reference to each if all are on the device ("ready"); otherwise none, and start bringing them there.
        `evict_wanted`: also in place of what came for a request that waits for more."""
        ...

    def has_room(self, *versions: str, without: ListOf[str]) -> bool:
        """Whether there were room for these, as far as is known, if nobody used those in `without`."""
        ...

    def release(self, *versions: str) -> None: ...

    def prefetch(self, *versions: str, claimed: ListOf[str] = ()) -> None:
        """What those who wait need, the next first, and whoever has the claim: bring it to host memory ahead of its
        turn, as far as there is room. Said anew in each step."""
        ...

    def poll(self) -> ResidencyEvents: ...

    @property
    def retry_in_s(self) -> float | None:
        """After how long a poll has something to try, though nothing loads. None: not of itself."""
        ...

    def location(self, version: str) -> Location: ...

    def is_pinned(self, version: str) -> bool: ...

    def knows(self, version: str) -> bool: ...

    def error(self, version: str) -> str | None: ...

    def problem(self, *versions: str) -> str | None:
        """Why these cannot be on the device together; None as far as is known."""
        ...

    def stats(self) -> ResidencyStats: ...

    def residents(self) -> Iterable[Resident]:
        """All that are known, as they are now."""
        ...
