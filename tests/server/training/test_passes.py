"""Passes over samples: what is shown is what each sample computes alone, under the adapters its labels name."""

import torch
from torch import Tensor

from perseid_server.training.completions import complete
from perseid_server.training.features import SampleFeatures, batch_of
from perseid_server.training.plan import Group, Plan
from perseid_server.training.routed import Auto, gate_table
from perseid_server.training.samples import Sample, Span, shared_prefix, without_labels_before
from perseid_server.training.scores import score
from perseid_server.training.workbench import Workbench
from tests.server.training.test_scores import forced

PREFIX = tuple(range(40, 59))  # two whole blocks and a rest


def sample(bench: Workbench, tail: str, column: int, answer: str = "xyz") -> Sample:
    spans = [Span((*PREFIX, *tail.encode()), column), Span(tuple(answer.encode()), column, answer=True)]
    return without_labels_before(Sample.of(spans, "t"), len(PREFIX), bench.null)


def shown(bench: Workbench, samples: list[Sample], shared: tuple[int, ...]) -> dict[tuple[int, str, int, int], Tensor]:
    """(layer, linear, sample, place) → input."""
    batch = batch_of(bench, samples, shared, lambda index, place: index >= 0 and place >= len(PREFIX))
    rows = [(batch.rows.samples[row], batch.rows.places[row]) for row in batch.rows_R.tolist()]
    found = {}
    batch.show(
        lambda layer, fused, x_RK: found.update(
            {(layer, fused, *where): x.clone() for where, x in zip(rows, x_RK, strict=True)}
        )
    )
    return found


def test_samples_that_share_their_beginning_are_as_each_alone(bench: Workbench) -> None:
    samples = [sample(bench, "one", 0), sample(bench, "third", 1), sample(bench, "of the base", bench.null)]
    together = shown(bench, samples, PREFIX)
    for index, one in enumerate(samples):
        alone = shown(bench, [one], ())
        assert len(alone) == len(bench.gated) * (len(one) - len(PREFIX))
        for (layer, fused, _, place), x in alone.items():
            assert torch.equal(together[layer, fused, index, place], x)


def test_labels_decide_which_adapter_runs_token_by_token(bench: Workbench) -> None:
    tail = tuple(b"abcdef")

    def labelled(*columns: int) -> Sample:
        return Sample.of([Span(PREFIX, bench.null), *(Span((t,), c) for t, c in zip(tail, columns, strict=True))], "t")

    plain, mixed = (shown(bench, [labelled(*columns)], ()) for columns in ((2,) * 6, (2, 2, 0, 1, 2, 2)))
    first = len(PREFIX)
    same = [torch.equal(plain[1, "qkv", 0, first + place], mixed[1, "qkv", 0, first + place]) for place in range(6)]
    assert same == [True, True, False, False, False, False]  # later ones see the adapted tokens' keys and values


def test_only_gated_linears_are_shown(bench: Workbench) -> None:
    found = {(layer, fused) for layer, fused, _, _ in shown(bench, [sample(bench, "x", 0)], ())}
    assert found == bench.gated == {(layer, fused) for layer in (0, 1) for fused in ("qkv", "down")}


def test_the_shared_rows_teach_the_base_once(bench: Workbench) -> None:
    samples = (sample(bench, "one", 0), sample(bench, "two", 1))
    features = SampleFeatures(bench, Plan((Group(samples, 2),), 0), shared_prefix(samples))
    batch = features.batch(0)
    taught = [(batch.rows.samples[row], batch.rows.places[row]) for row in batch.rows_R.tolist()]
    shared = [where for where in taught if where[1] < len(PREFIX)]
    assert sorted(place for _, place in shared) == list(range(len(PREFIX)))
    labels = dict(zip(taught, batch.labels_R.tolist(), strict=True))
    assert {labels[where] for where in shared} == {bench.null}
    assert batch.weights_R.sum().item() == torch.tensor(1.0).item()


def test_greedy_completions_are_what_teacher_forcing_finds_right(bench: Workbench) -> None:
    prompts = [(*PREFIX, *text.encode()) for text in ("a", "bcd", "some more text")]
    answers = complete(bench, prompts, 6)
    assert all(1 <= len(answer) <= 6 for answer in answers)
    samples = [
        Sample.of([Span(prompt, bench.null), Span(answer, bench.null, answer=True)], "t")
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    found = score(bench, samples, PREFIX, "base")
    assert (found.tokens, found.exact) == (1, 1)
    wrong = Sample.of([Span(prompts[0], 2), Span((*answers[0][:1], (answers[0][0] + 1) % 250), 2, answer=True)], "t")
    assert score(bench, [wrong], PREFIX, "base").exact == 0


def test_gates_may_route_the_pass_they_learn_from(bench: Workbench) -> None:
    """Forced to one column, they show what that column's label shows."""
    by_label = shown(bench, [sample(bench, "one", 1)], ())
    auto = Auto(gate_table(forced(bench, 1)), 1, 1.0)
    one = sample(bench, "one", 1).explicit(bench.null)
    found = {}
    batch = batch_of(bench, [one], (), lambda _, place: place >= len(PREFIX), auto=auto)
    batch.show(lambda layer, fused, x_RK: found.update({(layer, fused): x_RK.clone()}))
    explicit = batch_of(bench, [one], (), lambda _, place: place >= len(PREFIX))
    explicit.show(lambda layer, fused, x_RK: torch.testing.assert_close(found[layer, fused], x_RK, rtol=0, atol=0))
    assert not torch.equal(found[1, "down"][0], by_label[1, "down", 0, len(PREFIX)])  # that one had a base's beginning
