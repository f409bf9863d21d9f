"""Gates and routed rows laid out as the structures of `routing.h`."""

import ctypes
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from perseid_kernels.routing import Gates, GateTable, RoutedRows

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class NativeGates(ctypes.Structure):
    """One fused linear's; all null where it has none."""

    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("gated", _INT))

    @classmethod
    def of(cls, gates: Gates | None) -> "NativeGates":
        """Pointers into `gates`, which the caller keeps."""
        if gates is None:
            return cls()
        gated = sum(1 << s for s, has_gates in enumerate(gates.gated) if has_gates)
        return cls(_data(gates.weight, torch.float32), _data(gates.bias, torch.float32), gated)


class _LayerGates(ctypes.Structure):
    _fields_ = (("qkv", NativeGates), ("o", NativeGates), ("gate_up", NativeGates), ("down", NativeGates))


class NativeRouted(ctypes.Structure):
    """The rows that one gate set routes."""

    _fields_ = (
        ("layers", _POINTER),
        ("num_columns", _INT),
        ("absolute", _POINTER),
        ("num_rows", _INT),
        ("max_k", _INT),
        ("rows", _POINTER),
        ("k", _POINTER),
        ("temperature", _POINTER),
        ("allowed", _POINTER),
        ("pages", _POINTER),
        ("page_indptr", _POINTER),
        ("tally", _POINTER),
    )

    @classmethod
    def of(cls, routed: RoutedRows, layers: int | None = None) -> "NativeRouted":
        """Pointers into `routed`, which the caller keeps; `layers` is the address of all gates, for a whole pass."""
        num_rows, num_columns = routed.rows.shape[0], routed.table.num_columns
        assert routed.allowed.shape == (num_rows, num_columns)
        assert routed.tally.shape == (num_rows, num_columns + 1)
        return cls(
            layers=layers,
            num_columns=num_columns,
            absolute=_data(routed.table.absolute, torch.int32),
            num_rows=num_rows,
            max_k=routed.max_k,
            rows=_data(routed.rows, torch.int32),
            k=_data(routed.k, torch.int32),
            temperature=_data(routed.temperature, torch.float32),
            allowed=_data(routed.allowed, torch.int32),
            pages=_data(routed.pages, torch.int32),
            page_indptr=_data(routed.page_indptr, torch.int32),
            tally=_data(routed.tally, torch.float32),
        )


class NativeTables:
    """The gate sets that forward passes have met: each is laid out once, and forgotten when it is gone."""

    def __init__(self) -> None:
        self._layers: WeakKeyDictionary[GateTable, ctypes.Array[_LayerGates]] = WeakKeyDictionary()

    def __len__(self) -> int:
        """Gate sets that are laid out now."""
        return len(self._layers)

    def rows(self, groups: Sequence[RoutedRows]) -> "ctypes.Array[NativeRouted]":
        """The groups of a step."""
        return (NativeRouted * len(groups))(*[NativeRouted.of(group, self._address(group.table)) for group in groups])

    def _address(self, table: GateTable) -> int:
        layers = self._layers.get(table)
        if layers is None:
            names = [name for name, *_ in _LayerGates._fields_]
            each = [_LayerGates(*[NativeGates.of(layer.get(name)) for name in names]) for layer in table.layers]
            layers = self._layers[table] = (_LayerGates * len(each))(*each)
        return ctypes.addressof(layers)


def _data(tensor: Tensor, dtype: torch.dtype) -> int:
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    return tensor.data_ptr()
