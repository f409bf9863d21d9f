"""Reading a base from disk: one reader per file family, one form for the decoder (`base.Checkpoint`)."""

from perseid_server.model.checkpoint.base import Checkpoint, NormName

__all__ = ["Checkpoint", "NormName"]
