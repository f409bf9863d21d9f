"""Which rows a gate set routes, and what is told of them."""

import pytest
import torch

from perseid_kernels.routing import Gates, GateTable
from perseid_kernels.segments import PageList
from perseid_server.engine.adaptation import BASE_COLUMN, Adaptation, Routing
from perseid_server.engine.messages import Submit
from perseid_server.engine.ports import Chunk
from perseid_server.engine.routed_rows import group_routed
from perseid_server.engine.sequence import Sequence
from perseid_server.model.sampling_params import SamplingParams

CPU = torch.device("cpu")
GATES = Gates(torch.zeros(6, 4), torch.zeros(6), (True, True))


def table(num_columns: int = 3) -> GateTable:
    return GateTable(({"qkv": GATES},), torch.zeros(num_columns, dtype=torch.int32), num_columns)


class Tables:
    def __init__(self) -> None:
        self.sets = {"g": table(), "h": table()}
        self.page_lists = {"a": PageList.of([4]), "b": PageList.of([1, 2]), "c": PageList.of([7])}

    def pages(self, version: str) -> PageList:
        return self.page_lists[version]

    def gates(self, version: str) -> GateTable:
        return self.sets[version]


def chunk(adaptation: Adaptation, start: int, count: int, prompt: int = 5) -> Chunk:
    sampling = SamplingParams(max_tokens=9)
    sequence = Sequence(Submit("r", tuple(range(prompt)), sampling, adaptation), 0)
    sequence.token_ids += [0] * 10
    return Chunk(sequence, start, count)


def routed(gate_set: str, *columns: str | None, k: int = 2, temperature: float = 1.0) -> Adaptation:
    return Adaptation(routing=Routing(gate_set, columns, k, temperature))


CHUNKS = [
    chunk(routed("g", "a", None, BASE_COLUMN, k=1), 5, 1),
    chunk(Adaptation.of("c"), 0, 2),
    chunk(routed("h", "a", "b", None), 0, 2),
    chunk(Adaptation(), 5, 1),
    chunk(routed("g", None, "b", BASE_COLUMN, temperature=2.0), 3, 4),
]


def test_rows_of_a_gate_set_stand_together_whoever_stands_between():
    of_g, of_h = group_routed(CHUNKS, Tables()).host()
    assert of_g.rows == [0, 6, 7, 8, 9]
    assert of_g.k == [1, 2, 2, 2, 2]
    assert of_g.temperature == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert of_g.allowed == [[True, False, True], *[[False, True, True]] * 4]
    assert [list(pages) for pages in of_g.pages] == [[4], [1, 2], []], "those of all that somebody may choose"
    assert of_h.rows == [3, 4]
    assert of_h.allowed == [[True, True, False]] * 2


def test_the_tensors_say_the_same():
    rows = group_routed(CHUNKS, Tables()).host()[0].on(CPU)
    assert rows.rows.tolist() == [0, 6, 7, 8, 9]
    assert rows.pages.tolist() == [4, 1, 2]
    assert rows.page_indptr.tolist() == [0, 1, 3, 3]
    assert (rows.max_pages, rows.max_k) == (2, 2)
    assert rows.tally.shape == (5, 4)
    assert not rows.tally.any()


def test_what_was_chosen_goes_back_to_its_chunk():
    groups = group_routed(CHUNKS, Tables())
    on_device = [host.on(CPU) for host in groups.host()]
    on_device[0].tally.copy_(torch.tensor([[2.0, 0, 0, 1], [0, 2, 0, 0], [0, 0, 2, 4], [0, 1, 1, 0], [0, 2, 0, 2]]))
    on_device[1].tally.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 2, 0, 0]]))
    found = groups.results(on_device, CHUNKS, {})
    assert set(found) == {0, 2, 4}, "two decisions a row: shares are halves"
    assert found[0].shares == (1.0, 0.0, 0.0)
    assert found[0].sampled == ((1.0, 0.0, 0.0),)
    assert found[0].prompt_shares == (0.0, 0.0, 0.0), "a decode"
    assert found[0].entropy == 0.5
    assert found[2].shares == (0.5, 1.5, 0.0)
    assert found[2].prompt_shares == (0.5, 1.5, 0.0)
    assert found[4].prompt_shares == (0.0, 1.0, 1.0), "its rows 3 and 4"
    assert found[4].sampled == ((0.0, 1.0, 0.0),)
    assert found[4].entropy == 3.0


def test_a_set_with_other_columns_than_the_request_is_an_error():
    with pytest.raises(ValueError, match="has 3 columns, not 1"):
        group_routed([chunk(routed("g", "a"), 0, 1)], Tables())
