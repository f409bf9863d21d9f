"""Which sequences run in the next step, and how many of their tokens.

Decodes come first, then the prefills that have begun, then new sequences, until the token budget is spent: those that
run in order of priority and arrival, new ones by whose turn it is (`waiting.py`). A prompt of many steps leaves a part
of each to short ones of those who have not been served more, so that they need not wait for its end. Drafts take what
is left (`draft_room.py`).

A sequence gets the blocks of its whole prompt when it is admitted, and one more whenever it grows into it; when none is
left, one of whoever has been served most gives its blocks up and is computed again later (preemption by recompute: its
tokens and its random numbers stay).

Who needs more blocks than there are is passed over for a while, then everybody waits for it: places do not stay idle
for a long prompt, and it does not starve. For one that was preempted everybody waits at once.
"""

from bisect import insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from perseid_server.engine.adapter_room import AdapterRoom
from perseid_server.engine.draft_room import DraftRoom
from perseid_server.engine.fairness import Shares
from perseid_server.engine.kv_blocks import BlockAllocator
from perseid_server.engine.ports import Chunk, Residency, ScheduledStep
from perseid_server.engine.prefixes import Prefixes
from perseid_server.engine.sequence import Sequence
from perseid_server.engine.waiting import Waiting
from perseid_server.speculation.draft import Draft

PREFETCH_DEPTH = 16
"""How many lines of waiting sequences ahead adapters are brought to host memory."""

PATIENCE = 64
"""Steps for which a sequence is passed over for want of blocks before everybody waits for it."""

MOST_UNFIT = 16
"""Sequences that are passed over for want of blocks in one round; looking at each costs a little."""

NO_DRAFTS: Mapping[str, Draft] = {}

SHORT_SHARE = 4
"""While a prompt is read that does not fit into a step, this part of the step is for short ones that come after it."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step."""

    max_batch_tokens: int
    max_num_seqs: int

    def __post_init__(self) -> None:
        if not 0 < self.max_num_seqs <= self.max_batch_tokens:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_num_seqs ({self.max_num_seqs}), "
                "and that at least 1: every decoding sequence takes a token of each step"
            )


class Scheduler:
    """Owns the waiting and running sequences and their KV blocks."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockAllocator, residency: Residency) -> None:
        self._limits = limits
        self._blocks = blocks
        self._residency = residency
        self._shares = Shares()
        self._adapters = AdapterRoom(residency, self._shares)
        self._prefixes = Prefixes(blocks)
        self._drafts = DraftRoom(blocks, limits.max_batch_tokens)
        self.waiting = Waiting(self._shares)
        self.running: list[Sequence] = []  # sorted by rank
        self.failed: list[Sequence] = []  # waiting ones whose adapter cannot be loaded; the engine takes them away
        self._num_steps = 0
        self.num_preemptions = 0
        self.cache_queries = 0  # tokens
        self.cache_hits = 0  # tokens

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn."""
        self._shares.enter(sequence)
        self._shares.wait(sequence)
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, ended or aborted, and free all it holds at once."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self._give_up(sequence)
        self._adapters.leave(sequence)
        self._shares.leave(sequence)

    def adapter_came(self, version: str) -> None:
        """A version is on the device now."""
        self._adapters.came(version)

    def adapter_gone(self, version: str) -> None:
        """No new request names this version."""
        self._adapters.gone(version)

    @property
    def decoding(self) -> list[Sequence]:
        """Running sequences that have one token to compute."""
        return [sequence for sequence in self.running if sequence.num_to_compute == 1]

    @property
    def most_drafts(self) -> int:
        """Drafted rows that the next step has room for."""
        return self._drafts.most(self._limits.max_batch_tokens - len(self.decoding) - self.num_prefill_rows)

    @property
    def num_prefill_rows(self) -> int:
        """Rows of the next step that belong to prefills which have begun."""
        rows = sum(sequence.num_to_compute for sequence in self.running if sequence.num_to_compute > 1)
        return min(rows, self._limits.max_batch_tokens)

    def schedule(self, drafts: Mapping[str, Draft] = NO_DRAFTS, *, admits: bool = True) -> ScheduledStep:
        """The next step. Blocks for all its rows are allocated when this returns. `drafts`: by request id, for
        sequences that decode. Unless it `admits`, nobody starts beside those who run."""
        self._num_steps += 1
        preemptions_before = self.num_preemptions
        admits = admits or not self.running
        counts, behind = self._continued(leaves_some=admits and len(self.waiting) > 0)
        started: list[Chunk] = []
        if self.num_preemptions == preemptions_before and admits:
            started += self._admit(self._limits.max_batch_tokens - sum(counts.values()), behind)
        left = self._limits.max_batch_tokens - sum(counts.values()) - sum(chunk.count for chunk in started)
        chunks = [*self._chunks_of(counts, left), *started]
        if drafts and self.num_preemptions == preemptions_before:
            rows = sum(chunk.count for chunk in chunks)
            chunks = list(self._drafts.with_drafts(chunks, drafts, self._limits.max_batch_tokens - rows))
        self._prefetch()
        return ScheduledStep(tuple(chunks))

    def _continued(self, *, leaves_some: bool) -> tuple[dict[Sequence, int], Sequence | None]:
        """How many tokens those who run compute in the next step, and the first whose prompt does not fit into it.
        `leaves_some`: such a prompt leaves a part of the step to others."""
        budget, kept = self._limits.max_batch_tokens, 0
        counts: dict[Sequence, int] = {}
        behind: Sequence | None = None
        for sequence in self._by_urgency():
            if sequence not in self.running:
                continue  # preempted for one before it
            wanted = sequence.num_to_compute
            if wanted > budget and kept == 0 and leaves_some:
                kept = budget // SHORT_SHARE
            count = min(wanted, budget - kept)
            behind = sequence if count < wanted and behind is None else behind
            if self._grow(sequence, sequence.num_computed + count):
                counts[sequence] = count
                budget -= count
        return {sequence: count for sequence, count in counts.items() if sequence in self.running}, behind

    def _chunks_of(self, counts: Mapping[Sequence, int], left: int) -> Iterator[Chunk]:
        """What is left of the step after all goes to prompts that were begun."""
        for sequence, count in counts.items():
            more = min(sequence.num_to_compute - count, left)
            left -= more
            chunk = Chunk(sequence, sequence.num_computed, count + more)
            if chunk.count:
                self._shares.count(sequence, chunk.start, chunk.start + chunk.count)
                yield chunk

    def computed(self, chunk: Chunk, num_accepted: int = 0) -> None:
        """The step is over: the K and V of the chunk, and of so many drafts that were accepted and appended, are in the
        sequence's blocks. Full blocks become findable, what drafts needed beyond goes back."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.start + chunk.count + num_accepted
        if sequence.num_to_compute <= min(sequence.num_output, 1):  # it decodes; a prompt keeps blocks for its rest
            needed = self._blocks.blocks_for(sequence.num_computed)
            self._blocks.release(sequence.blocks[needed:])
            del sequence.blocks[needed:]
            sequence.num_published = min(sequence.num_published, needed)
        self._prefixes.publish(sequence)
        if sequence.num_output:
            self._shares.count(sequence, chunk.start, len(sequence.token_ids))

    def _by_urgency(self) -> list[Sequence]:
        """Running sequences: decodes, then prefills, each in order of rank."""
        return sorted(self.running, key=lambda sequence: (sequence.num_to_compute > 1, sequence.rank))

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for `num_tokens` tokens, preempting others if need be; False if it was preempted itself."""
        missing = self._blocks.blocks_for(num_tokens) - len(sequence.blocks)
        while missing > 0:
            blocks = self._blocks.allocate(missing)
            if blocks is not None:
                sequence.blocks += blocks
                break
            victim = max(self.running, key=self._cost_of_keeping)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _cost_of_keeping(self, sequence: Sequence) -> tuple[int, tuple[float, float], int]:
        """To the others, where blocks are short: who comes last by priority, service and arrival has most of it."""
        return sequence.request.priority, self._shares[sequence].service, sequence.arrival

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_up(sequence)
        self.num_preemptions += 1
        sequence.was_preempted = True
        self._shares.wait(sequence)
        self.waiting.add(sequence, first=True)

    def _give_up(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_published = 0
        sequence.num_computed = 0
        sequence.prompt_shares = ()
        sequence.hidden = None
        self._residency.release(*sequence.adaptation.versions)

    def _admit(self, budget: int, behind: Sequence | None) -> Iterator[Chunk]:
        """Start waiting sequences, in their order, as long as tokens, places, blocks and adapters are there. `behind`:
        one whose prompt does not fit into the step; only whoever may pass it starts."""
        num_unfit = 0
        self._adapters.begin_round()
        for sequence in self.waiting.in_order():
            if budget == 0 or len(self.running) >= self._limits.max_num_seqs or self._blocks.num_free == 0:
                return
            cached = self._prefix_to_start(sequence, behind, budget)
            if cached is None or not self._prefixes.has_room(sequence, cached):
                num_unfit += 1
                if self._must_be_next(sequence, wants_blocks=cached is not None) or num_unfit == MOST_UNFIT:
                    return
            elif self._take_adapters(sequence):
                chunk = self._start(sequence, cached, budget)
                budget -= chunk.count
                yield chunk

    def _prefix_to_start(self, sequence: Sequence, behind: Sequence | None, budget: int) -> list[int] | None:
        """The blocks of a waiting sequence's prefix that are there. None if it may not take tokens that one which has
        begun could use: it may with no worse a claim, and room for all its prompt."""
        if behind is None:
            return self._prefixes.cached(sequence)
        if self._claim(sequence) > self._claim(behind):
            return None
        too_many = max(len(sequence.token_ids) - budget, 0)
        return self._prefixes.cached_if(sequence, self._blocks.blocks_for(too_many))

    def _claim(self, sequence: Sequence) -> tuple[int, tuple[float, float]]:
        """Least goes first, whoever has arrived first."""
        return sequence.request.priority, self._shares[sequence].service

    def _must_be_next(self, sequence: Sequence, *, wants_blocks: bool) -> bool:
        """Whether nobody may take blocks before a sequence that is passed over, for want of them or otherwise."""
        if sequence.was_preempted:
            return True
        if sequence.unfit_since is None and wants_blocks:
            sequence.unfit_since = self._num_steps
        if sequence.unfit_since is None or self._num_steps - sequence.unfit_since < PATIENCE:
            return False
        self.waiting.put_first(sequence)
        return True

    def _take_adapters(self, sequence: Sequence) -> bool:
        """Take what the sequence needs on the device. If it is not there, it waits for that, and others go on."""
        had_claim = sequence is self._adapters.claimant
        admission = self._adapters.acquire(sequence, self.running)
        if admission == "ready":
            return True
        if admission == "failed":
            self.waiting.remove(sequence)
            self.failed.append(sequence)
            return False
        self.waiting.close_line(sequence)
        if sequence is self._adapters.claimant and not had_claim:
            self.waiting.put_first(sequence)
        return False

    def _start(self, sequence: Sequence, cached: list[int], budget: int) -> Chunk:
        self._prefixes.take_blocks(sequence, cached)
        if sequence.scheduled_at is None:
            sequence.num_cached = sequence.num_computed
        self.cache_queries += len(sequence.token_ids)
        self.cache_hits += sequence.num_computed
        self.waiting.remove(sequence)
        self._shares.end_wait(sequence)
        insort(self.running, sequence, key=lambda other: other.rank)
        chunk = Chunk(sequence, sequence.num_computed, min(sequence.num_to_compute, budget))
        self._shares.count(sequence, chunk.start, chunk.start + chunk.count)
        return chunk

    def _prefetch(self) -> None:
        versions: dict[str, None] = {}  # in the order of their turn
        for sequence in islice(self.waiting.in_order(), PREFETCH_DEPTH):
            versions |= dict.fromkeys(sequence.adaptation.versions)
            self.waiting.close_line(sequence)
        self._residency.prefetch(*versions, claimed=self._adapters.claimed)
