"""Medusa heads in one call: laid out as the structures of `draft_heads.h`, once, and a question each time."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from perseid_kernels.draft_heads import DraftBlock, Drafted, DraftHeads, HeadsDelta
from perseid_kernels.native.pack import NativeWeight
from perseid_kernels.rank_pages import RankPages

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class _Block(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("bias", _POINTER))


class _Heads(ctypes.Structure):
    _fields_ = (
        ("hidden_size", _INT),
        ("num_heads", _INT),
        ("num_layers", _INT),
        ("vocab_size", _INT),
        ("num_candidates", _INT),
        ("first", _Block),
        ("further", _POINTER),
        ("lm_heads", _POINTER),
        ("num_lm_heads", _INT),
        ("vocabulary", _POINTER),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("num_rows", _INT),
        ("hidden", _POINTER),
        ("a", _POINTER),
        ("b", _POINTER),
        ("live", _POINTER),
        ("slice_ends", _POINTER),
        ("num_slices", _INT),
        ("num_segments", _INT),
        ("segment_rows", _POINTER),
        ("indptr", _POINTER),
        ("pages", _POINTER),
        ("weights", _POINTER),
        ("page_indptr", _POINTER),
        ("probabilities", _POINTER),
        ("token_ids", _POINTER),
    )


class NativeHeads:
    """`FusedHeads` on the library's `perseid_draft`. Holds all that the structures point to."""

    def __init__(self, call: Callable[[int, int], None], heads: DraftHeads) -> None:
        self._call = call
        self._shape = (heads.num_heads, heads.num_candidates)
        blocks = [_block(block) for layer in heads.further for block in layer]
        lm_heads = [_address(lm_head) for lm_head in heads.lm_heads]
        self._further, self._lm_heads = (_Block * len(blocks))(*blocks), (_POINTER * len(lm_heads))(*lm_heads)
        self._held = heads
        vocab_size, self._hidden_size = heads.lm_heads[0].shape
        assert heads.num_candidates <= vocab_size
        assert len(lm_heads) in {1, heads.num_heads}
        assert heads.first.weight.shape == (heads.num_heads * self._hidden_size, self._hidden_size)
        self._heads = _Heads(
            hidden_size=self._hidden_size,
            num_heads=heads.num_heads,
            num_layers=1 + len(heads.further),
            vocab_size=vocab_size,
            num_candidates=heads.num_candidates,
            first=_block(heads.first),
            further=ctypes.addressof(self._further),
            lm_heads=ctypes.addressof(self._lm_heads),
            num_lm_heads=len(lm_heads),
            vocabulary=None if heads.vocabulary_V is None else _pointer(heads.vocabulary_V, torch.int64),
        )

    def __call__(self, hidden_SE: Tensor, delta: HeadsDelta | None = None) -> Drafted:
        """In float32."""
        num_rows, hidden_size = hidden_SE.shape
        assert hidden_size == self._hidden_size
        shape = (num_rows, *self._shape)
        drafted = Drafted(torch.empty(shape), torch.empty(shape, dtype=torch.int64))
        rows = _Rows(
            num_rows=num_rows,
            hidden=_pointer(hidden_SE, torch.float32),
            probabilities=drafted.probabilities_SHK.data_ptr(),
            token_ids=drafted.token_ids_SHK.data_ptr(),
        )
        slice_ends = None if delta is None else self._add(delta, rows)  # noqa: F841 (alive until the call is over)
        self._call(ctypes.addressof(self._heads), ctypes.addressof(rows))
        return drafted

    def _add(self, delta: HeadsDelta, rows: _Rows) -> Tensor:
        """Fill in what adapters add. Returns what the rows then point to beside that."""
        pages, segments = delta.pages, delta.segments
        self._check(pages)
        slice_ends = torch.tensor(pages.slices).cumsum(0)
        rows.a, rows.b = _pointer(pages.a, torch.float32), _pointer(pages.b, torch.float32)
        rows.live = pages.live.data_ptr()
        rows.slice_ends, rows.num_slices = slice_ends.data_ptr(), len(pages.slices)
        rows.num_segments = segments.indptr.shape[0] - 1
        rows.segment_rows = segments.rows.data_ptr()
        rows.indptr = segments.indptr.data_ptr()
        rows.pages = segments.pages.data_ptr()
        rows.weights = segments.weights.data_ptr()
        rows.page_indptr = segments.page_indptr.data_ptr()
        return slice_ends

    def _check(self, pages: RankPages) -> None:
        assert len(pages.slices) >= self._heads.num_heads
        assert set(pages.slices) == {self._hidden_size}


def _block(block: DraftBlock) -> _Block:
    bias = None if block.bias_N is None else _pointer(block.bias_N, torch.float32)
    return _Block(weight=_address(block.weight), bias=bias)


def _address(packed: object) -> int:
    assert isinstance(packed, NativeWeight)
    return packed.address


def _pointer(tensor: Tensor, dtype: torch.dtype) -> int:
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    return tensor.data_ptr()
