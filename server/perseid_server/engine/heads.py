"""Medusa heads for the drafter: those on the device, run on the hidden states that sequences were left with.

An adapter may change the heads' first blocks as it changes the base's linears: its pages hold that too.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence

import torch

from perseid_kernels.draft_heads import HeadsDelta
from perseid_kernels.segments import Segments
from perseid_server.adapters.pool import AdapterPool
from perseid_server.adapters.state import Location, ResidencyEvents
from perseid_server.engine.routed_rows import Tables
from perseid_server.engine.runner import KeptRow
from perseid_server.engine.sequence import Sequence as Running
from perseid_server.engine.step_rows import page_list
from perseid_server.speculation.device_heads import DeviceHeads
from perseid_server.speculation.draft import Candidates
from perseid_server.speculation.heads_residency import HeadsResidency

logger = logging.getLogger(__name__)

NOTHING = Candidates((), ())


class HeadRunner:
    """Implements `engine.ports.Heads`."""

    def __init__(self, residency: HeadsResidency[DeviceHeads], pool: AdapterPool, tables: Tables) -> None:
        self._residency = residency
        self._pool = pool
        self._tables = tables

    @property
    def is_loading(self) -> bool:
        """Whether a poll will take something over."""
        return self._residency.is_loading

    def register(self, version: str, path: str) -> None:
        """Load heads."""
        self._residency.register(version, path)

    def forget(self, version: str) -> None:
        """Let heads go."""
        self._residency.forget(version)

    def poll(self) -> ResidencyEvents:
        """Take over what has been loaded."""
        return self._residency.poll()

    def knows(self, version: str) -> bool:
        """Whether they are registered."""
        return self._residency.knows(version)

    def location(self, version: str) -> Location:
        """Where they are."""
        return self._residency.location(version)

    def error(self, version: str) -> str | None:
        """Why they cannot be loaded."""
        return self._residency.error(version)

    def can_propose(self, sequence: Running) -> bool:
        """Whether heads and hidden state are there."""
        version = sequence.request.speculation.heads
        return version is not None and sequence.hidden is not None and self._residency.get(version) is not None

    @property
    def retry_in_s(self) -> float | None:
        """After how long a poll tries some again, though nothing loads."""
        return self._residency.retry_in_s

    def propose(self, sequences: Sequence[Running]) -> list[Candidates]:
        """One pass for each set of heads."""
        places: defaultdict[str, list[int]] = defaultdict(list)
        for place, sequence in enumerate(sequences):
            version = sequence.request.speculation.heads
            assert version is not None, "can_propose() said so"
            places[version].append(place)
        found: dict[int, Candidates] = {}
        for version, of_version in places.items():
            try:
                answers = self._propose(version, [sequences[place] for place in of_version])
            except Exception as error:  # out of memory, a broken kernel: the requests go on without these heads
                logger.exception("heads %s failed and draft no more", version[:12])
                self._residency.fail(version, f"they failed while drafting: {type(error).__name__}")
                answers = [NOTHING] * len(of_version)
            found.update(zip(of_version, answers, strict=True))
        return [found[place] for place in range(len(sequences))]

    def _propose(self, version: str, sequences: Sequence[Running]) -> list[Candidates]:
        heads = self._residency.get(version)
        assert heads is not None, "can_propose() said so"
        hidden_SE = torch.stack([_kept(sequence).hidden for sequence in sequences])
        return heads.propose(hidden_SE, self._delta(sequences, heads))

    def _delta(self, sequences: Sequence[Running], heads: DeviceHeads) -> HeadsDelta | None:
        """What the sequences' adapters add to the heads; None where they leave them alone."""
        lists = [page_list(self._tables, sequence.adaptation) for sequence in sequences]
        changing = [pages if pages is not None and self._pool.changes_heads(pages.pages) else None for pages in lists]
        segments = Segments.build(changing, heads.device)
        return None if segments is None else HeadsDelta(self._pool.heads, segments)


def _kept(sequence: Running) -> KeptRow:
    assert isinstance(sequence.hidden, KeptRow)
    return sequence.hidden
