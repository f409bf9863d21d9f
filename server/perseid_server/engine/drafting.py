"""Drafts for the next step: who is asked for them, which are worth a row, and what became of them."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from perseid_server.engine.messages import SpeculationStats
from perseid_server.engine.ports import Chunk, ChunkResult, Heads, ScheduledStep
from perseid_server.engine.sequence import Sequence as Running
from perseid_server.speculation.budget import Habits, Lull, best_count, least_worthwhile
from perseid_server.speculation.claims import MOST_CERTAIN, NGRAM, Claim, Record, Records
from perseid_server.speculation.draft import FIRST_CLAIMS, Candidates, Draft, DraftBuilder
from perseid_server.speculation.ngram import TokenText
from perseid_server.speculation.step_clock import StepClock
from perseid_server.speculation.tree import MAX_TREE_ROWS, ROOT

logger = logging.getLogger(__name__)

MOST_NODES = MAX_TREE_ROWS - 1
SEQUENCE_MEMORY = 24.0
"""Claims after which a sequence's own record of them counts 1/e."""


@dataclass(slots=True)
class DraftState:
    """What is remembered of one sequence."""

    text: TokenText = field(default_factory=TokenText)
    record: Record = field(default_factory=Record)  # this text may be easier or harder to foresee than others


@dataclass(frozen=True, slots=True)
class Room:
    """What the next step has room for."""

    num_rows: int  # without drafts
    most_drafts: int  # rows
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Drafts by request id, and what it usually takes to ask heads for them."""

    drafts: Mapping[str, Draft] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()  # request ids whose heads were asked
    seconds: float = 0.0  # of asking, and of building drafts from the answers
    num_sequences: int = 0  # that decode


@dataclass(slots=True)
class _Count:
    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds_saved: float = 0.0


NO_PLAN = Plan()


class Drafter:
    """Plans drafts before a step is scheduled and learns from it afterwards."""

    def __init__(self, clock: StepClock, heads: Heads, fixed: int | None = None) -> None:
        """`fixed`: so many drafted tokens for each sequence, whether they pay or not; None: those that pay."""
        self.heads = heads
        self._clock = clock
        self._fixed = None if fixed is None else min(fixed, MOST_NODES)
        self._records = Records()
        self._habits = Habits()
        self._lull = Lull()
        self._states: dict[str, DraftState] = {}
        self._counts: defaultdict[str, _Count] = defaultdict(_Count)
        self._counted: set[str] = set()  # labels, in the last step

    def plan(self, decoding: Sequence[Running], room: Room) -> Plan:
        """Drafts for sequences of which each has one token to compute. Whatever goes wrong here costs drafts only."""
        self._counted = set()
        try:
            return self._plan(decoding, room)
        except Exception:
            logger.exception("nothing is drafted from now on: planning drafts failed")
            self._fixed = 0
            return NO_PLAN

    def learn(self, plan: Plan, step: ScheduledStep, results: Sequence[ChunkResult], seconds: float) -> None:
        """Take in what a step brought. Whatever goes wrong here costs drafts only."""
        try:
            self._learn(plan, step, results, seconds)
        except Exception:
            logger.exception("nothing is drafted from now on: learning from drafts failed")
            self._fixed = 0

    def _learn(self, plan: Plan, step: ScheduledStep, results: Sequence[ChunkResult], seconds: float) -> None:
        decodes = [
            (chunk, result)
            for chunk, result in zip(step.chunks, results, strict=True)
            if chunk.samples and chunk.count == 1 and result.token_ids
        ]
        if not decodes:
            return
        drafted = sum(len(chunk.draft.tree) for chunk, _ in decodes if chunk.draft is not None)
        if step.num_rows == len(decodes) + drafted:
            self._clock.saw(step.num_rows, seconds, trees=drafted > 0)
        costs = _Costs.of(self._clock, len(decodes), step.num_rows, drafted, plan)
        saved: defaultdict[str, list[float]] = defaultdict(list)  # by label, of those whose heads were asked
        for chunk, result in decodes:
            sequence = chunk.sequence
            if sequence.request.speculation.mode == "off":
                continue
            label = sequence.label
            was_asked = sequence.id in plan.asked
            self._count(label, chunk, result, costs, was_asked)
            if chunk.draft is not None:
                self._check_claims(label, sequence, chunk.draft, result)
            if was_asked:
                saved[label].append(costs.saved_by_heads(chunk.draft, result))
        for label, tokens in saved.items():
            self._habits.saw(label, plan.num_sequences, sum(tokens) / len(tokens))

    def stats(self) -> tuple[SpeculationStats, ...]:
        """Counters of what the last step counted, by adapter: of thousands, few are in one step."""
        counted = ((label, self._counts[label]) for label in sorted(self._counted))
        return tuple(
            SpeculationStats(label, count.steps, count.tokens, count.drafted, count.accepted, count.seconds_saved)
            for label, count in counted
        )

    def ended(self, sequence: Running) -> None:
        """The sequence is over."""
        self._states.pop(sequence.id, None)

    def forget_adapter(self, version: str) -> None:
        """The version is not used any more."""
        self._counts.pop(version, None)
        self._counted.discard(version)
        self._records.forget(version)
        self._habits.forget(version)

    # --- plan ---------------------------------------------------------------------------------------------------

    def _plan(self, decoding: Sequence[Running], room: Room) -> Plan:
        depths = [_depth_left(sequence, room.max_model_len) for sequence in decoding]
        wanting = [sequence for sequence, depth in zip(decoding, depths, strict=True) if depth > 0]
        if not wanting or self._fixed == 0 or room.most_drafts <= 0:
            return NO_PLAN
        floor = 0.0 if self._fixed is not None else least_worthwhile(self._clock, len(decoding), room.num_rows)
        if floor >= MOST_CERTAIN or self._lull.skips(floor):
            return NO_PLAN
        asking = self._asking(wanting, len(decoding), floor)
        started = time.perf_counter()
        candidates = self._ask(asking)
        drafts: dict[str, Draft] = {}
        for sequence, depth in zip(decoding, depths, strict=True):
            rows = room.max_model_len - len(sequence.token_ids)  # a tree's rows are stored behind the sequence
            draft = self._draft(sequence, candidates.get(sequence.id), floor, depth, rows) if depth > 0 else None
            if draft is not None:
                drafts[sequence.id] = draft
        # what is made of the answers is part of what asking costs: as much as the answers, in wide batches
        seconds = self._habits.asking(len(asking), time.perf_counter() - started) if asking else 0.0
        if self._fixed is None:
            drafts = self._worthwhile(drafts, len(decoding), room)
        self._lull.saw(found=bool(drafts))
        return Plan(drafts, frozenset(candidates), seconds, len(decoding))

    def _ask(self, asking: Sequence[Running]) -> dict[str, Candidates]:
        """What heads say, by request id."""
        answers = self.heads.propose(asking) if asking else ()
        return dict(zip((sequence.id for sequence in asking), answers, strict=True))

    def _asking(self, wanting: Iterable[Running], num_sequences: int, floor: float) -> list[Running]:
        asks: dict[str, bool] = {}  # by label: a habit counts steps, not sequences
        asking = []
        for sequence in wanting:
            if not sequence.request.speculation.uses_heads or not self.heads.can_propose(sequence):
                continue
            label = sequence.label
            if label not in asks:
                asks[label] = self._fixed is not None or self._habits.asks(label, num_sequences, floor)
            if asks[label]:
                asking.append(sequence)
        return asking

    def _draft(
        self, sequence: Running, candidates: Candidates | None, least_value: float, max_depth: int, max_rows: int
    ) -> Draft | None:
        state = self._states.get(sequence.id)
        if state is None:
            state = self._states[sequence.id] = DraftState()
        match = state.text.match(sequence.token_ids) if sequence.request.speculation.uses_ngrams else None
        if candidates is None and match is None:
            return None
        estimate = partial(self._records.estimate, sequence.label, of_sequence=state.record.factor)
        if match is not None and estimate(FIRST_CLAIMS[match.size]) < least_value:
            match = None
        if candidates is None and match is None:
            return None  # nothing is built for it: this is the way of most where drafts do not pay
        most = MOST_NODES if self._fixed is None else self._fixed
        builder = DraftBuilder(estimate, least_value)
        if candidates is not None:
            builder.add_heads(candidates, most)
        if match is not None:
            builder.add_match(sequence.token_ids, match, most)
        return builder.build(min(most, max_rows), max_depth)

    def _worthwhile(self, drafts: Mapping[str, Draft], num_sequences: int, room: Room) -> dict[str, Draft]:
        """The likeliest nodes of all drafts, as many as pay and have room."""
        nodes = sorted(
            ((value, request_id) for request_id, draft in drafts.items() for value in draft.tree.values), reverse=True
        )
        del nodes[room.most_drafts :]
        count = best_count(self._clock, num_sequences, [value for value, _ in nodes], room.num_rows)
        taken: defaultdict[str, int] = defaultdict(int)
        for _, request_id in nodes[:count]:
            taken[request_id] += 1
        return {request_id: drafts[request_id].first(kept) for request_id, kept in taken.items()}

    # --- learn --------------------------------------------------------------------------------------------------

    def _count(self, label: str, chunk: Chunk, result: ChunkResult, costs: "_Costs", was_asked: bool) -> None:
        self._counted.add(label)
        count = self._counts[label]
        count.steps += 1
        count.tokens += len(result.token_ids)
        count.drafted += 0 if chunk.draft is None else len(chunk.draft.tree)
        count.accepted += len(result.accepted)
        count.seconds_saved += costs.seconds_saved(chunk.draft, result, was_asked)

    def _check_claims(self, label: str, sequence: Running, draft: Draft, result: ChunkResult) -> None:
        """Nodes whose parent was accepted were put to the test; one of each parent's children at most was right."""
        accepted = set(result.accepted)
        record = self._states[sequence.id].record if sequence.id in self._states else Record()
        for node, parent in enumerate(draft.tree.parents):
            if parent != ROOT and parent not in accepted:
                continue
            right = node in accepted
            for claim in draft.claims[node]:
                record.add(self._records.estimate(label, claim), right, SEQUENCE_MEMORY)
                self._records.add(label, claim, right=right)


@dataclass(frozen=True, slots=True)
class _Costs:
    """Of one step, in seconds."""

    token: float  # of a token, had nothing been drafted
    row: float  # of a drafted row
    asking: float  # of drafting, for each sequence whose heads were asked

    @staticmethod
    def of(clock: StepClock, num_sequences: int, num_rows: int, drafted: int, plan: Plan) -> "_Costs":
        plain = clock.seconds(num_rows - drafted, trees=False)
        row = (clock.seconds(num_rows, trees=True) - plain) / drafted if drafted else 0.0
        token = clock.seconds(num_sequences, trees=False) / num_sequences
        return _Costs(token, row, plan.seconds / max(len(plan.asked), 1))

    def seconds_saved(self, draft: Draft | None, result: ChunkResult, was_asked: bool) -> float:
        rows = 0 if draft is None else len(draft.tree)
        return len(result.accepted) * self.token - rows * self.row - (self.asking if was_asked else 0.0)

    def saved_by_heads(self, draft: Draft | None, result: ChunkResult) -> float:
        """In tokens; what prompt lookup would have drafted as well does not count."""
        own = set() if draft is None else {node for node, claims in enumerate(draft.claims) if not _is_free(claims)}
        accepted = len(own.intersection(result.accepted))
        return accepted - (len(own) * self.row + self.asking) / self.token


def _is_free(claims: Sequence[Claim]) -> bool:
    return any(claim.kind[0] == NGRAM for claim in claims)


def _depth_left(sequence: Running, max_model_len: int) -> int:
    """Tokens that may be accepted before the sequence's last one; 0 for those that want no drafts."""
    if sequence.request.speculation.mode == "off" or sequence.num_output == 0:
        return 0
    left = min(sequence.request.sampling.max_tokens - sequence.num_output, max_model_len - len(sequence.token_ids))
    return left - 1
