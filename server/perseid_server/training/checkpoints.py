"""The state of an unfinished run, so that a killed one goes on."""

import io
from pathlib import Path
from typing import Any

import torch

from perseid_server.errors import Conflict, InvalidRequest
from perseid_server.training.files import write_whole

STATE_FILE = "state.pt"


def save_checkpoint(folder: Path, identity: str, state: dict[str, Any]) -> None:
    """Replace the checkpoint."""
    buffer = io.BytesIO()
    torch.save({"identity": identity, "state": state}, buffer)
    write_whole(folder / STATE_FILE, buffer.getvalue())


def load_checkpoint(folder: Path, identity: str) -> dict[str, Any] | None:
    """The state to go on from; None where the run was ended before its first checkpoint. InvalidRequest where the
    checkpoint is of a run with other options, data or adapters."""
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        held: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises whatever its reader stumbles over
        raise InvalidRequest(f"{path} cannot be read: {error}; remove {folder} to begin afresh") from error
    if held["identity"] != identity:
        raise InvalidRequest(
            f"--resume: {folder} is of a run with other options, data or adapters; give those, or remove it to begin "
            "afresh",
            field="resume",
        )
    state: dict[str, Any] = held["state"]
    return state


def refuse_unfinished(folder: Path) -> None:
    """A new run does not silently overwrite one that could go on."""
    if (folder / STATE_FILE).exists():
        raise Conflict(
            f"{folder} holds the state of an unfinished run; go on with --resume, or remove it to begin afresh"
        )
