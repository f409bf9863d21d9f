"""Greedy answers of the base alone: what the null column has to leave as it is."""

from collections.abc import Callable, Sequence

from perseid_server.model.batch import HostBatch
from perseid_server.training.workbench import Workbench

CONCURRENT = 16


def complete(
    bench: Workbench, prompts: Sequence[Sequence[int]], max_tokens: int, told: Callable[[int], None] = lambda _: None
) -> list[tuple[int, ...]]:
    """At most `max_tokens` tokens for each prompt, the end token included. `told` hears how many are done."""
    answers: list[tuple[int, ...]] = []
    for start in range(0, len(prompts), CONCURRENT):
        answers += _together(bench, prompts[start : start + CONCURRENT], max_tokens)
        told(len(answers))
    return answers


def _together(bench: Workbench, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[int, ...]]:
    forward = bench.decoder.bind(bench.kv, bench.pool)
    size = bench.block_size
    width = -(-(max(len(prompt) for prompt in prompts) + max_tokens) // size)
    sequences = [list(prompt) for prompt in prompts]
    running = list(range(len(prompts)))
    done = [0] * len(prompts)  # tokens whose K and V are stored
    for _ in range(max_tokens):
        blocks = [range(index * width, (index + 1) * width) for index in running]
        spans = [(index, place) for index in running for place in range(done[index], len(sequences[index]))]
        starts = [0]
        for index in running:
            starts.append(starts[-1] + len(sequences[index]) - done[index])
        batch = HostBatch(
            token_ids=[sequences[index][place] for index, place in spans],
            positions=[place for _, place in spans],
            slots=[index * width * size + place for index, place in spans],
            query_start=starts,
            context_len=[len(sequences[index]) for index in running],
            blocks=blocks,
            pages=[None] * len(spans),
            logits_rows=[start - 1 for start in starts[1:]],
        )
        best = forward(batch.on(bench.decoder.device)).logits_LV.argmax(-1).tolist()
        for index, token in zip(running, best, strict=True):
            done[index] = len(sequences[index])
            sequences[index].append(token)
        running = [index for index in running if sequences[index][-1] not in bench.spec.eos_token_ids]
        if not running:
            break
    return [tuple(sequence[len(prompt) :]) for sequence, prompt in zip(sequences, prompts, strict=True)]
