"""Reading a base from disk: one reader per kind of file, one form for the decoder (`base.Checkpoint`)."""

from perseid_server.model.checkpoint.base import Checkpoint, NormName
from perseid_server.model.checkpoint.gguf import GgufCheckpoint
from perseid_server.model.checkpoint.hf import HfCheckpoint
from perseid_server.model.source import ModelSource

__all__ = ["Checkpoint", "NormName", "open_checkpoint"]


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Open a base and check its headers. UnsupportedModel names the key or tensor that rules it out."""
    if source.kind == "gguf":
        return GgufCheckpoint(source.path, source.name)
    return HfCheckpoint(source.path, source.name)
