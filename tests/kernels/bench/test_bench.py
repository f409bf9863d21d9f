"""The suite's own code, on tiny shapes: through Triton's interpreter where it needs kernels."""

import json
from pathlib import Path

import pytest
import torch

from perseid_kernels.bench import gpu, kernels, lora, peers, products, routed
from perseid_kernels.bench.checks import (
    Check,
    _attention,
    _lora,
    _moves,
    _product,
    _rope,
    _routed,
    _row_ops,
    _trees,
    all_checks,
    run_checks,
)
from perseid_kernels.bench.lora import bench_lora, cut_to_rank, page_lists
from perseid_kernels.bench.peers import Peer, chunks_by_adapter, split_weights
from perseid_kernels.bench.products import bench_products
from perseid_kernels.bench.rates import measure_rates
from perseid_kernels.bench.roofline import ModelShape, Rates, decode_work, routed_work
from perseid_kernels.bench.routed import bench_routed, distinct_adapters, routed_rows
from perseid_kernels.bench.sections import CheckFailed, Deadline, Report
from perseid_kernels.bench.step import bench_step, build_inputs, build_model, decode_step, triton_packers
from perseid_kernels.bench.timing import seconds
from perseid_kernels.bench.weights import (
    random_gates,
    random_int4,
    random_packed_int4,
    random_packed_int8,
    random_pages,
)
from perseid_kernels.eager_backend import EagerBackend
from perseid_kernels.matmul_q4 import unpack_rows
from perseid_kernels.segments import PageList, Segments
from perseid_kernels.triton_backend import TritonBackend
from perseid_kernels.weights import DenseWeight
from tests.kernels.cases import DEVICE

TINY = ModelShape(64, 2, 128, 4, 2, 16, 128, 32)
RATES = Rates(bandwidth=1e9, flops=1e9)
LATER = Deadline(at=float("inf"))


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run, their time is not measured: the interpreter's would say nothing."""

    def run_once(run, device, budget=0.3) -> float:
        run()
        return 1e-3

    for module in (products, lora, kernels, peers, routed):
        monkeypatch.setattr(module, "seconds", run_once)
    monkeypatch.setattr(kernels, "_COLD_BYTES", 20_000)
    monkeypatch.setattr("perseid_kernels.bench.step.seconds", run_once)


def test_random_weights_have_the_layout_and_size_of_packed_ones() -> None:
    rng = torch.Generator().manual_seed(0)
    backend = TritonBackend(DEVICE, torch.float32)
    for inputs, affine in ((256, True), (192, False)):
        made = random_packed_int4(48, inputs, 32, DEVICE, affine=affine)
        packed = backend.pack(random_int4(rng, 48, inputs, 32, affine=affine), DEVICE)
        assert made.codes.shape == packed.codes.shape
        assert (made.scale.shape, made.scale.dtype, made.zero) == (packed.scale.shape, packed.scale.dtype, packed.zero)
        assert made.nbytes == packed.nbytes
    assert random_packed_int8(40, 192, 32, DEVICE).shape == (40, 192)
    with pytest.raises(ValueError, match="96 inputs are no whole groups of 64"):
        random_packed_int4(48, 96, 64, DEVICE)


def test_random_weights_keep_the_size_of_a_normed_row() -> None:
    """Mean 0 and variance about 1 / K, or 32 layers of them would overflow."""
    for affine in (True, False):
        values = unpack_rows(random_packed_int4(256, 512, 32, DEVICE, affine=affine), torch.arange(256, device=DEVICE))
        assert abs(float(values.mean())) < 0.2 / 512**0.5
        assert 0.5 < float(values.std()) * 512**0.5 < 2


def test_products_have_a_row_for_every_point() -> None:
    report = Report("products")
    bench_products(report, LATER, RATES, DEVICE, dtype=torch.float32, shape=TINY, rows=(1, 20), cold_bytes=8000)
    assert len(report.rows) == 2 * 2 * 4
    assert {row["linear"] for row in report.rows} == {"qkv", "o", "gate_up", "down"}
    assert all(row["µs"] > 0 and row["bf16 µs"] > 0 for row in report.rows)
    assert {row["target met"] for row in report.rows if row["rows"] == 20} == {None}


def test_products_stop_when_the_time_is_over() -> None:
    report = Report("products")
    bench_products(report, Deadline(at=0.0), RATES, DEVICE, dtype=torch.float32, shape=TINY)
    assert report.rows == []
    assert "points skipped" in report.notes[0]


def test_low_rank_rows_say_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Peer("Other", "no_such_package_at_all", lambda *_: lambda: None)
    monkeypatch.setattr(lora, "PEERS", (missing,))
    report = Report("lora")
    grid = [(1, 8, 1), (20, 32, 4)]
    bench_lora(report, LATER, RATES, DEVICE, dtype=torch.float32, num_inputs=64, slices=(24, 8), grid=grid)
    assert [(row["rows"], row["rank"], row["adapters"]) for row in report.rows] == grid
    assert {row["Other µs"] for row in report.rows} == {"not installed"}


def reference(x, pages, rank, adapters, out):
    """A peer in plain torch, on the weights as peers get them."""
    a, b = split_weights(pages, rank, adapters)

    def run() -> None:
        for t in range(x.shape[0]):
            out[t] += torch.cat(
                [x[t] @ one[t % adapters].T @ two[t % adapters].T for one, two in zip(a, b, strict=True)]
            )

    return run


@pytest.mark.parametrize("rank", [8, 16, 40])
def test_a_peer_is_given_the_same_adapters(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Its result is compared before its time is believed."""
    wrong = Peer("Wrong", "torch", lambda x, pages, rank, adapters, out: lambda: out.fill_(1.0))
    broken = Peer("Broken", "torch", lambda *_: (_ for _ in ()).throw(TypeError("other arguments")))
    monkeypatch.setattr(lora, "PEERS", (Peer("Right", "torch", reference), wrong, broken))
    report = Report("lora")
    bench_lora(report, LATER, RATES, DEVICE, dtype=torch.float32, num_inputs=64, slices=(24, 8), grid=[(7, rank, 3)])
    assert report.rows[0]["Right / ours"] == 1.0
    assert "other result" in report.rows[0]["Wrong µs"]
    assert report.rows[0]["Broken µs"] == "TypeError: other arguments"


def test_rows_are_cut_into_chunks_of_one_adapter() -> None:
    order, bounds, owners = chunks_by_adapter(num_rows=7, adapters=2, height=2)
    assert order == [0, 2, 4, 6, 1, 3, 5]
    assert bounds == [0, 2, 4, 6, 7]
    assert owners == [0, 0, 1, 1]


def test_pages_of_a_small_rank_are_zero_beyond_it() -> None:
    pages = cut_to_rank(random_pages(2, 32, (8, 4), DEVICE, torch.float32), 5)
    used = pages.a.view(2, 2, 16, 32).ne(0).any(-1)
    assert used[..., :5].all()
    assert not used[..., 5:].any()
    assert (pages.live == 5).all()
    assert page_lists(3, 20, 2) == [PageList.of((0, 1)), PageList.of((2, 3)), PageList.of((0, 1))]


def test_the_decode_step_equals_the_eager_backends() -> None:
    """The step is right before it is timed: the same tokens from the same weights in plain torch."""
    torch.manual_seed(3)
    triton, eager = TritonBackend(DEVICE, torch.float32), EagerBackend(torch.float32)
    model = build_model(TINY, triton_packers(TINY, DEVICE), DEVICE, torch.float32, num_pages=2)
    segments = Segments.build(page_lists(3, 16, 2), DEVICE)
    inputs = build_inputs(TINY, 3, 20, segments, DEVICE, torch.float32)
    tokens = decode_step(triton, model, inputs)

    def plain(weight):
        return eager.pack(DenseWeight(triton.embed(weight, torch.arange(weight.shape[0], device=DEVICE))), DEVICE)

    layers = tuple(
        type(layer)({name: plain(weight) for name, weight in layer.linears.items()}, layer.pages, layer.norms)
        for layer in model.layers
    )
    expected = decode_step(eager, type(model)(TINY, layers, plain(model.head), model.norm), inputs)
    assert torch.equal(tokens, expected)
    without = build_inputs(TINY, 3, 20, None, DEVICE, torch.float32)
    assert decode_step(triton, model, without).shape == (3,)


def test_the_step_section_measures_every_point() -> None:
    report = Report("step")
    bench_step(
        report, LATER, RATES, DEVICE, dtype=torch.float32, shape=TINY, grid=((1, 0), (3, 2)), context=20, rank=16
    )
    assert [(row["rows"], row["adapters"]) for row in report.rows] == [(1, 0), (3, 2)]
    model = build_model(TINY, triton_packers(TINY, DEVICE), DEVICE, torch.float32, num_pages=1)
    floor = decode_work(TINY, 3, 20, 2, 16, model.weight_bytes, 4).floor(RATES)
    assert report.rows[1]["floor ms"] == pytest.approx(floor * 1e3)


@pytest.mark.usefixtures("ordered_dot")  # the checks compare a row alone with it among others, bit by bit
@pytest.mark.parametrize(
    "check",
    [
        _product("affine", 40, 128, 18),
        _product("nf4", 33, 192, 2),
        _product("int8", 33, 64, 2),
        _product("dense", 33, 70, 2),
        _lora(5, 64, (24, 8)),
        _routed(3, 4, 2, 64, (24, 8)),
        _attention(4, 2, 16),
        _trees(4, 2, 16),
        _moves,
        _row_ops,
        _rope,
    ],
)
def test_checks_pass_on_right_kernels(check: Check) -> None:
    report = Report("checks")
    run_checks(report, LATER, DEVICE, dtype=torch.float32, checks={"one": check})
    assert report.rows[0]["right"]


def test_a_wrong_kernel_fails_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by a twentieth of a percent; and a NaN in a row that is not the one compared alone."""
    honest = TritonBackend.matmul
    for spoil in (lambda out: out.mul_(1.0005), lambda out: out[1:].fill_(float("nan"))):

        def matmul(self, x, packed, out, spoil=spoil) -> None:
            honest(self, x, packed, out)
            spoil(out)

        monkeypatch.setattr(TritonBackend, "matmul", matmul)
        report = Report("checks")
        with pytest.raises(CheckFailed, match=r"bad product: error|differs"):
            run_checks(report, LATER, DEVICE, dtype=torch.float32, checks={"bad product": _product("dense", 9, 64, 2)})
        assert not report.rows[0]["right"]


def test_a_wrong_choice_fails_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tally alone is off by a thousandth; and a row's sum follows how many rows there are."""
    honest = TritonBackend.add_routed
    for spoil in (lambda rows, out: rows.tally.mul_(1.001), lambda rows, out: out.mul_(1 + out.shape[0] * 1e-6)):

        def add_routed(self, x, gates, pages, rows, out, spoil=spoil) -> None:
            honest(self, x, gates, pages, rows, out)
            spoil(rows, out)

        monkeypatch.setattr(TritonBackend, "add_routed", add_routed)
        with pytest.raises(CheckFailed, match=r"r: error|a row alone differs"):
            run_checks(Report("checks"), LATER, DEVICE, dtype=torch.float32, checks={"r": _routed(2, 3, 1, 32, (8,))})


def test_routed_rows_have_the_floor_of_what_they_chose() -> None:
    report = Report("routed")
    grid = [(1, 3, 2), (5, 4, 1)]
    bench_routed(report, LATER, RATES, DEVICE, dtype=torch.float32, num_inputs=64, slices=(24, 8), grid=grid)
    assert [(row["rows"], row["columns"], row["k"]) for row in report.rows] == grid
    assert all(row["routed / by name"] == 1.0 for row in report.rows)

    gates = random_gates(3, 16, 2, DEVICE)
    gates.weight.zero_()
    gates.bias.copy_(torch.tensor([0.0, 2, 1, 5, 4, 9]))  # 1 and the base; then the base and 0
    rows = routed_rows(gates, 4, 3, 2, 16, DEVICE)
    distinct, picks = distinct_adapters(torch.zeros(4, 16, device=DEVICE), gates, rows)
    assert (distinct, picks) == ([1, 1], 8)
    assert routed_work(4, 16, (24, 8), 3, 16, distinct, picks, 4).bytes > 4 * 2 * 3 * 16


@pytest.mark.usefixtures("ordered_dot")
def test_trees_that_depend_on_other_rows_fail_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step of trees alone one row is off; or padding is written."""
    honest = TritonBackend.attention
    for row, problem in ((2, "other bits without"), (7, "padding was written")):

        def attention(self, q, k, v, batch, scale, out, row=row) -> None:
            honest(self, q, k, v, batch, scale, out)
            if batch.trees is not None and len(batch.trees.rows) == len(q):
                out[row] *= 1 + 1e-6

        monkeypatch.setattr(TritonBackend, "attention", attention)
        with pytest.raises(CheckFailed, match=problem):
            run_checks(Report("checks"), LATER, DEVICE, dtype=torch.float32, checks={"t": _trees(4, 2, 16)})


def test_a_row_that_depends_on_its_neighbours_fails_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = TritonBackend.matmul

    def matmul(self, x, packed, out) -> None:
        honest(self, x, packed, out)
        out.mul_(1 + x.shape[0] * 1e-7)

    monkeypatch.setattr(TritonBackend, "matmul", matmul)
    report = Report("checks")
    with pytest.raises(CheckFailed, match="a row alone differs"):
        run_checks(report, LATER, DEVICE, dtype=torch.float32, checks={"p": _product("dense", 9, 64, 5)})


def test_every_kind_of_weight_and_op_is_checked() -> None:
    names = " ".join(all_checks())
    assert all(
        word in names
        for word in (
            "affine",
            "nf4",
            "int8",
            "dense",
            "low rank",
            "routed",
            "attention",
            "trees",
            "moved",
            "norm",
            "rope",
        )
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_gpu_suite_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path / "none.json")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


def test_the_gpu_suite_ends_within_nine_minutes() -> None:
    sections = gpu.sections_for(torch.device("cpu"))
    assert sum(section.seconds for section in sections) <= gpu.TOTAL_SECONDS <= 9 * 60 - 40
    assert [section.name for section in sections][:2] == ["rates of the device", "kernels against their oracles"]


def test_each_op_has_a_row_on_this_backend() -> None:
    backend = EagerBackend(torch.float32)
    report = Report("ops")
    wanted = kernels.op_points(backend, DEVICE, TINY, rows=[1, 9])
    kernels.bench_ops(report, LATER, RATES, DEVICE, wanted)
    assert {row["op"] for row in report.rows} == {"4-bit product", "8-bit product", "low rank", "attention", "norm"}
    assert len(report.rows) == len(wanted)
    assert all(row["floor µs"] > 0 for row in report.rows)


def test_kernels_main_writes_its_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "measure_rates", lambda device: RATES)
    monkeypatch.setattr(kernels, "backend_for", lambda device: EagerBackend(torch.float32))
    monkeypatch.setattr(kernels, "SMOLLM2_135M", TINY)
    monkeypatch.setattr(kernels, "LLAMA_8B", TINY)
    assert kernels.main(["--out", str(tmp_path / "ops.json"), "--rows", "1"]) == 0
    written = json.loads((tmp_path / "ops.json").read_text())
    assert written["machine"]["backend"] == "eager"
    assert written["sections"][0]["rows"]


def test_weights_are_read_in_turn_and_the_time_is_of_one() -> None:
    point = next(p for p in kernels.op_points(EagerBackend(torch.float32), DEVICE, TINY, [1]) if "4-bit" in p.op)
    prepared = point.prepare()
    assert prepared.times == 20_000 // (128 * 64 // 2 + 16 * 4 + 128 * 2 * 8) > 1
    report = Report("ops")
    kernels.bench_ops(report, LATER, RATES, DEVICE, [point])
    assert report.rows[0]["µs"] == pytest.approx(1e3 / prepared.times)
    assert kernels.copies_of(1 << 40) == 1


def test_rates_are_positive() -> None:
    rates = measure_rates(torch.device("cpu"), scale=0.02)
    assert rates.bandwidth > 0
    assert rates.flops > 0


def test_seconds_runs_at_least_five_times() -> None:
    runs = []
    assert seconds(lambda: runs.append(1), torch.device("cpu"), budget=0.0) >= 0
    assert len(runs) == 6  # one to warm up
