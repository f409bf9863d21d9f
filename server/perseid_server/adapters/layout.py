"""What a folder holds, told by its files: an adapter, a gate set, Medusa heads, or a MeteoRA checkpoint that is both
adapters and a gate set.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from perseid_router import gate_set
from perseid_server.adapters.lora import WEIGHTS_FILE
from perseid_server.adapters.lora_config import CONFIG_FILE
from perseid_server.speculation import heads_config, heads_folder

Kind = Literal["adapter", "gates", "heads"]
"""What a name can stand for."""

FILES: Mapping[Kind, tuple[str, ...]] = {
    "adapter": (CONFIG_FILE, WEIGHTS_FILE),
    "gates": (gate_set.CONFIG_FILE, gate_set.WEIGHTS_FILE),
    "heads": (heads_config.TENSORS_FILE,),
}
OPTIONAL_FILES: Mapping[Kind, tuple[str, ...]] = {
    "adapter": (),
    "gates": (),
    "heads": (heads_config.CONFIG_FILE, heads_folder.FOREIGN_CONFIG_FILE),
}
"""What belongs to the content where it is there."""
METEORA_FILES = ("meteora.json", "model.safetensors")
"""A MeteoRA checkpoint, which becomes adapters and a gate set. The hub is not asked for these: the second name is that
of any model's weights."""
HUB_FILES = tuple(name for files in (*FILES.values(), *OPTIONAL_FILES.values()) for name in files)
ALL_FILES = (*HUB_FILES, *METEORA_FILES, heads_folder.PICKLE_FILE)


def kind_of(folder: Path) -> Kind:
    """A folder with an adapter's config is an adapter whatever else lies there; so is one that tells nothing."""
    if (folder / CONFIG_FILE).exists():
        return "adapter"
    if (folder / gate_set.CONFIG_FILE).exists():
        return "gates"
    return "heads" if heads_folder.is_heads(folder) else "adapter"


def files_of(folder: Path) -> Mapping[str, str]:
    """The files to copy, and what they are called in the store. AdapterRejected where heads have none to be read."""
    kind = kind_of(folder)
    optional = [name for name in OPTIONAL_FILES[kind] if (folder / name).exists()]
    if kind == "heads":
        return {heads_folder.tensors_file(folder).name: heads_config.TENSORS_FILE} | {name: name for name in optional}
    return {name: name for name in (*FILES[kind], *optional)}
