"""The routed decoder as a differentiable function of its gates: `model/decoder.py` once more, in plain torch.

Weights are those that are served, dequantised, and frozen; so are the adapters. Every linear is

    y = W x + b + Σ_c w_c · B_c A_c x        w: softmax over the k largest gate logits of x, zero elsewhere

with the gradient going through w and through x. Float32; as much memory as the unpacked base takes.

Shape legend: T rows, E hidden size, H query heads, Hkv key/value heads, D head dim, K inputs, N outputs, P projections
of a fused linear, C columns, r ranks of all adapters together.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from perseid_router.training.accuracy import kept_weights
from perseid_server.adapters.lora import Site
from perseid_server.adapters.lowering import lower
from perseid_server.model.config import DecoderConfig
from perseid_server.model.spec import FUSED_LINEARS
from perseid_server.training.workbench import Workbench

GateLogits = Callable[[int, str, Tensor], Tensor | None]
"""(layer, fused linear, inputs [T, K]) → logits [T, P, C]; None where there are no gates."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How gates decide."""

    logits: GateLogits
    k: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Forward:
    """What a pass brings."""

    hidden_TE: Tensor  # after the final norm
    gates: list[tuple[int, str, Tensor]] = field(default_factory=list)  # (layer, fused linear, logits [T, P, C])


@dataclass(frozen=True, slots=True)
class Projection:
    """One projection with all adapters' products side by side."""

    weight_NK: Tensor
    bias_N: Tensor | None
    a_rK: Tensor
    b_rN: Tensor
    column_r: Tensor  # int64: whose rank each is

    def __call__(self, x_TK: Tensor, weights_TC: Tensor | None) -> Tensor:
        """y, [T, N]; the base's where `weights_TC` is None."""
        y_TN = functional.linear(x_TK, self.weight_NK, self.bias_N)
        if weights_TC is None or not len(self.column_r):
            return y_TN
        return y_TN + (x_TK @ self.a_rK.T * weights_TC[:, self.column_r]) @ self.b_rN


@dataclass(frozen=True, slots=True)
class TorchLayer:
    """The weights of one layer."""

    input_norm_E: Tensor
    post_attention_norm_E: Tensor
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    linears: dict[str, tuple[Projection, ...]]  # by fused linear


@dataclass(frozen=True, slots=True)
class TorchDecoder:
    """A base with all adapters of a workbench."""

    config: DecoderConfig
    embedding_VE: Tensor
    head_VE: Tensor
    final_norm_E: Tensor
    layers: tuple[TorchLayer, ...]
    cos_XD: Tensor
    sin_XD: Tensor

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, sample_T: Tensor, routing: Routing) -> Forward:
        """All rows at once; a row sees those of its own sample up to itself. Rows of a sample are in order."""
        before_TT = (sample_T[:, None] == sample_T) & (positions_T[:, None] >= positions_T)
        found = Forward(self.embedding_VE[token_ids_T])
        residual_TE = found.hidden_TE
        for index, layer in enumerate(self.layers):
            x_TE = self._norm(residual_TE, layer.input_norm_E)
            residual_TE = residual_TE + self._attend(index, layer, x_TE, positions_T, before_TT, routing, found)
            x_TE = self._norm(residual_TE, layer.post_attention_norm_E)
            gate, up = self._apply(index, layer, "gate_up", x_TE, routing, found)
            [down] = self._apply(index, layer, "down", functional.silu(gate) * up, routing, found)
            residual_TE = residual_TE + down
        return Forward(self._norm(residual_TE, self.final_norm_E), found.gates)

    def logits(self, hidden_LE: Tensor) -> Tensor:
        """Vocabulary logits, [L, V]."""
        return hidden_LE @ self.head_VE.T

    def _apply(
        self, index: int, layer: TorchLayer, fused: str, x_TK: Tensor, routing: Routing, found: Forward
    ) -> list[Tensor]:
        """The outputs of each projection."""
        projections = layer.linears[fused]
        logits = routing.logits(index, fused, x_TK)
        if logits is None:
            return [projection(x_TK, None) for projection in projections]
        found.gates.append((index, fused, logits))
        weights = kept_weights(logits, routing.k, routing.temperature)
        return [projection(x_TK, weights[:, place]) for place, projection in enumerate(projections)]

    def _attend(
        self,
        index: int,
        layer: TorchLayer,
        x_TE: Tensor,
        positions_T: Tensor,
        before_TT: Tensor,
        routing: Routing,
        found: Forward,
    ) -> Tensor:
        config = self.config
        q, k, v = (
            each.view(len(x_TE), -1, config.head_dim) for each in self._apply(index, layer, "qkv", x_TE, routing, found)
        )
        if layer.q_norm_D is not None and layer.k_norm_D is not None:
            q, k = self._norm(q, layer.q_norm_D), self._norm(k, layer.k_norm_D)
        q, k = self._rotate(q, positions_T), self._rotate(k, positions_T)
        group = config.num_heads // config.num_kv_heads
        attended = functional.scaled_dot_product_attention(
            q.transpose(0, 1),
            k.repeat_interleave(group, dim=1).transpose(0, 1),
            v.repeat_interleave(group, dim=1).transpose(0, 1),
            attn_mask=before_TT,
            scale=config.attention_scale,
        )
        joined_TK = attended.transpose(0, 1).reshape(len(x_TE), -1)
        [out] = self._apply(index, layer, "o", joined_TK, routing, found)
        return out

    def _rotate(self, x_THD: Tensor, positions_T: Tensor) -> Tensor:
        cos, sin = self.cos_XD[positions_T, None], self.sin_XD[positions_T, None]
        a, b = x_THD.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)


def unpacked(bench: Workbench) -> TorchDecoder:
    """Everything of a workbench in float32, on its device."""
    checkpoint, device = bench.checkpoint, bench.decoder.device
    embedding = checkpoint.embedding().dequantize().to(device)
    head = checkpoint.lm_head()
    pairs = _pairs(bench)
    return TorchDecoder(
        config=checkpoint.config,
        embedding_VE=embedding,
        head_VE=embedding if head is None else head.dequantize().to(device),
        final_norm_E=checkpoint.final_norm().to(device),
        layers=tuple(_layer(bench, index, pairs) for index in range(bench.spec.num_layers)),
        cos_XD=bench.decoder.cos_XD.float(),
        sin_XD=bench.decoder.sin_XD.float(),
    )


Pairs = dict[Site, list[tuple[int, Tensor, Tensor]]]
"""By projection: (column, A [rank, K], B [rank, N])."""


def _pairs(bench: Workbench) -> Pairs:
    found: Pairs = {}
    for column, adapter in enumerate(bench.adapters):
        for linear in lower(adapter.checked, bench.spec):
            for projection, pair in zip(FUSED_LINEARS[linear.fused], linear.pairs, strict=True):
                if pair is not None:
                    sides = torch.from_numpy(pair.a), torch.from_numpy(pair.b)
                    found.setdefault(Site(linear.layer, projection), []).append((column, *sides))
    return found


def _layer(bench: Workbench, index: int, pairs: Pairs) -> TorchLayer:
    checkpoint, device = bench.checkpoint, bench.decoder.device
    qk_norm = checkpoint.config.qk_norm
    return TorchLayer(
        input_norm_E=checkpoint.norm(index, "input_layernorm").to(device),
        post_attention_norm_E=checkpoint.norm(index, "post_attention_layernorm").to(device),
        q_norm_D=checkpoint.qk_norm(index, "q").to(device) if qk_norm else None,
        k_norm_D=checkpoint.qk_norm(index, "k").to(device) if qk_norm else None,
        linears={
            fused: tuple(_projection(bench, Site(index, name), pairs) for name in names)
            for fused, names in FUSED_LINEARS.items()
        },
    )


def _projection(bench: Workbench, site: Site, pairs: Pairs) -> Projection:
    device = bench.decoder.device
    weight = bench.checkpoint.linear(site.layer, site.projection).dequantize()
    bias = bench.checkpoint.bias(site.layer, site.projection)
    held = pairs.get(site, [])
    num_outputs, num_inputs = weight.shape
    return Projection(
        weight.to(device),
        None if bias is None else bias.to(device),
        torch.cat([torch.empty(0, num_inputs), *(a for _, a, _ in held)]).to(device),
        torch.cat([torch.empty(0, num_outputs), *(b for _, _, b in held)]).to(device),
        torch.tensor([column for column, a, _ in held for _ in range(len(a))], dtype=torch.int64, device=device),
    )
