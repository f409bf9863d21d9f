"""Tables of cos and sin for rotary position embedding (RoFormer, arXiv:2104.09864)."""

import torch
from torch import Tensor

from perseid_server.model.config import DecoderConfig


def rope_tables(config: DecoderConfig, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position · inv_freq, times the attention scaling: float32 [positions, D/2] each."""
    inv_freq = torch.from_numpy(config.rope.inv_freq(config.head_dim))
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq)
    scaling = config.rope.attention_scaling
    return (angles.cos() * scaling).to(device), (angles.sin() * scaling).to(device)
