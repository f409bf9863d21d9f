"""The folder that a run ends with: what Perseid loads, and what other servers read too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from perseid_server.speculation.heads_config import CONFIG_FILE, TENSORS_FILE, HeadsConfig, render_config
from perseid_server.training.files import write_whole
from perseid_server.training.medusa.heads import MedusaHeads

OTHERS_CONFIG_FILE = "config.json"


def write_heads(
    out: Path, heads: MedusaHeads, config: HeadsConfig, base_name: str, training: Mapping[str, Any]
) -> None:
    """Tensors (Medusa v2's names, float16), Perseid's configuration, and that of LoRAX, TGI and Medusa's own tools."""
    for_others = {
        "base_model_name_or_path": base_name,
        "medusa_num_heads": len(heads.weights),
        "medusa_num_layers": len(heads.weights[0]),
        "version": "2",
    }
    write_whole(out / TENSORS_FILE, save(heads.tensors(), {"format": "pt"}))
    write_whole(out / OTHERS_CONFIG_FILE, (json.dumps(for_others, indent=2) + "\n").encode())
    write_whole(out / CONFIG_FILE, render_config(config, dict(training)))
