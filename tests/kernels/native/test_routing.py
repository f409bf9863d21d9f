"""Gates as the library reads them: laid out once for each set, whatever comes and goes; threads change no bit."""

import ctypes
import gc
from dataclasses import replace

import pytest
import torch

from perseid_kernels.native.backend import NativeBackend
from perseid_kernels.native.build import build_library
from perseid_kernels.native.routing import NativeTables
from perseid_kernels.routing import Gates, GateTable, RoutedRows
from tests.kernels.routing_cases import random_case, run


def rows_of(table: GateTable) -> RoutedRows:
    one = torch.ones(1, dtype=torch.int32)
    return RoutedRows(
        table=table,
        rows=torch.zeros(1, dtype=torch.int32),
        k=one,
        temperature=torch.ones(1),
        allowed=one.expand(1, table.num_columns).contiguous(),
        pages=torch.empty(0, dtype=torch.int32),
        page_indptr=torch.zeros(table.num_columns + 1, dtype=torch.int32),
        max_pages=0,
        max_k=1,
        tally=torch.zeros(1, table.num_columns + 1),
    )


def table_of(columns: int) -> GateTable:
    gates = Gates(torch.randn(3 * columns, 8), torch.randn(3 * columns), (True, False, True))
    return GateTable(({"qkv": gates}, {}), torch.zeros(columns, dtype=torch.int32), columns)


def test_a_gate_set_is_laid_out_once_and_forgotten_when_it_is_gone() -> None:
    tables, first, second = NativeTables(), table_of(2), table_of(3)
    before = tables.rows([rows_of(first)])[0].layers
    again = tables.rows([rows_of(second), rows_of(first)])
    assert again[1].layers == before != again[0].layers
    assert len(tables) == 2
    del first
    gc.collect()
    assert len(tables) == 1


def test_the_layout_names_what_has_gates() -> None:
    tables, table = NativeTables(), table_of(2)
    layout = (ctypes.c_int64 * 24).from_address(
        tables.rows([rows_of(table)])[0].layers
    )  # 2 layers of 4 linears of 3 fields
    gates = table.layers[0]["qkv"]
    assert layout[:3] == [gates.weight.data_ptr(), gates.bias.data_ptr(), 0b101]
    assert not any(layout[3:])


@pytest.mark.parametrize("num_rows", [3, 70])
def test_the_number_of_threads_changes_no_bit(rng: torch.Generator, num_rows: int) -> None:
    case = random_case(rng, num_rows)
    case = replace(case, x_TK=torch.randn(case.x_TK.shape, generator=rng))
    expected = run(NativeBackend(build_library()), case)
    for threads in (1, 3, 8):
        for one, other in zip(run(NativeBackend(build_library(), threads), case), expected, strict=True):
            assert torch.equal(one, other)
    NativeBackend(build_library())
