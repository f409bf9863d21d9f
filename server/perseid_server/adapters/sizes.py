"""How large the files of an adapter, a gate set or heads may be. Standard library only."""

from perseid_server.adapters.untrusted import MAX_CONFIG_BYTES
from perseid_server.errors import TooLarge

MAX_ADAPTER_BYTES = 8 << 30


def check_size(name: str, nbytes: int) -> None:
    """TooLarge for a file beyond the limit of its kind."""
    limit = MAX_CONFIG_BYTES if name.endswith(".json") else MAX_ADAPTER_BYTES
    if nbytes > limit:
        raise TooLarge(f"{name} has {nbytes} bytes; the limit is {limit}")
