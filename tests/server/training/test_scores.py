"""Gates that always choose one column answer as that column does."""

import pytest
import torch

from perseid_router.training.options import TrainingOptions
from perseid_router.training.trainer import GateTrainer
from perseid_server.training.gates import gates_to_train
from perseid_server.training.routed import Auto, gate_table, routed_rows
from perseid_server.training.rows import lay_out
from perseid_server.training.samples import Sample, Span
from perseid_server.training.scores import score
from perseid_server.training.workbench import Workbench


def forced(bench: Workbench, column: int) -> GateTrainer:
    """Gates whose bias decides."""
    trainer = GateTrainer(gates_to_train(bench), bench.null + 1, TrainingOptions(init_std=0.0), torch.device("cpu"))
    for biases in trainer.biases.values():
        biases.view(biases.shape[0], -1, bench.null + 1)[..., column] = 50.0
    return trainer


@pytest.mark.parametrize("column", [0, 1, 2])
def test_forced_gates_are_their_column(bench: Workbench, column: int) -> None:
    sample = Sample.of([Span(tuple(b"some prompt and its answer"), column)], "t")
    plain = lay_out([sample], (), bench.block_size, bench.page_list, wanted=lambda _index, _place: True)
    routed = lay_out([sample], (), bench.block_size, lambda _: None, wanted=lambda _index, _place: True)
    explicit = bench.decoder.forward(plain.host.on(torch.device("cpu")), bench.kv, bench.pool).logits_LV
    rows = routed_rows(bench, Auto(gate_table(forced(bench, column)), 1, 1.0), len(sample))
    batch = routed.host.on(torch.device("cpu"))
    object.__setattr__(batch, "routed", (rows,))
    assert torch.equal(bench.decoder.forward(batch, bench.kv, bench.pool).logits_LV, explicit)


def test_what_gates_chose_is_told(bench: Workbench) -> None:
    samples = [Sample.of([Span(tuple(b"prompt"), 1), Span(tuple(b"answer"), 1, answer=True)], "t")] * 3
    auto = score(bench, samples, (), Auto(gate_table(forced(bench, 1)), 2, 0.5))
    oracle = score(bench, samples, (), "oracle")
    assert auto.shares == pytest.approx((0, 1, 0))
    assert (auto.tokens, auto.exact) == (oracle.tokens, oracle.exact)
