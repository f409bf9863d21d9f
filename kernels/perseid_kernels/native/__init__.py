"""Placeholder until the native backend lands."""

from perseid_kernels.backend import Backend


def load_native_backend() -> Backend | None:
    """No native backend yet."""
    return None
