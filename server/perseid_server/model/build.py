"""From a checkpoint to a decoder on its device, a tensor at a time: no more than one layer is ever unpacked."""

from collections.abc import Callable

import torch
from torch import Tensor

from perseid_kernels.backend import Backend
from perseid_server.model.checkpoint.base import Checkpoint
from perseid_server.model.decoder import Decoder, Layer
from perseid_server.model.linear import AdaptedLinear
from perseid_server.model.rope import rope_tables
from perseid_server.model.spec import FUSED_LINEARS

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""


def build_decoder(
    checkpoint: Checkpoint,
    backend: Backend,
    device: torch.device,
    num_positions: int | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Pack every weight into the backend's layout on `device`.

    `num_positions` bounds the rotary tables (default: the model's maximum). Raises what the checkpoint raises.
    """
    config = checkpoint.config
    embedding = backend.pack(checkpoint.embedding(), device)
    layers = []
    for index in range(config.num_layers):
        layers.append(_layer(checkpoint, index, backend, device))
        if progress:
            progress(index + 1, config.num_layers)
    head = checkpoint.lm_head()
    cos, sin = rope_tables(config, num_positions or config.max_position_embeddings, device)
    return Decoder(
        config=config,
        backend=backend,
        device=device,
        embedding=embedding,
        layers=tuple(layers),
        final_norm_E=_place(checkpoint.final_norm(), backend, device),
        lm_head=embedding if head is None else backend.pack(head, device),
        cos_XD=cos,
        sin_XD=sin,
    )


def _layer(checkpoint: Checkpoint, index: int, backend: Backend, device: torch.device) -> Layer:
    def linear(fused: str) -> AdaptedLinear:
        names = FUSED_LINEARS[fused]
        weights = [checkpoint.linear(index, name) for name in names]
        return AdaptedLinear.build(backend, device, weights, [checkpoint.bias(index, name) for name in names])

    def placed(tensor: Tensor) -> Tensor:
        return _place(tensor, backend, device)

    qk_norm = checkpoint.config.qk_norm
    return Layer(
        input_norm_E=placed(checkpoint.norm(index, "input_layernorm")),
        qkv=linear("qkv"),
        q_norm_D=placed(checkpoint.qk_norm(index, "q")) if qk_norm else None,
        k_norm_D=placed(checkpoint.qk_norm(index, "k")) if qk_norm else None,
        o=linear("o"),
        post_attention_norm_E=placed(checkpoint.norm(index, "post_attention_layernorm")),
        gate_up=linear("gate_up"),
        down=linear("down"),
    )


def _place(tensor: Tensor, backend: Backend, device: torch.device) -> Tensor:
    return tensor.to(device, backend.compute_dtype).contiguous()
