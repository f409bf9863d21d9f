"""The forward pass in one call: a decoder laid out as the structures of `decoder.h`, once, and a step each time."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from perseid_kernels.backend import AttentionBatch
from perseid_kernels.fused import FusedDecoder, FusedLayer, FusedLinear, Outputs
from perseid_kernels.native.pack import NativeWeight
from perseid_kernels.native.routing import NativeTables
from perseid_kernels.routing import RoutedRows
from perseid_kernels.segments import Segments

MOST_PARTS = 3
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Linear(ctypes.Structure):
    _fields_ = (
        ("num_inputs", _INT),
        ("num_outputs", _INT),
        ("num_parts", _INT),
        ("parts", _POINTER * MOST_PARTS),
        ("first_outputs", _INT * MOST_PARTS),
        ("bias", _POINTER),
        ("a", _POINTER),
        ("b", _POINTER),
        ("live", _POINTER),
        ("slice_ends", _POINTER),
        ("num_slices", _INT),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", _POINTER),
        ("qkv", _Linear),
        ("q_norm", _POINTER),
        ("k_norm", _POINTER),
        ("o", _Linear),
        ("post_attention_norm", _POINTER),
        ("gate_up", _Linear),
        ("down", _Linear),
        ("k_cache", _POINTER),
        ("v_cache", _POINTER),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("num_layers", _INT),
        ("layers", _POINTER),
        ("embedding", _POINTER),
        ("lm_head", _POINTER),
        ("final_norm", _POINTER),
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("hidden_size", _INT),
        ("num_heads", _INT),
        ("num_kv_heads", _INT),
        ("head_dim", _INT),
        ("block_size", _INT),
        ("norm_eps", _FLOAT),
        ("attention_scale", _FLOAT),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("num_rows", _INT),
        ("token_ids", _POINTER),
        ("positions", _POINTER),
        ("slots", _POINTER),
        ("num_sequences", _INT),
        ("query_start", _POINTER),
        ("context_len", _POINTER),
        ("block_table", _POINTER),
        ("stride_table", _INT),
        ("ancestors", _POINTER),
        ("num_segments", _INT),
        ("segment_rows", _POINTER),
        ("indptr", _POINTER),
        ("pages", _POINTER),
        ("weights", _POINTER),
        ("page_indptr", _POINTER),
        ("num_routed", _INT),
        ("routed", _POINTER),
        ("num_logits", _INT),
        ("logits_rows", _POINTER),
        ("hidden", _POINTER),
        ("logits", _POINTER),
    )


class NativeForward:
    """`FusedForward` on the library's `perseid_forward`. Holds all that the structures point to."""

    def __init__(self, call: Callable[[int, int], None], model: FusedDecoder) -> None:
        self._call = call
        self._held: list[Any] = [model]
        self._tables = NativeTables()
        self._layers = (_Layer * len(model.layers))(*[self._layer(layer) for layer in model.layers])
        embedding, lm_head = _weight(model.embedding), _weight(model.lm_head)
        self._vocab_size, self._hidden_size = lm_head.shape
        self._decoder = _Decoder(
            num_layers=len(model.layers),
            layers=ctypes.addressof(self._layers),
            embedding=embedding.address,
            lm_head=lm_head.address,
            final_norm=_floats(model.final_norm_E),
            cos=_floats(model.cos_XD),
            sin=_floats(model.sin_XD),
            hidden_size=self._hidden_size,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            block_size=model.layers[0].k_cache.shape[1],
            norm_eps=model.norm_eps,
            attention_scale=model.attention_scale,
        )

    def __call__(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        attention: AttentionBatch,
        segments: Segments | None,
        logits_rows_L: Tensor,
        routed: Sequence[RoutedRows] = (),
    ) -> Outputs:
        """Of the rows named, in float32."""
        num_logits = logits_rows_L.shape[0]
        outputs = Outputs(torch.empty((num_logits, self._hidden_size)), torch.empty((num_logits, self._vocab_size)))
        step = _Step(
            num_rows=token_ids_T.shape[0],
            token_ids=_ints(token_ids_T),
            positions=_ints(positions_T),
            slots=_ints(slots_T),
            num_sequences=attention.context_len.shape[0],
            query_start=attention.query_start.data_ptr(),
            context_len=attention.context_len.data_ptr(),
            block_table=attention.block_table.data_ptr(),
            stride_table=attention.block_table.stride(0),
            ancestors=None if attention.trees is None else _ints(attention.trees.ancestors),
            num_logits=num_logits,
            logits_rows=_ints(logits_rows_L),
            hidden=outputs.hidden_LE.data_ptr(),
            logits=outputs.logits_LV.data_ptr(),
        )
        if segments is not None:
            step.num_segments = segments.indptr.shape[0] - 1
            step.segment_rows = segments.rows.data_ptr()
            step.indptr = segments.indptr.data_ptr()
            step.pages = segments.pages.data_ptr()
            step.weights = segments.weights.data_ptr()
            step.page_indptr = segments.page_indptr.data_ptr()
        routed_rows = self._tables.rows(routed)
        step.num_routed, step.routed = len(routed), ctypes.addressof(routed_rows)
        self._call(ctypes.addressof(self._decoder), ctypes.addressof(step))
        return outputs

    def _layer(self, layer: FusedLayer) -> _Layer:
        return _Layer(
            input_norm=_floats(layer.input_norm_E),
            qkv=self._linear(layer.qkv),
            q_norm=_floats(layer.q_norm_D),
            k_norm=_floats(layer.k_norm_D),
            o=self._linear(layer.o),
            post_attention_norm=_floats(layer.post_attention_norm_E),
            gate_up=self._linear(layer.gate_up),
            down=self._linear(layer.down),
            k_cache=_floats(layer.k_cache),
            v_cache=_floats(layer.v_cache),
        )

    def _linear(self, linear: FusedLinear) -> _Linear:
        parts = [_weight(part) for part in linear.parts]
        ends = _running_sums([part.shape[0] for part in parts])
        struct = _Linear(
            num_inputs=parts[0].shape[1], num_outputs=ends[-1], num_parts=len(parts), bias=_floats(linear.bias_N)
        )
        struct.parts[: len(parts)] = [part.address for part in parts]
        struct.first_outputs[: len(parts)] = [0, *ends[:-1]]
        if linear.pages is not None:
            slice_ends = torch.tensor(_running_sums(linear.pages.slices))
            self._held.append(slice_ends)
            struct.a, struct.b = _floats(linear.pages.a), _floats(linear.pages.b)
            struct.live = linear.pages.live.data_ptr()
            struct.slice_ends = slice_ends.data_ptr()
            struct.num_slices = len(linear.pages.slices)
        return struct


def _weight(packed: Any) -> NativeWeight:
    assert isinstance(packed, NativeWeight)
    return packed


def _running_sums(widths: Sequence[int]) -> list[int]:
    sums = [0]
    for width in widths:
        sums.append(sums[-1] + width)
    return sums[1:]


def _floats(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _ints(tensor: Tensor) -> int:
    assert tensor.dtype == torch.int64
    assert tensor.is_contiguous()
    return tensor.data_ptr()
