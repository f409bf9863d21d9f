"""The decoder of the Llama-shaped families, written in a backend's ops.

Llama, Mistral, Qwen2 and Qwen3 (and what is published under their names, such as SmolLM2) differ only in what
`DecoderConfig` says: biases, norms on q and k, tied embeddings, rotary scaling.

Shape legend: T rows, L rows whose logits are wanted, H query heads, Hkv key/value heads, D head dim, V vocabulary,
E hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from perseid_kernels.backend import Backend
from perseid_kernels.fused import FusedDecoder, FusedLayer, FusedLinear, Outputs
from perseid_kernels.rank_pages import RankPages
from perseid_kernels.routing import RoutedRows
from perseid_kernels.segments import Segments
from perseid_server.model.batch import StepBatch
from perseid_server.model.config import DecoderConfig
from perseid_server.model.kv_cache import KVCache
from perseid_server.model.linear import AdaptedLinear

Observer = Callable[[int, str, Tensor], None]
"""Is shown (layer, fused linear, its input [T, K])."""


class AdapterPools(Protocol):
    """The pages of all adapters, per layer and fused linear. See adapters/pool.py."""

    @property
    def layers(self) -> Sequence[Mapping[str, RankPages]]: ...


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one decoder layer."""

    input_norm_E: Tensor
    qkv: AdaptedLinear
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    o: AdaptedLinear
    post_attention_norm_E: Tensor
    gate_up: AdaptedLinear
    down: AdaptedLinear

    @property
    def nbytes(self) -> int:
        """Device bytes of all weights of the layer."""
        linears = (self.qkv, self.o, self.gate_up, self.down)
        norms = (self.input_norm_E, self.q_norm_D, self.k_norm_D, self.post_attention_norm_E)
        return sum(linear.nbytes for linear in linears) + sum(norm.nbytes for norm in norms if norm is not None)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A base model on its device. Frozen: adapters live in pools beside it, never inside."""

    config: DecoderConfig
    backend: Backend
    device: torch.device
    embedding: Any  # packed [V, E]
    layers: tuple[Layer, ...]
    final_norm_E: Tensor
    lm_head: Any  # packed [V, E]; the embedding itself when tied
    cos_XD: Tensor
    sin_XD: Tensor

    @property
    def weight_bytes(self) -> int:
        """Device bytes of everything that is frozen: packed weights, norms, biases, rotary tables."""
        head = 0 if self.lm_head is self.embedding else self.lm_head.nbytes
        tables = self.final_norm_E.nbytes + self.cos_XD.nbytes + self.sin_XD.nbytes
        return int(self.embedding.nbytes + head + tables + sum(layer.nbytes for layer in self.layers))

    def bind(self, kv: KVCache, adapters: AdapterPools | None) -> Callable[[StepBatch], Outputs]:
        """`forward` over one cache and pool, in one call where the backend has one."""
        fused = self.backend.fuse(fused_decoder(self, kv, adapters))
        if fused is None:
            return lambda batch: self.forward(batch, kv, adapters)
        return lambda batch: fused(
            batch.token_ids_T,
            batch.positions_T,
            batch.slots_T,
            batch.attention,
            batch.segments,
            batch.logits_rows,
            batch.routed,
        )

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv: KVCache, adapters: AdapterPools | None) -> Outputs:
        """Hidden states and next-token logits of the rows that `batch.logits_rows` names."""
        hidden_LE = self.hidden(batch, kv, adapters)[batch.logits_rows]
        return Outputs(hidden_LE, self.logits(hidden_LE))

    @torch.inference_mode()
    def hidden(
        self, batch: StepBatch, kv: KVCache, adapters: AdapterPools | None, observe: Observer | None = None
    ) -> Tensor:
        """The last layer's output of every row after the final norm, [T, E]. Writes the rows' K and V. `observe` is
        shown the input of every fused linear."""
        residual = self.backend.embed(self.embedding, batch.token_ids_T)
        x = self.backend.rms_norm(residual, self.layers[0].input_norm_E, self.config.rms_norm_eps)
        for index, layer in enumerate(self.layers):
            pages = _LayerPages.of(adapters, index, batch, observe)
            attended = self._attend(layer, index, pages, x, batch, kv)
            x = self._add_norm(attended, residual, layer.post_attention_norm_E)
            fed = self._feed_forward(layer, pages, x)
            last = index + 1 == len(self.layers)
            next_norm = self.final_norm_E if last else self.layers[index + 1].input_norm_E
            x = self._add_norm(fed, residual, next_norm)
        return x

    @torch.inference_mode()
    def logits(self, hidden_LE: Tensor) -> Tensor:
        """Vocabulary logits of normed hidden states, float32 [L, V]."""
        out_LV = torch.empty(
            (hidden_LE.shape[0], self.config.vocab_size), dtype=self.backend.compute_dtype, device=self.device
        )
        self.backend.matmul(hidden_LE.contiguous(), self.lm_head, out_LV)
        return out_LV.float()

    def _attend(
        self, layer: Layer, index: int, pages: "_LayerPages", x_TE: Tensor, batch: StepBatch, kv: KVCache
    ) -> Tensor:
        config = self.config
        qkv = pages.apply("qkv", layer.qkv, x_TE).view(x_TE.shape[0], -1, config.head_dim)
        q, k, v = qkv.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        if layer.q_norm_D is not None and layer.k_norm_D is not None:
            q = self.backend.rms_norm(q.contiguous(), layer.q_norm_D, config.rms_norm_eps)
            k = self.backend.rms_norm(k.contiguous(), layer.k_norm_D, config.rms_norm_eps)
        keys, values = kv.keys[index], kv.values[index]
        self.backend.rope_and_store(q, k, v, self.cos_XD, self.sin_XD, batch.positions_T, keys, values, batch.slots_T)
        attended = q.new_empty(q.shape)
        self.backend.attention(q, keys, values, batch.attention, config.attention_scale, attended)
        return pages.apply("o", layer.o, attended.view(x_TE.shape[0], -1))

    def _feed_forward(self, layer: Layer, pages: "_LayerPages", x_TE: Tensor) -> Tensor:
        gate_up = pages.apply("gate_up", layer.gate_up, x_TE)
        return pages.apply("down", layer.down, self.backend.silu_mul(gate_up))

    def _add_norm(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor) -> Tensor:
        return self.backend.add_rms_norm(x_TE, residual_TE, weight_E, self.config.rms_norm_eps)


def fused_decoder(decoder: Decoder, kv: KVCache, adapters: AdapterPools | None) -> FusedDecoder:
    """The decoder with its cache and pool, as `Backend.fuse` takes it."""

    def linear(index: int, name: str, built: AdaptedLinear) -> FusedLinear:
        pages = adapters.layers[index].get(name) if adapters is not None else None
        return FusedLinear([part.weight for part in built.parts], built.bias_N, pages)

    def fused_layer(index: int, layer: Layer) -> FusedLayer:
        return FusedLayer(
            input_norm_E=layer.input_norm_E,
            qkv=linear(index, "qkv", layer.qkv),
            q_norm_D=layer.q_norm_D,
            k_norm_D=layer.k_norm_D,
            o=linear(index, "o", layer.o),
            post_attention_norm_E=layer.post_attention_norm_E,
            gate_up=linear(index, "gate_up", layer.gate_up),
            down=linear(index, "down", layer.down),
            k_cache=kv.keys[index],
            v_cache=kv.values[index],
        )

    config = decoder.config
    return FusedDecoder(
        layers=[fused_layer(index, layer) for index, layer in enumerate(decoder.layers)],
        embedding=decoder.embedding,
        lm_head=decoder.lm_head,
        final_norm_E=decoder.final_norm_E,
        cos_XD=decoder.cos_XD,
        sin_XD=decoder.sin_XD,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        norm_eps=config.rms_norm_eps,
        attention_scale=config.attention_scale,
    )


@dataclass(frozen=True, slots=True)
class _LayerPages:
    """One layer's adapter pages and the rows that use them: what an AdaptedLinear needs beside its input."""

    layer: int
    pages: Mapping[str, RankPages]
    segments: Segments | None
    routed: tuple[RoutedRows, ...]
    observe: Observer | None

    @staticmethod
    def of(adapters: AdapterPools | None, layer: int, batch: StepBatch, observe: Observer | None) -> "_LayerPages":
        pages = adapters.layers[layer] if adapters is not None else {}
        return _LayerPages(layer, pages, batch.segments, batch.routed, observe)

    def apply(self, fused: str, linear: AdaptedLinear, x_TK: Tensor) -> Tensor:
        if self.observe is not None:
            self.observe(self.layer, fused, x_TK)
        routed = [
            (rows, gates) for rows in self.routed if (gates := rows.table.layers[self.layer].get(fused)) is not None
        ]
        return linear(x_TK, self.pages.get(fused), self.segments, routed)
