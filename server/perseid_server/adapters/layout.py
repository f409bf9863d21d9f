"""What a folder holds, told by its files: an adapter, a gate set, or a MeteoRA checkpoint that is both.

Standard library only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from perseid_router import gate_set
from perseid_server.adapters.lora import WEIGHTS_FILE
from perseid_server.adapters.lora_config import CONFIG_FILE

Kind = Literal["adapter", "gates"]
"""What a name can stand for."""

FILES: Mapping[Kind, tuple[str, ...]] = {
    "adapter": (CONFIG_FILE, WEIGHTS_FILE),
    "gates": (gate_set.CONFIG_FILE, gate_set.WEIGHTS_FILE),
}
METEORA_FILES = ("meteora.json", "model.safetensors")
"""A MeteoRA checkpoint, which becomes adapters and a gate set. The hub is not asked for these: the second name is that
of any model's weights."""
HUB_FILES = tuple(name for files in FILES.values() for name in files)
ALL_FILES = (*HUB_FILES, *METEORA_FILES)


def kind_of(folder: Path) -> Kind:
    """A folder with an adapter's config is an adapter whatever else lies there; so is one with neither config."""
    if (folder / gate_set.CONFIG_FILE).exists() and not (folder / CONFIG_FILE).exists():
        return "gates"
    return "adapter"
