"""The section of drafted trees, on a tiny shape through Triton's interpreter: its steps are right, and its report."""

from dataclasses import replace

import pytest
import torch

from perseid_kernels.bench import trees
from perseid_kernels.bench.roofline import ModelShape
from perseid_kernels.bench.sections import Deadline, Report
from perseid_kernels.bench.step import build_inputs, build_model, decode_step, triton_packers
from perseid_kernels.bench.trees import Times, add_rows, ask_heads, bench_trees, random_heads, row_class, tree_inputs
from perseid_kernels.triton_backend import TritonBackend
from tests.kernels.cases import DEVICE

TINY = ModelShape(64, 2, 128, 4, 2, 16, 128, 32)
LATER = Deadline(at=float("inf"))


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run, their time is not measured: the interpreter's would say nothing."""

    def run_once(run, device=None, budget=0.3) -> float:
        run()
        return 1e-3

    monkeypatch.setattr(trees, "seconds", run_once)
    monkeypatch.setattr(trees, "host_seconds", run_once)


def test_recorded_steps_have_the_row_classes_of_the_server() -> None:
    assert [row_class(rows) for rows in (1, 4, 16, 17, 33, 64, 128)] == [16, 16, 16, 32, 64, 64, 128]


def test_a_step_with_trees_decodes_each_path() -> None:
    """The row of a tree gives the token that a plain step gives behind the path to it; padding is stored nowhere."""
    backend = TritonBackend(DEVICE, torch.float32)
    torch.manual_seed(5)
    model = build_model(TINY, triton_packers(TINY, DEVICE), DEVICE, torch.float32, num_pages=1)
    inputs = tree_inputs(TINY, [4, 2, 1], context=20, device=DEVICE, dtype=torch.float32)
    assert inputs.token_ids.shape == (16,)
    assert inputs.positions[:7].tolist() == [19, 20, 20, 21, 19, 20, 19]
    before = [cache.clone() for cache in inputs.caches[0]]
    tokens = decode_step(backend, model, inputs)
    written = [int((cache != old).any(-1).any(-1).sum()) for cache, old in zip(inputs.caches[0], before, strict=True)]
    assert written == [7, 7]

    plain = build_inputs(TINY, 1, 20, None, DEVICE, torch.float32)
    path = [0, 1, 3]  # of the first tree; row 2 lies between
    table = inputs.batch.block_table[:1]
    for depth, row in enumerate(path):
        place = 19 + depth
        step = replace(
            plain,
            token_ids=inputs.token_ids[row : row + 1],
            positions=torch.tensor([place], device=DEVICE),
            slots=table[:, place // 16].long() * 16 + place % 16,
            cos=inputs.cos,
            sin=inputs.sin,
            batch=replace(
                plain.batch,
                context_len=torch.tensor([place + 1], dtype=torch.int32, device=DEVICE),
                block_table=table,
                max_context_len=place + 1,
            ),
            caches=inputs.caches,
        )
        assert decode_step(backend, model, step).tolist() == tokens[row : row + 1].tolist()


def test_heads_give_their_likeliest_tokens() -> None:
    """Against the equation in plain torch."""
    backend = TritonBackend(DEVICE, torch.float32)
    torch.manual_seed(2)
    head = triton_packers(TINY, DEVICE).head(TINY.vocabulary, TINY.hidden)
    heads = random_heads(TINY, head, DEVICE, torch.float32)
    hidden = torch.randn(3, TINY.hidden, device=DEVICE)
    chances, tokens = ask_heads(backend, heads, hidden)
    blocks = torch.nn.functional.silu(hidden @ heads.blocks.values.T).view(3, 5, TINY.hidden)
    lm_head = backend.embed(head, torch.arange(TINY.vocabulary, device=DEVICE))
    expected = ((hidden[:, None] + blocks) @ lm_head.T).log_softmax(-1).topk(10)
    torch.testing.assert_close(torch.tensor(chances), expected.values.cpu(), rtol=1e-4, atol=1e-4)
    assert torch.tensor(tokens).shape == (3, 5, 10)
    assert (torch.tensor(tokens) == expected.indices.cpu()).float().mean() > 0.95


@pytest.mark.usefixtures("once")
def test_the_section_has_a_row_for_every_point_and_says_what_is_simulated() -> None:
    report = Report("trees")
    grid = ((1, (1, 4)), (3, (6,)))
    bench_trees(report, LATER, DEVICE, dtype=torch.float32, shape=TINY, grid=grid, context=20, draft_vocabulary=32)
    assert [(row["sequences"], row["step"], row["rows"]) for row in report.rows] == [
        (1, "plain", 1),
        (1, "trees", 1),
        (1, "trees", 4),
        (3, "plain", 3),
        (3, "trees", 6),
    ]
    assert report.notes[0].startswith("simulated: tokens a step")
    assert sum(row["chosen"] for row in report.rows) == 2, "one for each number of sequences"


def rows_of(num_sequences: int, times: Times) -> list[dict[str, object]]:
    report = Report("trees")
    add_rows(report, num_sequences, times)
    return report.rows


def test_targets_are_those_of_one_sequence_and_of_sixty_four() -> None:
    good = rows_of(1, Times(plain=1.0, trees={16: 1.0, 64: 1.05}, heads=0.02, few_tokens=0.01))
    assert [row["target met"] for row in good] == [None, True, True]
    assert [row["chosen"] for row in good] == [False, False, True]
    assert good[2]["speed-up"] == pytest.approx(2.44 / 1.07)
    bad = rows_of(1, Times(plain=1.0, trees={4: 1.0, 16: 1.25}, heads=0.1, few_tokens=0.02))
    assert [row["target met"] for row in bad] == [None, False, False]
    assert bad[1]["speed-up with 16k"] == pytest.approx(1.85 / 1.02)


def test_no_drafts_are_never_slower() -> None:
    many = rows_of(64, Times(plain=1.0, trees={128: 1.7}, heads=0.1, few_tokens=0.1))
    assert [row["chosen"] for row in many] == [True, False]
    assert [row["target met"] for row in many] == [True, None]
    assert many[1]["speed-up"] < 1


def test_other_numbers_of_sequences_have_no_target() -> None:
    some = rows_of(8, Times(plain=1.0, trees={16: 1.0}, heads=0.1, few_tokens=0.1))
    assert [row["target met"] for row in some] == [None, None]


def test_a_section_without_time_measures_nothing() -> None:
    report = Report("trees")
    bench_trees(report, Deadline(at=0.0), DEVICE, dtype=torch.float32, shape=TINY, draft_vocabulary=32)
    assert report.rows == []
    assert "points skipped" in report.notes[-1]
