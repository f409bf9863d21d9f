"""The paged KV cache: one tensor of blocks for the keys and one for the values of each layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from perseid_server.model.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class KVCache:
    """Per layer K and V, [NB, BS, Hkv, D]: NB blocks of BS tokens."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @staticmethod
    def allocate(
        spec: BaseSpec, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        """Blocks for every layer. Memory is touched, and so really taken, only as blocks come into use."""
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        layers = range(spec.num_layers)
        return KVCache(
            tuple(torch.empty(shape, dtype=dtype, device=device) for _ in layers),
            tuple(torch.empty(shape, dtype=dtype, device=device) for _ in layers),
        )

    @staticmethod
    def bytes_per_block(spec: BaseSpec, block_size: int, dtype: torch.dtype) -> int:
        """Device bytes that one block takes over all layers."""
        return 2 * spec.num_layers * block_size * spec.num_kv_heads * spec.head_dim * dtype.itemsize
