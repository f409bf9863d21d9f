"""What the engine is built with. "auto" values are resolved once, by a pure function."""

from dataclasses import dataclass
from typing import Literal

from perseid_server.errors import InvalidRequest

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All sizes in MiB, lengths in tokens. None means: choose."""

    model: str = "embedded"
    served_name: str | None = None
    device: str = "auto"
    kv_dtype: str = "auto"
    activations: Literal["exact", "int16", "int8"] = "exact"
    kv_memory: int = 360
    adapter_memory: int = 512
    adapter_host_memory: int = 1024
    max_batch_tokens: int = 512
    max_num_seqs: int = 64
    max_model_len: int | None = None
    block_size: int = 16
    prefix_cache: bool = True
    cuda_graphs: bool = True
    draft_tokens: int | None = None  # of each sequence and step; None: those that pay, 0: never any
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Capacity:
    """How the memory is laid out."""

    num_blocks: int
    num_pages: int
    max_model_len: int


def plan_capacity(config: EngineConfig, longest: int, bytes_per_block: int, bytes_per_page: int) -> Capacity:
    """Blocks, pages and the longest request that fit the memory. `longest` is the model's own limit in tokens.

    InvalidRequest names the option that is too small.
    """
    if config.max_num_seqs > config.max_batch_tokens:
        raise InvalidRequest(
            f"max_batch_tokens {config.max_batch_tokens} is less than max_num_seqs {config.max_num_seqs}: every "
            "decoding sequence takes a token of each step; raise the one or lower the other",
            field="max_batch_tokens",
        )
    num_blocks = config.kv_memory * MIB // bytes_per_block
    if num_blocks < 2:
        raise InvalidRequest(
            f"kv_memory {config.kv_memory} MiB holds {num_blocks} blocks of {bytes_per_block / MIB:.1f} MiB; "
            "at least 2 are needed",
            field="kv_memory",
        )
    num_pages = config.adapter_memory * MIB // bytes_per_page
    if num_pages < 1:
        raise InvalidRequest(
            f"adapter_memory {config.adapter_memory} MiB holds no adapter page; one takes "
            f"{bytes_per_page / MIB:.1f} MiB with this base",
            field="adapter_memory",
        )
    fits = num_blocks * config.block_size
    if config.max_model_len is None:
        return Capacity(num_blocks, num_pages, min(longest, fits))
    for limit, why in ((longest, "the base was trained for"), (fits, f"kv_memory {config.kv_memory} MiB has room for")):
        if config.max_model_len > limit:
            raise InvalidRequest(
                f"max_model_len {config.max_model_len}: {why} {limit} tokens at most", field="max_model_len"
            )
    return Capacity(num_blocks, num_pages, config.max_model_len)
