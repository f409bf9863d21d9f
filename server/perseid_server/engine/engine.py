"""The engine: `submit`, `abort`, and one `step()` that is repeated while there is work."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from perseid_server.adapters.backoff import soonest
from perseid_server.engine.answers import (
    Ends,
    accept,
    failure,
    keep_prompt_logprobs,
    routing_report,
    too_late,
    with_beginnings,
)
from perseid_server.engine.attempts import Attempts
from perseid_server.engine.deadlines import Deadlines
from perseid_server.engine.describing import describe
from perseid_server.engine.drafting import Drafter, Room
from perseid_server.engine.kv_blocks import BlockAllocator
from perseid_server.engine.messages import AdapterState, EngineStats, ErrorKind, SequenceOutput, StepOutputs, Submit
from perseid_server.engine.ports import Chunk, ChunkResult, Residency, Runner, ScheduledStep
from perseid_server.engine.scheduler import Scheduler, SchedulerLimits
from perseid_server.engine.sequence import Sequence
from perseid_server.engine.state import EngineState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine holds requests to."""

    max_model_len: int  # tokens, prompt and completion together
    max_batch_tokens: int
    max_num_seqs: int
    eos_token_ids: tuple[int, ...] = ()


class Engine:
    """All calls come from one thread."""

    def __init__(
        self,
        limits: EngineLimits,
        blocks: BlockAllocator,
        residency: Residency,
        runner: Runner,
        drafter: Drafter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: what deadlines are on, s."""
        # a sequence that all blocks do not hold could never go on
        limits = replace(limits, max_model_len=min(limits.max_model_len, blocks.num_blocks * blocks.block_size))
        self._limits = limits
        self._clock = clock
        self._deadlines = Deadlines()
        self._ends = Ends(limits.max_model_len, limits.eos_token_ids)
        self._blocks = blocks
        self._residency = residency
        self._runner = runner
        self._drafter = drafter
        self._scheduler = Scheduler(SchedulerLimits(limits.max_batch_tokens, limits.max_num_seqs), blocks, residency)
        self._sequences: dict[str, Sequence] = {}
        self._refused: list[SequenceOutput] = []  # ended before they began, told with the next step
        self._num_arrivals = 0
        self._attempts = Attempts()
        self._routed: dict[str, float] = {}  # shares of routed rows by adapter version, BASE_COLUMN the base
        self._gate_entropy = 0.0
        self._draft_budget = 0
        self.before_run: Callable[[ScheduledStep], None] = lambda _: None  # told of each step about to run

    @property
    def has_work(self) -> bool:
        """Whether a step would do or tell anything."""
        return bool(self._sequences or self._refused)

    @property
    def is_loading(self) -> bool:
        """Whether an adapter or heads are on their way: a step will take them over when they have come."""
        return self._residency.is_loading or self._drafter.heads.is_loading

    @property
    def retry_in_s(self) -> float | None:
        """After how long a step tries a load that failed or had no room, though nothing else happens. None: never."""
        return soonest(self._residency.retry_in_s, self._drafter.heads.retry_in_s)

    def submit(self, request: Submit) -> None:
        """Let a request wait for its turn. One that can never run ends with an error in the next step's outputs."""
        problem = self._problem_with(request)
        if problem:
            self._refused.append(failure(request.request_id, problem))
            return
        sequence = Sequence(request, self._num_arrivals)
        self._num_arrivals += 1
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)
        self._deadlines.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a sequence and free all it holds at once. Unknown ids are ignored: it may just have ended."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence)

    def register_adapter(self, version: str, path: str, *, pinned: bool = False) -> None:
        """Make a version known; it is loaded when it is first needed, or at once when pinned."""
        self._residency.register(version, path)
        if pinned:
            self._residency.pin(version, True)

    def register_gate_set(
        self, version: str, path: str | None, adapters: tuple[str, ...], *, null: bool, pinned: bool = False
    ) -> None:
        """Make a gate set known; it is loaded when it is first needed, or at once when pinned."""
        self._residency.register_gate_set(version, path, adapters, null=null, pinned=pinned)

    def pin_adapter(self, version: str, *, pinned: bool) -> None:
        """Keep a version on the device, or let it go."""
        if self._residency.knows(version):
            self._residency.pin(version, pinned)

    def forget_adapter(self, version: str) -> None:
        """No new request names this version; it leaves memory with its last user."""
        self._routed.pop(version, None)
        self._drafter.forget_adapter(version)
        self._scheduler.adapter_gone(version)
        if self._residency.knows(version):
            self._residency.forget(version)

    forget_gate_set = forget_adapter

    def register_heads(self, version: str, path: str) -> None:
        """Make Medusa heads known and load them."""
        self._drafter.heads.register(version, path)

    def forget_heads(self, version: str) -> None:
        """These heads draft no more."""
        self._drafter.heads.forget(version)

    def step(self) -> StepOutputs:
        """Schedule, run, commit."""
        outputs, self._refused = self._refused, []
        moved = self._residency_events(outputs)
        outputs += self._drop_late()
        decoding = self._scheduler.decoding
        num_rows = len(decoding) + self._scheduler.num_prefill_rows
        room = Room(num_rows, self._scheduler.most_drafts, self._limits.max_model_len)
        plan = self._drafter.plan(decoding, room)
        step = self._scheduler.schedule(plan.drafts, admits=not self._attempts.last_failed)
        self._draft_budget = step.num_drafts
        outputs += self._drop_failed()
        started = time.perf_counter()
        results = self._run(step, outputs)
        if results:
            self._drafter.learn(plan, step, results, time.perf_counter() - started)
        for chunk, result in zip(step.chunks, results, strict=False):  # no results when the step failed
            outputs += self._commit(chunk, result)
        return StepOutputs(
            outputs=tuple(outputs),
            stats=self.stats(),
            adapters=moved,
            iteration_tokens=step.num_rows if results else 0,
        )

    def stats(self) -> EngineStats:
        """Gauges and counters for the metrics."""
        scheduler, adapters = self._scheduler, self._residency.stats()
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_blocks_used=self._blocks.num_blocks - self._blocks.num_free,
            kv_blocks_total=self._blocks.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.cache_queries,
            prefix_cache_hits=scheduler.cache_hits,
            adapter_pages_used=adapters.pages_used,
            adapter_pages_total=adapters.pages_total,
            adapter_lookups=adapters.lookups,
            adapter_hits=adapters.hits,
            running_adapters=_adapters_of(scheduler.running),
            waiting_adapters=scheduler.waiting.adapters,
            routed_tokens=tuple(self._routed.items()),
            gate_entropy=self._gate_entropy,
            speculation=self._drafter.stats(),
            draft_budget=self._draft_budget,
        )

    def describe(self, limit: int) -> EngineState:
        """For an operator who looks; lists of at most `limit`."""
        return describe(self._scheduler, self._residency, self._blocks, limit)

    def adapter_state(self, version: str) -> AdapterState:
        """Where a version lives, and why it cannot be loaded if so."""
        holder = self._drafter.heads if self._drafter.heads.knows(version) else self._residency
        return AdapterState(version, holder.location(version), holder.error(version))

    # --- submit -------------------------------------------------------------------------------------------------

    def _problem_with(self, request: Submit) -> str | None:
        length = len(request.prompt_token_ids)
        if request.request_id in self._sequences:
            return f"request id {request.request_id!r} is in use"
        if length == 0:
            return "the prompt has no tokens"
        if length + min(request.sampling.max_tokens, 1) > self._limits.max_model_len:
            return f"the prompt has {length} tokens; prompt and completion may have {self._limits.max_model_len}"
        if not 0 < request.weight < math.inf or math.isnan(request.deadline or 0.0):
            return f"weight {request.weight}, deadline {request.deadline}: expected numbers, the weight above 0"
        unknown = next((each for each in request.adaptation.versions if not self._residency.knows(each)), None)
        return None if unknown is None else f"version {unknown[:12]} is not registered"

    # --- step ---------------------------------------------------------------------------------------------------

    def _residency_events(self, outputs: list[SequenceOutput]) -> tuple[AdapterState, ...]:
        events = self._residency.poll()
        for version, why in events.failed.items():
            logger.error("adapter %s cannot be loaded: %s", version[:12], why)
            waiting = [sequence for sequence in self._scheduler.waiting if version in sequence.adaptation.versions]
            kind: ErrorKind = "unavailable" if version in events.passing else "failed"
            told = f"the adapter cannot be loaded: {why}"
            outputs += [self._end_with_error(sequence, told, kind) for sequence in waiting]
        for version in events.moved:
            if self._residency.knows(version) and self._residency.location(version) == "device":
                self._scheduler.adapter_came(version)
        heads = self._drafter.heads.poll()
        changed = {*events.moved, *events.failed, *heads.moved, *heads.failed}
        known = [version for version in changed if self._residency.knows(version) or self._drafter.heads.knows(version)]
        return tuple(self.adapter_state(version) for version in sorted(known))

    def _drop_late(self) -> Iterator[SequenceOutput]:
        """Sequences whose deadline is over end before the step is scheduled, and leave it their blocks."""
        for sequence in self._deadlines.passed(self._clock()):
            self._end(sequence)
            yield failure(sequence.id, too_late(sequence), "deadline")

    def _drop_failed(self) -> Iterator[SequenceOutput]:
        failed, self._scheduler.failed = self._scheduler.failed, []
        for sequence in failed:
            why = self._residency.problem(*sequence.adaptation.versions) or "unknown"
            yield self._end_with_error(sequence, f"the adapter cannot be loaded: {why}")

    def _run(self, step: ScheduledStep, outputs: list[SequenceOutput]) -> tuple[ChunkResult, ...]:
        if not step.chunks:
            return ()
        self.before_run(step)
        results, loss = self._attempts.run(self._runner, step)
        if loss is not None:
            outputs.append(self._end_with_error(loss.sequence, loss.error, loss.kind))
        return results

    def _commit(self, chunk: Chunk, result: ChunkResult) -> Iterator[SequenceOutput]:
        """Take over what a chunk brought; yields the sequence's output if there is anything to tell."""
        sequence = chunk.sequence
        if result.error is not None:
            yield self._end_with_error(sequence, result.error)
            return
        keep_prompt_logprobs(chunk, result)
        self._count_routed(chunk, result)
        samples = chunk.samples  # until its sequence grows
        if samples and sequence.request.sampling.max_tokens == 0:
            output = SequenceOutput(sequence.id, finish_reason="length")
        else:
            output = accept(sequence, result, self._ends)
        self._scheduler.computed(chunk, output.accepted_tokens)
        if not samples:
            return
        output = replace(output, drafted_tokens=chunk.num_rows - chunk.count)
        if not sequence.has_answered:
            output = with_beginnings(output, sequence)
        if sequence.request.report_routing and result.routed is not None:
            output = replace(output, routing=routing_report(sequence, output, result.routed))
        if output.finish_reason is not None:
            self._end(sequence)
        yield output

    def _count_routed(self, chunk: Chunk, result: ChunkResult) -> None:
        routed, routing = result.routed, chunk.sequence.adaptation.routing
        if routed is None or routing is None or not math.isfinite(sum(routed.shares) + routed.entropy):
            return  # numbers of a broken row would stay in the sums for ever
        for column, share in zip(routing.columns, routed.shares, strict=True):
            if column is not None:
                self._routed[column] = self._routed.get(column, 0.0) + share
        self._gate_entropy += routed.entropy
        chunk.sequence.add_prompt_shares(routed.prompt_shares)

    def _end_with_error(self, sequence: Sequence, error: str, kind: ErrorKind = "failed") -> SequenceOutput:
        self._end(sequence)
        return failure(sequence.id, error, kind)

    def _end(self, sequence: Sequence) -> None:
        self._drafter.ended(sequence)
        self._deadlines.ended(sequence)
        self._scheduler.remove(sequence)
        self._sequences.pop(sequence.id, None)


def _adapters_of(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({version for sequence in sequences for version in sequence.adaptation.adapters}))
