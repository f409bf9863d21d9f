"""What the engine needs of others, and what it tells them. No torch here: tests bring fakes."""

from dataclasses import dataclass
from typing import Protocol

from perseid_server.adapters.state import Admission, Location, ResidencyEvents, ResidencyStats
from perseid_server.engine.sequence import Sequence
from perseid_server.model.sampling_params import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Chunk:
    """The rows of one sequence in a step: tokens `start … start + count` of `sequence.token_ids`."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the chunk ends at the sequence's last token, so that the next one is sampled."""
        return self.start + self.count == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """One forward pass."""

    chunks: tuple[Chunk, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the forward pass."""
        return sum(chunk.count for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class RoutedChunk:
    """What the gates chose for a chunk's rows. Shares per column of a row sum to 1."""

    shares: tuple[float, ...]  # summed over the rows
    prompt_shares: tuple[float, ...]  # of those, summed over rows of the prompt
    last: tuple[float, ...]  # of the last row
    entropy: float  # summed over the rows: the mean entropy of a row's gates, nats


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What the forward pass brought one chunk. `token_id` is None where nothing is sampled."""

    token_id: int | None = None
    logprob: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of tokens start + 1 … start + count, as far as the prompt goes
    error: str | None = None
    routed: RoutedChunk | None = None


class Runner(Protocol):
    """Runs the model over a step."""

    def run(self, step: ScheduledStep) -> tuple[ChunkResult, ...]:
        """One result for each chunk, in order. Writes the rows' K and V into the sequences' blocks."""
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

    def release(self, *versions: str) -> None: ...

    def prefetch(self, version: str) -> None:
        """Bring it to host memory ahead of its turn."""
        ...

    def poll(self) -> ResidencyEvents: ...

    def location(self, version: str) -> Location: ...

    def is_pinned(self, version: str) -> bool: ...

    def knows(self, version: str) -> bool: ...

    def error(self, version: str) -> str | None: ...

    def problem(self, *versions: str) -> str | None:
        """Why these cannot be on the device together; None as far as is known."""
        ...

    def stats(self) -> ResidencyStats: ...
