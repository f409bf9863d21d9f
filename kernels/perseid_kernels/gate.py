"""Gates: which columns each routed row uses in each projection of a fused linear, and with what weights.

    for routed row r, projection s:   l_c = f_c(G_{s,c} · x[r]) + b_{s,c}        c ∈ columns allowed to r
    I = the k_r largest l_c, ties to the lowest c        w = softmax over I of l_I / T_r
    tally[r, c] += Σ_s w_{s,c}        tally[r, C] += Σ_s H(softmax over all allowed of l / T_r)

x [T, K], G float32 [S · C, K]; logits, softmax and tally float32. Written are the chosen columns in ascending order,
int32 [R, S, max_k] with −1 behind the last, and their weights, float32 [R, S, max_k].

Two launches. The first multiplies tiles of gate rows, of all projections at once, by tiles of rows of x; K is cut into
`splits` parts that are kept apart, and the second adds them in order. Tiles and splits depend on the gates' shape
alone, so a row's logits do not depend on its neighbours, in a prompt or in a decode step. The second has a program for
each row: all its projections side by side, no atomics, and every size is known on the host.

Logits are kept within float32's finite range, and NaN counts as the lowest: whatever x holds, columns are chosen.

CPU paths: `eager_backend.EagerBackend.add_routed` and `native/`. Oracle: `routing.add_routed_oracle`.
Source: MeteoRA (arXiv:2405.13053); `absolute` columns: Arrow (arXiv:2405.11157).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_kernels._triton import cdiv, power_of_two, tl, triton
from perseid_kernels.devices import compiler_options, device_class
from perseid_kernels.routing import Gates, RoutedRows

_ENOUGH_PROGRAMS = 64  # of one row tile: more splits than that save no time
_MAX_SPLITS = 16
_FEWEST_INPUTS = 256  # of one split


@dataclass(frozen=True, slots=True)
class GateConfig:
    """Launch knobs of the gate product."""

    splits: int
    tile_rows: int
    block_c: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What the gates of one fused linear chose."""

    columns: Tensor  # int32 [R, S, max_k], ascending, −1 where fewer are chosen
    weights: Tensor  # float32 [R, S, max_k], meaningless where the column is −1


def choose_config(num_gates: int, num_inputs: int) -> GateConfig:
    """`splits` from the gates' shape alone (see above): enough programs to fill a GPU in a decode step."""
    tiles = cdiv(num_gates, 16)
    splits = max(1, min(_ENOUGH_PROGRAMS // tiles, _MAX_SPLITS, cdiv(num_inputs, _FEWEST_INPUTS)))
    block_k = min(32, max(16, power_of_two(num_inputs)))
    return GateConfig(splits, tile_rows=16, block_c=16, block_k=block_k, num_warps=2, num_stages=3)


def choose_warps(num_columns: int) -> int:
    """Warps of the choice: up to four projections of the padded columns, at most eight numbers a lane."""
    return 1 if num_columns <= 64 else 4 if num_columns <= 256 else 8


@triton.jit
def gate_logits_kernel(
    x,  # [T, K]
    gates,  # float32 [SLICES · C, K]
    rows,  # int32 [R]
    logits,  # float32 [SPLITS, R, SLICES · C]
    R,
    num_gates,  # SLICES · C
    K,
    stride_x,
    split_k,  # inputs in one split, a multiple of BLOCK_K
    SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(0) % SPLITS
    gate = tl.program_id(0) // SPLITS * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    known, live = gate < num_gates, r < R
    row = tl.load(rows + r, mask=live, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK_C, TILE_ROWS), dtype=tl.float32)
    for start in range(split * split_k, tl.minimum((split + 1) * split_k, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < K
        x_KT = tl.load(x + row[None, :] * stride_x + k[:, None], mask=inside[:, None] & live[None, :], other=0.0)
        gates_CK = tl.load(gates + gate[:, None] * K + k[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(gates_CK, x_KT.to(tl.float32), acc, input_precision="ieee")
    at = logits + (tl.cast(split, tl.int64) * R + r)[None, :] * num_gates + gate[:, None]
    tl.store(at, acc, mask=known[:, None] & live[None, :])


@triton.jit
def gate_choice_kernel(
    logits,  # float32 [SPLITS, R, SLICES · C]
    bias,  # float32 [SLICES · C]
    absolute,  # int32 [C]
    allowed,  # int32 [R, C]
    top_k,  # int32 [R]
    temperature,  # float32 [R]
    chosen,  # int32 [R, SLICES, max_k]
    weights,  # float32 [R, SLICES, max_k]
    tally,  # float32 [R, C + 1], added to
    R,
    C,
    max_k,
    GATED: tl.constexpr,  # bit s: projection s has gates
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
):
    MOST: tl.constexpr = 3.4028234663852886e38
    NOT_ALLOWED: tl.constexpr = float("-inf")
    r = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    known = c < C
    gated = (s < SLICES) & ((GATED >> s) & 1 > 0)
    inside = gated[:, None] & known[None, :]
    gate = s[:, None] * C + c[None, :]

    l_SC = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        l_SC += tl.load(logits + (split * R + r) * SLICES * C + gate, mask=inside, other=0.0)
    folded = tl.load(absolute + c, mask=known, other=0) > 0
    l_SC = tl.where(folded[None, :], tl.abs(l_SC), l_SC) + tl.load(bias + gate, mask=inside, other=0.0)
    l_SC = tl.where(l_SC == l_SC, tl.minimum(tl.maximum(l_SC, -MOST), MOST), -MOST)  # noqa: PLR0124  (NaN is not itself)
    may = tl.load(allowed + r * C + c, mask=known, other=0) > 0
    candidate = gated[:, None] & may[None, :]

    left = tl.where(candidate, l_SC, NOT_ALLOWED)
    best_S = tl.max(left, axis=1)
    for _ in range(tl.minimum(tl.load(top_k + r), max_k)):
        largest_S = tl.max(left, axis=1)
        first_S = tl.min(tl.where(left == largest_S[:, None], c[None, :], BLOCK_C), axis=1)
        left = tl.where(c[None, :] == first_S[:, None], NOT_ALLOWED, left)
    taken = candidate & (left == NOT_ALLOWED)

    # (l − max) / T, and not l / T − max / T: a large logit over a small T is no finite number
    from_best = tl.where(candidate, (l_SC - best_S[:, None]) / tl.load(temperature + r), 0.0)
    e_SC = tl.where(candidate, tl.exp(from_best), 0.0)
    kept_SC = tl.where(taken, e_SC, 0.0)
    w_SC = tl.div_rn(kept_SC, tl.where(gated, tl.sum(kept_SC, axis=1), 1.0)[:, None])

    place = tl.cumsum(taken.to(tl.int32), axis=1) - 1
    first_place = (r * SLICES + s) * max_k
    tl.store(chosen + first_place[:, None] + place, tl.broadcast_to(c[None, :], (BLOCK_S, BLOCK_C)), mask=taken)
    tl.store(weights + first_place[:, None] + place, w_SC, mask=taken)
    unused = tl.arange(0, BLOCK_PLACES)[None, :]
    beyond = (unused >= tl.sum(taken.to(tl.int32), axis=1)[:, None]) & (unused < max_k) & (s < SLICES)[:, None]
    tl.store(chosen + first_place[:, None] + unused, -1, mask=beyond)

    # H = log Z − Σ p · (l − max) / T
    all_S = tl.where(gated, tl.sum(e_SC, axis=1), 1.0)
    entropy_S = tl.log(all_S) - tl.sum(tl.where(e_SC > 0, e_SC * from_best, 0.0), axis=1) / all_S
    sums = tally + r * (C + 1)
    tl.store(sums + c, tl.load(sums + c, mask=known) + tl.sum(w_SC, axis=0), mask=known)
    tl.store(sums + C, tl.load(sums + C) + tl.sum(entropy_S, axis=0))


def gate_logits(x_TK: Tensor, gates: Gates, routed: RoutedRows) -> Tensor:
    """G · x of the routed rows, before bias and |·|: float32 [splits, R, S · C], to be added over the splits."""
    num_rows, (num_gates, num_inputs) = routed.rows.numel(), gates.weight.shape
    config = choose_config(num_gates, num_inputs)
    logits = torch.empty((config.splits, num_rows, num_gates), dtype=torch.float32, device=x_TK.device)
    grid = (cdiv(num_gates, config.block_c) * config.splits, cdiv(num_rows, config.tile_rows))
    gate_logits_kernel[grid](
        x_TK,
        gates.weight,
        routed.rows,
        logits,
        num_rows,
        num_gates,
        num_inputs,
        x_TK.stride(0),
        cdiv(cdiv(num_inputs, config.splits), config.block_k) * config.block_k,
        SPLITS=config.splits,
        TILE_ROWS=config.tile_rows,
        BLOCK_C=config.block_c,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **compiler_options(device_class(x_TK.device)),
    )
    return logits


def choose(x_TK: Tensor, gates: Gates, routed: RoutedRows) -> Choice:
    """The choice of every routed row in every projection; adds it to `routed.tally`."""
    num_rows, slices, columns = routed.rows.numel(), len(gates.gated), routed.table.num_columns
    logits = gate_logits(x_TK, gates, routed)
    shape = (num_rows, slices, routed.max_k)
    chosen = torch.empty(shape, dtype=torch.int32, device=x_TK.device)
    weights = torch.empty(shape, dtype=torch.float32, device=x_TK.device)
    gate_choice_kernel[(num_rows,)](
        logits,
        gates.bias,
        routed.table.absolute,
        routed.allowed,
        routed.k,
        routed.temperature,
        chosen,
        weights,
        routed.tally,
        num_rows,
        columns,
        routed.max_k,
        GATED=sum(1 << s for s, gated in enumerate(gates.gated) if gated),
        SLICES=slices,
        SPLITS=logits.shape[0],
        BLOCK_S=power_of_two(slices),
        BLOCK_C=max(16, power_of_two(columns)),
        BLOCK_PLACES=power_of_two(routed.max_k),
        num_warps=choose_warps(columns),
    )
    return Choice(chosen, weights)
