"""Perseid: one frozen 4-bit base model, any number of hot-swapped LoRA adapters, one batch."""

from importlib.metadata import version

__version__ = version("perseid")
