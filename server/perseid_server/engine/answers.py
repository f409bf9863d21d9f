"""From what a step brought one sequence to what it is told."""

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

from perseid_server.engine.messages import ErrorKind, FinishReason, RoutingReport, SequenceOutput
from perseid_server.engine.ports import Chunk, ChunkResult, RoutedChunk
from perseid_server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Ends:
    """What ends a sequence beside its own wishes."""

    max_model_len: int  # tokens, prompt and completion together
    eos_token_ids: Collection[int]

    def length_reached(self, sequence: Sequence) -> FinishReason | None:
        """Whether it may have no further token."""
        most_output = sequence.request.sampling.max_tokens
        full = sequence.num_output >= most_output or len(sequence.token_ids) >= self.max_model_len
        return "length" if full else None


def accept(sequence: Sequence, result: ChunkResult, ends: Ends) -> SequenceOutput:
    """Append the sampled tokens up to the one that ends the sequence, if one does."""
    finished: FinishReason | None = None
    stop_token: int | None = None
    taken = 0
    for token_id in result.token_ids:
        if sequence.is_ended_by(token_id, ends.eos_token_ids):
            finished, stop_token = "stop", token_id
            break
        sequence.append(token_id)
        taken += 1
        finished = ends.length_reached(sequence)
        if finished is not None:
            break
    return SequenceOutput(
        sequence.id,
        result.token_ids[:taken],
        result.logprobs[:taken],
        finish_reason=finished,
        stop_token_id=stop_token,
        accepted_tokens=min(len(result.accepted), taken),
    )


def failure(request_id: str, error: str, kind: ErrorKind = "failed") -> SequenceOutput:
    """It ends without an answer, or in the middle of one."""
    return SequenceOutput(request_id, finish_reason="error", error=error, error_kind=kind)


def too_late(sequence: Sequence) -> str:
    """What a request is told whose deadline is over: whether it waited or ran, and how long."""
    now = time.perf_counter()
    if sequence.scheduled_at is None:
        return f"the deadline passed while the request waited for its turn, for {now - sequence.arrived_at:.2f} s"
    waited, ran = sequence.scheduled_at - sequence.arrived_at, now - sequence.scheduled_at
    return (
        f"the deadline passed while the request ran: {ran:.2f} s and {sequence.num_output} tokens, "
        f"after {waited:.2f} s of waiting"
    )


def with_beginnings(output: SequenceOutput, sequence: Sequence) -> SequenceOutput:
    """What is told once, with the first output."""
    sequence.has_answered = True
    assert sequence.scheduled_at is not None, "it has just run"
    return replace(
        output,
        prompt_logprobs=tuple(sequence.prompt_logprobs) if sequence.wants_prompt_logprobs else None,
        cached_tokens=sequence.num_cached,
        queue_s=sequence.scheduled_at - sequence.arrived_at,
        load_s=sequence.load_s,
        prefill_s=time.perf_counter() - sequence.scheduled_at,
    )


def keep_prompt_logprobs(chunk: Chunk, result: ChunkResult) -> None:
    """Entry i judges prompt token i; nothing judges the first. A recomputed chunk brings the same again."""
    sequence = chunk.sequence
    if sequence.wants_prompt_logprobs:
        kept = sequence.prompt_logprobs or [None]
        sequence.prompt_logprobs = [*kept[: chunk.start + 1], *result.prompt_logprobs]


def routing_report(sequence: Sequence, output: SequenceOutput, routed: RoutedChunk) -> RoutingReport:
    """The prompt's mean shares once, and those of the rows from which tokens were sampled."""
    is_first = output.prefill_s is not None
    total = sum(sequence.prompt_shares)  # a token's shares sum to 1
    prompt = tuple(share / total for share in sequence.prompt_shares) if is_first and total > 0 else None
    return RoutingReport(prompt, routed.sampled[: len(output.token_ids)])
