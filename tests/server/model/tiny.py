"""Tiny random bases as Hugging Face folders, and their oracle: transformers in float32 on our dequantised weights."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from perseid_server.model.checkpoint import Checkpoint, open_checkpoint
from perseid_server.model.checkpoint.layout import HfNames
from perseid_server.model.source import ModelSource
from tests.server.model.loading.files import tiny_config, tiny_model, write_hf

SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 320}


def opened(folder: Path) -> Checkpoint:
    """The folder's checkpoint, served as "tiny"."""
    return open_checkpoint(ModelSource("hf", folder, "tiny", str(folder)))


def write_tiny(folder: Path, family: str, dtype: torch.dtype, **changes: Any) -> Path:
    """A folder with random weights. Those of q and k are large: attention is sharp, so positions matter."""
    config = tiny_config(family, **(SMALL | changes))
    weights = {}
    for name, value in tiny_model(config, seed=len(changes)).items():
        enlarged = value * 4 if name.endswith(("q_proj.weight", "k_proj.weight")) else value
        weights[name] = enlarged.to(dtype)
    return write_hf(folder, config, weights)


@dataclass(frozen=True)
class Base:
    """One folder, read by us and by transformers."""

    folder: Path

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return opened(self.folder)

    @cached_property
    def oracle(self) -> PreTrainedModel:
        """transformers' own reading of the folder, with linears as we hold them."""
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        for layer in range(self.checkpoint.config.num_layers):
            for projection in self.checkpoint.config.projections():
                held = self.checkpoint.linear(layer, projection).dequantize()
                model.get_parameter(HfNames.linear(layer, projection)).data.copy_(held)
        return model


@torch.inference_mode()
def logits_by(model: torch.nn.Module, token_ids: list[int]) -> Tensor:
    """A transformers model's logits of every position, float32 [T, V]."""
    return model(torch.tensor([token_ids])).logits[0]


def random_prompt(seed: int, length: int) -> list[int]:
    """Token ids of SMALL's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL["vocab_size"], (length,), generator=generator).tolist()
