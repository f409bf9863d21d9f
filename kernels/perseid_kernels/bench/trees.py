"""Decode steps with drafted trees beside plain ones, and what drafts would bring with simulated acceptance.

Measured: the steps, each as one recorded graph of its row class (as the server records them), and the heads' pass.
Simulated: how many drafts are accepted (`expected.py`). Neither sampling, nor the walk along the accepted path, nor the
move of its K and V (one launch) is in the times.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from perseid_kernels._triton import power_of_two
from perseid_kernels.backend import AttentionBatch, Backend, TreeRows
from perseid_kernels.bench.expected import NUM_HEADS, chosen_rows, shares, speed_up, tokens_of_step
from perseid_kernels.bench.roofline import LLAMA_8B, ModelShape
from perseid_kernels.bench.sections import Deadline, Report, points
from perseid_kernels.bench.step import StepInputs, build_inputs, build_model, decode_step, triton_packers
from perseid_kernels.bench.timing import host_seconds, seconds
from perseid_kernels.bench.weights import random_packed_int8
from perseid_kernels.matmul_dense import PackedDense
from perseid_kernels.row_tiles import SMALL_TILE_ROWS
from perseid_kernels.triton_backend import TritonBackend

GRID: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1, (1, 4, 16, 32, 64)),
    (8, (16, 32, 64, 128)),
    (16, (32, 64, 128)),
    (64, (128,)),
)
"""Sequences, and rows of all their trees together, the sequences' own last tokens included."""

DRAFT_VOCABULARY = 16384
RANKS = 10
MOST_SLOWER = 1.2  # a step with 16 tree rows beside a plain one, at batch 1
SPEED_UPS = {1: 2.2, 64: 1.0}  # by sequences

SIMULATED = (
    "simulated: tokens a step, and so the speed-ups, take drafts to be accepted as the published accuracies of a 7B "
    "model's heads say (bench/expected.py); measured: all times. Heads are timed with their launches, as the server "
    "runs them; speed-ups count heads over the whole vocabulary, 'with 16k' heads over a draft vocabulary"
)


def tree_inputs(
    shape: ModelShape,
    sizes: list[int],
    context: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    layers: int | None = None,
) -> StepInputs:
    """A binary tree of so many rows in each sequence, whose root is token `context`; rows up to the row class are
    padding. All rows are rows of trees, as in a recorded step."""
    num_rows = sum(sizes)
    missing = row_class(num_rows) - num_rows
    # A sequence more, which has no row, for the padding. The table has room for the largest tree in each.
    plain = build_inputs(shape, len(sizes) + 1, context - 1 + max(sizes), None, device, dtype, layers=layers)
    table, prefix = plain.batch.block_table.tolist(), context - 1
    block = plain.caches[0][0].shape[1]
    masks = [_binary_tree(size) for size in sizes]
    owners = [sequence for sequence, size in enumerate(sizes) for _ in range(size)]
    places = [prefix + row for size in sizes for row in range(size)]
    slots = [table[s][at // block] * block + at % block for s, at in zip(owners, places, strict=True)]
    positions = [prefix + mask.bit_count() - 1 for of_tree in masks for mask in of_tree]

    def ints(values: list[int], padding: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values + [padding] * missing, dtype=dtype, device=device)

    signed = [mask - (1 << 64) if mask >> 63 else mask for of_tree in masks for mask in of_tree]
    trees = TreeRows(
        ancestors=ints(signed, 0, torch.int64),
        rows=torch.arange(num_rows + missing, dtype=torch.int32, device=device),
        sequences=ints(owners, len(sizes), torch.int32),
    )
    starts, contexts = [0, *accumulate(sizes), num_rows], [*(prefix + size for size in sizes), 0]
    return replace(
        plain,
        token_ids=torch.randint(0, shape.vocabulary, (num_rows + missing,), device=device),
        positions=ints(positions, 0, torch.int64),
        slots=ints(slots, -1, torch.int64),
        batch=AttentionBatch(
            query_start=torch.tensor(starts, dtype=torch.int32, device=device),
            context_len=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_table=plain.batch.block_table,
            max_query_len=1,
            max_context_len=max(contexts),
            trees=trees,
        ),
    )


def row_class(num_rows: int) -> int:
    """Rows that a recorded step with so many rows of trees runs."""
    return max(SMALL_TILE_ROWS, power_of_two(num_rows))


def _binary_tree(num_rows: int) -> list[int]:
    """Ancestor masks: row r hangs on row (r − 1) // 2."""
    masks = [1]
    for row in range(1, num_rows):
        masks.append(masks[(row - 1) // 2] | 1 << row)
    return masks


@dataclass(frozen=True, slots=True)
class Heads:
    """Medusa heads of one residual block each, over a packed lm_head that they share."""

    blocks: PackedDense  # [heads · E, E]
    bias: Tensor  # [heads · E]
    lm_head: Any


def random_heads(shape: ModelShape, lm_head: Any, device: torch.device, dtype: torch.dtype) -> Heads:
    """As many as the table of accuracies is of."""
    width = NUM_HEADS * shape.hidden
    weight = torch.randn(width, shape.hidden, dtype=dtype, device=device).div_(shape.hidden**0.5)
    return Heads(PackedDense(weight), torch.zeros(width, dtype=dtype, device=device), lm_head)


def ask_heads(backend: Backend, heads: Heads, hidden: Tensor) -> tuple[list[Any], list[Any]]:
    """(log-probabilities, token ids) of each head's likeliest tokens after each row, on the host: the ops of the
    server's heads. [S, heads, RANKS] each."""
    num_rows, width = hidden.shape
    out = torch.empty(num_rows, heads.blocks.shape[0], dtype=hidden.dtype, device=hidden.device)
    backend.matmul(hidden, heads.blocks, out)
    states = hidden[:, None] + silu((out + heads.bias).view(num_rows, -1, width))
    logits = torch.empty(states.shape[0] * states.shape[1], heads.lm_head.shape[0], dtype=out.dtype, device=out.device)
    backend.matmul(states.view(-1, width), heads.lm_head, logits)
    logits = logits.float().view(num_rows, states.shape[1], -1)
    largest, tokens = logits.topk(min(RANKS, logits.shape[-1]), dim=-1)
    return (largest - logits.logsumexp(dim=-1, keepdim=True)).tolist(), tokens.tolist()


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds at one number of sequences."""

    plain: float
    trees: dict[int, float]  # by rows
    heads: float
    few_tokens: float  # heads over a draft vocabulary


def bench_trees(
    report: Report,
    deadline: Deadline,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shape: ModelShape = LLAMA_8B,
    grid: tuple[tuple[int, tuple[int, ...]], ...] = GRID,
    context: int = 128,
    draft_vocabulary: int = DRAFT_VOCABULARY,
) -> None:
    """Targets: 16 tree rows ≤ 1.2 × the plain step at batch 1; with what the budget takes, ≥ 2.2 × at batch 1 and
    ≥ 1 × at 64."""
    backend = TritonBackend(device, dtype)
    model = build_model(shape, triton_packers(shape, device), device, dtype, 1)
    heads = random_heads(shape, model.head, device, dtype)
    few = replace(heads, lm_head=random_packed_int8(draft_vocabulary, shape.hidden, 32, device))
    report.notes.append(SIMULATED)

    def step_seconds(inputs: StepInputs) -> float:
        return seconds(lambda: decode_step(backend, model, inputs), device)

    for num_sequences, sizes in points(report, deadline, grid):
        hidden = torch.randn(num_sequences, shape.hidden, device=device).to(dtype)
        times = Times(
            plain=step_seconds(build_inputs(shape, num_sequences, context, None, device, dtype)),
            trees={
                rows: step_seconds(tree_inputs(shape, shares(rows, num_sequences), context, device, dtype))
                for rows in sizes
            },
            heads=host_seconds(lambda: ask_heads(backend, heads, hidden)),  # noqa: B023  (runs at once)
            few_tokens=host_seconds(lambda: ask_heads(backend, few, hidden)),  # noqa: B023  (runs at once)
        )
        add_rows(report, num_sequences, times)


def add_rows(report: Report, num_sequences: int, times: Times) -> None:
    """A row for the plain step and for each size of trees; and which of them the budget takes."""
    chosen = chosen_rows(num_sequences, times.trees, times.heads, times.plain)
    for rows, taken in ((0, times.plain), *times.trees.items()):
        drafts = rows > num_sequences  # else it is the plain step, or trees of their roots alone
        fast, fast_with_few = (
            speed_up(num_sequences, rows, taken, heads, times.plain) if rows else 1.0
            for heads in (times.heads, times.few_tokens)
        )
        is_chosen = rows == chosen if drafts else rows == 0 and chosen == num_sequences
        met = []
        if (num_sequences, rows) == (1, 16):
            met.append(taken <= MOST_SLOWER * times.plain)
        if is_chosen and num_sequences in SPEED_UPS:
            met.append(fast >= SPEED_UPS[num_sequences])
        report.rows.append(
            {
                "sequences": num_sequences,
                "step": "trees" if rows else "plain",
                "rows": rows or num_sequences,
                "ms": taken * 1e3,
                "× plain": taken / times.plain,
                "heads ms": times.heads * 1e3,
                "with 16k ms": times.few_tokens * 1e3,
                "tokens": tokens_of_step(num_sequences, rows) / num_sequences if rows else 1.0,
                "speed-up": fast,
                "speed-up with 16k": fast_with_few,
                "chosen": is_chosen,
                "target met": all(met) if met else None,
            }
        )
