"""Each kernel against its float32 oracle on this device, before anything is measured.

Inputs and weights are rounded to the compute dtype before the oracle sees them, so what is left is the kernel's
own error: the order of float32 sums, and one rounding of the result. Also checked: a row's bits do not depend on
its neighbours, and a recorded graph repeats its step.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from perseid_kernels.activation import silu_mul_oracle
from perseid_kernels.attention import attention_oracle
from perseid_kernels.backend import AttentionBatch, SlotMoves, TreeRows
from perseid_kernels.bench.routed import routed_rows
from perseid_kernels.bench.sections import CheckFailed, Deadline, Report, points
from perseid_kernels.bench.tree_checks import check_only_trees
from perseid_kernels.bench.weights import random_gates, random_int4, random_pages
from perseid_kernels.expand import expand_oracle
from perseid_kernels.move_slots import move_slots_oracle
from perseid_kernels.norm import rms_norm_oracle
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.rope import rope_oracle
from perseid_kernels.routing import RoutedRows, add_routed_oracle
from perseid_kernels.row_tiles import StaticSegments
from perseid_kernels.segments import PageList, Segments
from perseid_kernels.shrink import shrink_oracle
from perseid_kernels.triton_backend import TritonBackend
from perseid_kernels.weights import DenseWeight, Int8Weight, Weight

Check = Callable[[TritonBackend, torch.Generator], float]


def tolerance(dtype: torch.dtype) -> float:
    """‖error‖ / ‖expected‖ allowed: twice a rounding of the result to `dtype`, and some for sums in float32."""
    return 2 * torch.finfo(dtype).eps + 2e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64, on the CPU; NaN counts as infinite."""
    wanted = expected.double().cpu()
    error = float((actual.double().cpu() - wanted).norm() / wanted.norm().clamp_min(1e-30))
    return error if error == error else float("inf")  # noqa: PLR0124  (NaN is not itself)


def _product(kind: str, num_outputs: int, num_inputs: int, num_rows: int) -> Check:
    def run(backend: TritonBackend, rng: torch.Generator) -> float:
        device, dtype = backend.device, backend.compute_dtype
        weight = _weight(kind, num_outputs, num_inputs, rng)
        packed = backend.pack(weight, device)
        x = torch.randn(num_rows, num_inputs, generator=rng).to(dtype).to(device)
        out = torch.full((num_rows, num_outputs), float("nan"), dtype=dtype, device=device)
        backend.matmul(x, packed, out)
        alone = torch.empty(1, num_outputs, dtype=dtype, device=device)
        backend.matmul(x[-1:], packed, alone)
        if not torch.equal(alone[0], out[-1]):
            raise CheckFailed(f"{kind} {num_outputs} × {num_inputs}: a row alone differs from it among {num_rows}")
        rounded = weight.dequantize().to(dtype).to(device).float()
        return relative_error(out, x.float() @ rounded.T)

    return run


def _weight(kind: str, num_outputs: int, num_inputs: int, rng: torch.Generator) -> Weight:
    if kind in {"affine", "nf4"}:
        return random_int4(rng, num_outputs, num_inputs, 32 if kind == "affine" else 64, affine=kind == "affine")
    if kind == "int8":
        codes = torch.randint(-128, 128, (num_outputs, num_inputs), generator=rng, dtype=torch.int8)
        return Int8Weight(codes, torch.rand(num_outputs, num_inputs // 32, generator=rng) / 100, 32)
    return DenseWeight(torch.randn(num_outputs, num_inputs, generator=rng))


def _lora(num_rows: int, num_inputs: int, slices: tuple[int, ...]) -> Check:
    """Mixed: base rows, one and four pages, a blend. As segments of the step, and static in a graph."""

    def run(backend: TritonBackend, rng: torch.Generator) -> float:
        device, dtype = backend.device, backend.compute_dtype
        pages = random_pages(8, num_inputs, slices, device, dtype)
        kinds = (None, PageList.of((3,)), PageList.of((0, 1, 2, 7)), PageList((4, 5), (0.5, -2.0)))
        lists = [kinds[t % len(kinds)] for t in range(num_rows)]
        x = torch.randn(num_rows, num_inputs, generator=rng).to(dtype).to(device)
        out = torch.zeros(num_rows, sum(slices), dtype=dtype, device=device)
        segments = Segments.build(lists, device)
        host = Segments.build(lists)
        assert segments is not None
        assert host is not None
        backend.add_lora(x, pages, segments, out)
        _check_replay(backend, x, pages, lists, out)
        z = shrink_oracle(x.cpu(), pages.a.cpu(), host)
        base = torch.zeros(num_rows, sum(slices))
        return relative_error(out, expand_oracle(z, pages.b.cpu(), slices, host, base)) / 2  # z is rounded as well

    return run


def _check_replay(
    backend: TritonBackend, x: Tensor, pages: RankPages, lists: list[PageList | None], expected: Tensor
) -> None:
    static = StaticSegments.allocate(len(lists), 8 * len(lists), backend.device)
    out = torch.zeros_like(expected)

    def step() -> None:
        out.zero_()
        backend.add_lora(x, pages, static, out)

    replay = backend.record(step)
    static.fill(lists)
    replay()
    if not torch.equal(out, expected):
        raise CheckFailed("low-rank sums: the replayed graph differs from the launch")


def _routed(num_rows: int, columns: int, k: int, num_inputs: int, slices: tuple[int, ...]) -> Check:
    """Adapters of two pages, and the base; the last row among all and alone."""

    def run(backend: TritonBackend, rng: torch.Generator) -> float:
        device, dtype = backend.device, backend.compute_dtype
        pages = random_pages(2 * (columns - 1), num_inputs, slices, device, dtype)
        gates = random_gates(columns, num_inputs, len(slices), device)
        routed = routed_rows(gates, num_rows, columns, k, 32, device)
        x = torch.randn(num_rows, num_inputs, generator=rng).to(dtype).to(device)
        out = torch.zeros(num_rows, sum(slices), dtype=dtype, device=device)
        wanted, tally = add_routed_oracle(x, gates, pages, routed, out)
        backend.add_routed(x, gates, pages, routed, out)
        alone = torch.zeros_like(out[:1])
        backend.add_routed(x[-1:], gates, pages, _first_row(routed), alone)
        if not torch.equal(alone[0], out[-1]):
            raise CheckFailed(f"routed sums: a row alone differs from it among {num_rows}")
        return max(relative_error(out, wanted) / 2, relative_error(routed.tally, tally))  # z is rounded as well

    return run


def _first_row(routed: RoutedRows) -> RoutedRows:
    """Row 0 alone, with a tally of its own."""
    names = ("rows", "k", "temperature", "allowed", "tally")
    return replace(routed, **{name: getattr(routed, name)[:1].clone() for name in names})


def _attention(heads: int, kv_heads: int, head_dim: int) -> Check:
    """Decodes below and above a span of 512, a prompt, and a chunk on a prefix, in one batch."""

    def run(backend: TritonBackend, rng: torch.Generator) -> float:
        device, dtype = backend.device, backend.compute_dtype
        new, context = [1, 33, 1, 20], [40, 33, 700, 90]
        blocks = [-(-length // 16) for length in context]
        table = torch.zeros(len(new), max(blocks), dtype=torch.int32)
        order = torch.randperm(sum(blocks), generator=rng).to(torch.int32)
        for s, count in enumerate(blocks):
            table[s, :count] = order[sum(blocks[:s]) : sum(blocks[: s + 1])]
        starts = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
        lengths = torch.tensor(context, dtype=torch.int32)
        host = AttentionBatch(starts, lengths, table, max(new), max(context))
        batch = AttentionBatch(starts.to(device), lengths.to(device), table.to(device), max(new), max(context))
        shape = (sum(blocks), 16, kv_heads, head_dim)
        k, v = (torch.randn(shape, generator=rng).to(dtype) for _ in range(2))
        q = torch.randn(sum(new), heads, head_dim, generator=rng).to(dtype)
        out = torch.full(q.shape, float("nan"), dtype=dtype, device=device)
        backend.attention(q.to(device), k.to(device), v.to(device), batch, head_dim**-0.5, out)
        return relative_error(out, attention_oracle(q, k, v, host, head_dim**-0.5)) / 2  # p is rounded as well

    return run


def _trees(heads: int, kv_heads: int, head_dim: int) -> Check:
    """A tree behind a short prefix and a chain across a span of 512, beside a chunk and a decode. The rows of the chain
    are decoded too: the same bits."""

    def run(backend: TritonBackend, rng: torch.Generator) -> float:
        device, dtype = backend.device, backend.compute_dtype
        masks = [0, 0, 0b1, 0b11, 0b101, 0b1011, 0, 0b1, 0b11, 0b111]
        starts, context = torch.tensor([0, 2, 6, 7, 10], dtype=torch.int32), [30, 66, 700, 514]
        table = torch.randperm(4 * 44, generator=rng).to(torch.int32).view(4, 44)
        rows = [row for row, mask in enumerate(masks) if mask]
        sequences = [1] * 4 + [3] * 3
        rows_R, sequences_R = (torch.tensor(each, dtype=torch.int32) for each in (rows, sequences))
        trees = TreeRows(torch.tensor(masks), rows_R, sequences_R)
        lengths = torch.tensor(context, dtype=torch.int32)
        host = AttentionBatch(starts, lengths, table, 2, max(context), trees)
        on_device = TreeRows(trees.ancestors.to(device), rows_R.to(device), sequences_R.to(device))
        batch = AttentionBatch(starts.to(device), lengths.to(device), table.to(device), 2, max(context), on_device)
        k, v = (torch.randn(4 * 44, 16, kv_heads, head_dim, generator=rng).to(dtype) for _ in range(2))
        q = torch.randn(10, heads, head_dim, generator=rng).to(dtype)
        out = torch.full(q.shape, float("nan"), dtype=dtype, device=device)
        caches = (k.to(device), v.to(device))
        backend.attention(q.to(device), *caches, batch, head_dim**-0.5, out)
        for row, seen in ((7, 512), (8, 513), (9, 514)):
            one, length = (torch.tensor(ints, dtype=torch.int32, device=device) for ints in ([0, 1], [seen]))
            decode = AttentionBatch(one, length, batch.block_table[3:], 1, seen)
            alone = torch.empty_like(out[:1])
            backend.attention(q[row : row + 1].to(device), *caches, decode, head_dim**-0.5, alone)
            if not torch.equal(alone[0], out[row]):
                raise CheckFailed(f"attention of trees: row {row} has other bits than its decode")
        of_trees, tables = [row for row, mask in enumerate(masks) if mask], batch.block_table[[1, 3]]
        beside = ([masks[2:6], masks[7:]], [context[1], context[3]], out[of_trees])
        check_only_trees(backend, q[of_trees].to(device), caches, tables, *beside)
        return relative_error(out, attention_oracle(q, k, v, host, head_dim**-0.5)) / 2  # p is rounded as well

    return run


def _moves(backend: TritonBackend, rng: torch.Generator) -> float:
    """Two paths; in one a slot is read, and then written."""
    device, dtype = backend.device, backend.compute_dtype
    moves = SlotMoves(
        torch.tensor([9, 20, 22, 60]), torch.tensor([8, 9, 20, 50]), torch.tensor([0, 3, 4], dtype=torch.int32)
    )
    host = [torch.randn(4, 16, 8, 128, generator=rng).to(dtype) for _ in range(6)]
    caches = [cache.to(device, copy=True) for cache in host]
    on_device = SlotMoves(moves.sources.to(device), moves.targets.to(device), moves.indptr.to(device))
    backend.move_slots(caches[:3], caches[3:], on_device)
    if any(
        not torch.equal(moved.cpu(), move_slots_oracle(cache, moves)) for moved, cache in zip(caches, host, strict=True)
    ):
        raise CheckFailed("move_slots: a cache holds something else than what moved")
    return 0.0


def _row_ops(backend: TritonBackend, rng: torch.Generator) -> float:
    device, dtype = backend.device, backend.compute_dtype
    x, weight = torch.randn(5, 4096, generator=rng).to(dtype), torch.randn(4096, generator=rng).to(dtype)
    norm = relative_error(backend.rms_norm(x.to(device), weight.to(device), 1e-5), rms_norm_oracle(x, weight, 1e-5))
    gated = relative_error(backend.silu_mul(x.to(device)), silu_mul_oracle(x))
    return max(norm, gated)


def _rope(backend: TritonBackend, rng: torch.Generator) -> float:
    device, dtype = backend.device, backend.compute_dtype
    q = torch.randn(4, 8, 128, generator=rng).to(dtype)
    k, v = (torch.randn(4, 2, 128, generator=rng).to(dtype) for _ in range(2))
    angles = torch.rand(64, 64, generator=rng) * 6
    cos, sin, positions = angles.cos(), angles.sin(), torch.tensor([63, 0, 7, 8])
    slots = torch.tensor([3, 17, 0, 31])
    q_out, k_out = q.to(device, copy=True), k.to(device, copy=True)  # rotated in place
    caches = [torch.zeros(2, 16, 2, 128, dtype=dtype, device=device) for _ in range(2)]
    args = (cos.to(device), sin.to(device), positions.to(device))
    backend.rope_and_store(q_out, k_out, v.to(device), *args, caches[0], caches[1], slots.to(device))
    stored = caches[0].view(32, 2, 128)[slots.to(device)]
    if not torch.equal(stored, k_out) or not torch.equal(caches[1].view(32, 2, 128)[slots.to(device)].cpu(), v):
        raise CheckFailed("rope_and_store: the cache holds something else than k and v")
    return max(
        relative_error(q_out, rope_oracle(q, cos, sin, positions)),
        relative_error(k_out, rope_oracle(k, cos, sin, positions)),
    )


def all_checks() -> dict[str, Check]:
    """By name. Products cover every row class, K split and not, and outputs and inputs that fill no tile."""
    rows = (1, 17, 50, 100, 256, 1100)
    checks = {
        f"{kind} {n} × {k}, {t} rows": _product(kind, n, k, t)
        for kind in ("affine", "nf4", "int8", "dense")
        for t in rows
        for n, k in ((1000, 4096),)
    }
    checks |= {f"{kind} 333 × 192, 40 rows": _product(kind, 333, 192, 40) for kind in ("affine", "nf4", "dense")}
    checks["affine 28672 × 512, 700 rows"] = _product("affine", 28672, 512, 700)
    checks |= {f"low rank, {rows} rows": _lora(rows, 4096, (1024, 256, 256)) for rows in (4, 300)}
    checks |= {f"routed, {rows} rows": _routed(rows, 9, 2, 4096, (1024, 256, 256)) for rows in (4, 50, 300)}
    checks |= {f"attention d{dim}": _attention(8, 2, dim) for dim in (64, 96, 128, 256)}
    checks |= {f"attention of trees d{dim}": _trees(8, 2, dim) for dim in (64, 96, 128, 256)}
    checks |= {"moved slots": _moves, "norm and gate": _row_ops, "rope and store": _rope}
    return checks


def run_checks(
    report: Report,
    deadline: Deadline,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    checks: dict[str, Check] | None = None,
) -> None:
    """Raises CheckFailed at the end when any kernel is wrong; the report has a row for each."""
    backend = TritonBackend(device, dtype)
    wrong: list[str] = []
    allowed = tolerance(dtype)
    wanted = all_checks() if checks is None else checks
    for name, check in points(report, deadline, list(wanted.items())):
        try:
            torch.manual_seed(1)  # for what is drawn on the device
            error, problem = check(backend, torch.Generator().manual_seed(1)), ""
        except CheckFailed as failure:
            error, problem = float("nan"), str(failure)
        right = error <= allowed
        report.rows.append({"kernel": name, "error": error, "allowed": allowed, "right": right, "why": problem or None})
        if not right:
            wrong.append(problem or f"{name}: error {error:.1e}, allowed {allowed:.1e}")
    if wrong:
        raise CheckFailed("; ".join(wrong))
