"""How memory is laid out, and which options are refused by name."""

import pytest

from perseid_server.engine.config import MIB, EngineConfig, plan_capacity
from perseid_server.errors import InvalidRequest

LONGEST = 8192


def plan(longest: int = LONGEST, **options):
    """Blocks of 1 MiB and pages of 20 MiB."""
    return plan_capacity(EngineConfig(**options), longest, MIB, 20 * MIB)


def test_memory_becomes_blocks_pages_and_the_longest_request() -> None:
    capacity = plan(kv_memory=100, adapter_memory=170, block_size=16)
    assert (capacity.num_blocks, capacity.num_pages) == (100, 8)
    assert capacity.max_model_len == 1600, "what the blocks hold"
    assert plan(kv_memory=1024).max_model_len == LONGEST, "what the model was trained for"
    assert plan(max_model_len=77).max_model_len == 77


@pytest.mark.parametrize(
    ("options", "field", "says"),
    [
        ({"kv_memory": 1}, "kv_memory", "at least 2"),
        ({"adapter_memory": 19}, "adapter_memory", "20.0 MiB"),
        ({"max_model_len": 8193, "kv_memory": 1024}, "max_model_len", "8192"),
        ({"max_model_len": 1601, "kv_memory": 100}, "max_model_len", "1600"),
        ({"max_num_seqs": 64, "max_batch_tokens": 63}, "max_batch_tokens", "max_num_seqs 64"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, field, says) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        plan(**options)
    assert refused.value.field == field
