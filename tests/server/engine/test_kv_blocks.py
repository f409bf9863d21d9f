"""Blocks: nothing leaks, nothing is held twice, equal content is found and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseid_server.engine.kv_blocks import BlockAllocator, chain_key, root_key


def test_blocks_without_a_key_are_taken_apart_from_those_with_one() -> None:
    allocator = BlockAllocator(4, 2)
    held = allocator.allocate(2) or []
    allocator.publish(held[0], b"a")
    allocator.release(held)
    taken = allocator.allocate_unkeyed(10)
    assert len(taken) == 3
    assert held[0] not in taken
    assert allocator.find([b"a"]) == [held[0]]
    allocator.release(taken)
    assert allocator.num_free == 4
    assert allocator.allocate_unkeyed(0) == []


def test_allocate_takes_all_or_nothing():
    blocks = BlockAllocator(4, 2)
    assert blocks.allocate(5) is None
    assert blocks.num_free == 4
    taken = blocks.allocate(3)
    assert taken is not None
    assert len(set(taken)) == 3
    assert blocks.num_free == 1


def test_a_released_block_is_found_by_its_key_until_it_is_reused():
    blocks = BlockAllocator(2, 2)
    (block,) = blocks.allocate(1)
    key = chain_key(root_key("none"), [1, 2])
    blocks.publish(block, key)
    blocks.release([block])
    assert blocks.find([key]) == [block]
    blocks.allocate(2)
    assert blocks.find([key]) == []


def test_least_recently_released_goes_first_and_blocks_without_a_key_before_it():
    blocks = BlockAllocator(3, 2)
    first, second, third = blocks.allocate(3)
    keys = [chain_key(root_key("none"), [i, i]) for i in range(2)]
    blocks.publish(first, keys[0])
    blocks.publish(second, keys[1])
    for block in (first, second, third):
        blocks.release([block])
    assert blocks.allocate(1) == [third]
    assert blocks.allocate(1) == [first]
    assert blocks.find([keys[1]]) == [second]


def test_find_stops_at_the_first_unknown_key():
    blocks = BlockAllocator(3, 2)
    held = blocks.allocate(3)
    keys = [chain_key(root_key("none"), [i, i]) for i in range(3)]
    blocks.publish(held[0], keys[0])
    blocks.publish(held[2], keys[2])
    assert blocks.find(keys) == [held[0]]


def test_a_shared_block_is_free_only_when_the_last_holder_lets_go():
    blocks = BlockAllocator(1, 2)
    held = blocks.allocate(1)
    blocks.share(held)
    blocks.release(held)
    assert blocks.num_free == 0
    blocks.release(held)
    assert blocks.num_free == 1
    with pytest.raises(ValueError, match="nobody holds it"):
        blocks.release(held)


def test_without_caching_nothing_is_found():
    blocks = BlockAllocator(1, 2, caching=False)
    held = blocks.allocate(1)
    key = chain_key(root_key("none"), [1, 2])
    blocks.publish(held[0], key)
    assert blocks.find([key]) == []


def test_keys_depend_on_base_adapter_prefix_and_tokens():
    keys = {
        chain_key(root_key("none"), [1, 2]),
        chain_key(root_key("a"), [1, 2]),
        chain_key(root_key("b"), [1, 2]),
        chain_key(root_key("none", "other base"), [1, 2]),
        chain_key(root_key("a", "other base"), [1, 2]),
        chain_key(root_key("none"), [2, 1]),
        chain_key(chain_key(root_key("none"), [1, 2]), [1, 2]),
    }
    assert len(keys) == 7


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release", "publish"]), st.integers(0, 5))))
def test_random_use_keeps_every_block_accounted_for(operations):
    blocks = BlockAllocator(8, 2)
    held: list[int] = []
    for step, (operation, number) in enumerate(operations):
        if operation == "allocate":
            held += blocks.allocate(number) or []
        elif operation == "share" and held:
            blocks.share([held[number % len(held)]])
            held.append(held[number % len(held)])
        elif operation == "release" and held:
            blocks.release([held.pop(number % len(held))])
        elif operation == "publish" and held:
            blocks.publish(held[number % len(held)], chain_key(root_key("none"), [step, number]))
        assert blocks.num_free == 8 - len(set(held))
    blocks.release(held)
    assert blocks.num_free == 8
    assert blocks.allocate(8) is not None
