"""A tiny random base with a byte tokenizer and two adapters, as folders and as a workbench."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.numpy import save_file

from perseid_server.adapters.lora import WEIGHTS_FILE
from perseid_server.adapters.lora_config import CONFIG_FILE
from perseid_server.training.workbench import Workbench, open_workbench
from tests.fakes import TEMPLATE, byte_tokenizer
from tests.server.adapters.folders import lora_config, lora_tensors
from tests.server.model.tiny import opened, write_tiny

TARGETS = {"upper": ("q_proj", "v_proj"), "digits": ("q_proj", "down_proj")}


@dataclass(frozen=True)
class Folders:
    """Where they lie."""

    base: Path
    adapters: dict[str, str]


def write_folders(root: Path) -> Folders:
    """Adapters large enough to change what the base says."""
    base = write_tiny(root / "base", "llama", torch.float32, eos_token_id=256)
    byte_tokenizer().save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": TEMPLATE}))
    spec = opened(base).spec
    folders = {}
    for seed, (name, targets) in enumerate(TARGETS.items()):
        folder = root / name
        folder.mkdir()
        tensors = {key: value * 0.1 for key, value in lora_tensors(spec, targets=targets, seed=seed).items()}
        (folder / CONFIG_FILE).write_text(json.dumps(lora_config(target_modules=list(targets))))
        save_file(tensors, folder / WEIGHTS_FILE)
        folders[name] = str(folder)
    return Folders(base, folders)


def open_tiny(folders: Folders) -> Workbench:
    """On the CPU, with room for a few short samples."""
    return open_workbench(str(folders.base), folders.adapters, device="cpu", max_rows=2048, max_tokens=256)
