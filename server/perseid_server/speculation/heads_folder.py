"""The files of a folder with Medusa heads, ours and those that other servers read. Standard library only.

medusa_lm_head.safetensors   the tensors; or model.safetensors beside a config.json of a medusa model (vLLM)
perseid_heads.json           what Perseid knows of them (heads_config.py); may be missing
config.json                  what others know of them; may be missing
medusa_lm_head.pt            the tensors as Medusa v1 has them: a pickle, read only where the operator allows it
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perseid_server.adapters import untrusted
from perseid_server.errors import AdapterRejected
from perseid_server.speculation.heads_config import CONFIG_FILE, TENSORS_FILE

VLLM_TENSORS_FILE = "model.safetensors"
FOREIGN_CONFIG_FILE = "config.json"
"""It is often wrong: the tensors are believed, and it gives warnings."""
PICKLE_FILE = "medusa_lm_head.pt"


def is_heads(folder: Path) -> bool:
    """Whether a folder looks like Medusa heads, whether or not they are good ones."""
    return any((folder / name).exists() for name in (TENSORS_FILE, CONFIG_FILE, PICKLE_FILE)) or _says_medusa(folder)


def tensors_file(folder: Path) -> Path:
    """Where a folder's tensors lie. AdapterRejected says what is missing, and how to mend it."""
    for name in (TENSORS_FILE, VLLM_TENSORS_FILE):
        if (folder / name).is_file():  # a pipe would be waited for
            return folder / name
    if (folder / PICKLE_FILE).exists():
        raise AdapterRejected(
            f"the heads have no {TENSORS_FILE}; {PICKLE_FILE} is not read, because such files can run code: save its "
            f"tensors with safetensors.torch.save_file(torch.load({PICKLE_FILE!r}, weights_only=True), "
            f"{TENSORS_FILE!r}), or let the operator start the server with --allow-pickle-heads"
        )
    raise AdapterRejected(
        f"the heads have no {TENSORS_FILE}; expected it in the folder, or {VLLM_TENSORS_FILE} as vLLM has it "
        f"({PICKLE_FILE} is read only where the operator starts the server with --allow-pickle-heads)"
    )


def is_pickled(folder: Path) -> bool:
    """Whether the tensors are there as a pickle alone."""
    return (folder / PICKLE_FILE).is_file() and not any(
        (folder / name).exists() for name in (TENSORS_FILE, VLLM_TENSORS_FILE)
    )


def read_foreign_config(folder: Path) -> Mapping[str, Any]:
    """What config.json says; nothing where there is none that can be read, as it is needed for nothing."""
    try:
        content = untrusted.parse_json(read_small(folder / FOREIGN_CONFIG_FILE) or b"{}")
    except (AdapterRejected, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_small(path: Path) -> bytes | None:
    """A configuration file, None where there is none. AdapterRejected when it cannot be read or is too large,
    Unavailable when it cannot be read now."""
    try:
        return untrusted.read_small(path, untrusted.MAX_CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise untrusted.unreadable(path.name, error) from error


def _says_medusa(folder: Path) -> bool:
    said = read_foreign_config(folder)
    architectures = said.get("architectures")
    named = [said.get("model_type"), *(architectures if isinstance(architectures, list) else [])]
    return "medusa_num_heads" in said or any(isinstance(name, str) and "medusa" in name.lower() for name in named)
