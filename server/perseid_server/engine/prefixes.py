"""What sequences have in common: their full blocks by content keys, found by others and findable for them."""

from perseid_server.engine.kv_blocks import BlockAllocator, chain_key, root_key
from perseid_server.engine.sequence import Sequence


class Prefixes:
    """Looks up, hands out and publishes the blocks of sequences."""

    def __init__(self, blocks: BlockAllocator) -> None:
        self._blocks = blocks

    def cached(self, sequence: Sequence) -> list[int]:
        """Blocks of the sequence's prefix that are there already."""
        return self._blocks.find(self._key(sequence, index) for index in range(self._most(sequence)))

    def cached_if(self, sequence: Sequence, least: int) -> list[int] | None:
        """The same if they are at least so many. To be told again that they are not costs one lookup: of the block
        where the last search ended."""
        if least > self._most(sequence):
            return None
        searched = sequence.block_keys[:least]
        if searched and not self._blocks.find(searched[-1:]):
            return None
        cached = self.cached(sequence)
        return cached if len(cached) >= least else None

    def has_room(self, sequence: Sequence, cached: list[int]) -> bool:
        """Whether there are blocks for all its tokens, when it shares these."""
        needed = self._blocks.blocks_for(len(sequence.token_ids)) - self._blocks.num_held(cached)
        return needed <= self._blocks.num_free

    def take_blocks(self, sequence: Sequence, cached: list[int]) -> None:
        """Give a sequence that `has_room` these, and new ones for the rest of its tokens."""
        self._blocks.share(cached)
        new = self._blocks.allocate(self._blocks.blocks_for(len(sequence.token_ids)) - len(cached))
        assert new is not None, "has_room() said there is room"
        sequence.blocks = cached + new
        sequence.num_computed = len(cached) * self._blocks.block_size
        sequence.num_published = len(cached)

    def publish(self, sequence: Sequence) -> None:
        """Let full blocks be found whose K and V are complete."""
        for index in range(sequence.num_published, sequence.num_computed // self._blocks.block_size):
            self._blocks.publish(sequence.blocks[index], self._key(sequence, index))
            sequence.num_published = index + 1

    def _most(self, sequence: Sequence) -> int:
        """Blocks of others that it can use. The last token is always computed: its logits are needed."""
        return 0 if sequence.wants_prompt_logprobs else (len(sequence.token_ids) - 1) // self._blocks.block_size

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """Key of a full block. Each is computed once: tokens stay what they are, whatever becomes of the blocks."""
        keys, size = sequence.block_keys, self._blocks.block_size
        for number in range(len(keys), index + 1):
            parent = keys[-1] if keys else self._root_key(sequence)
            keys.append(chain_key(parent, sequence.token_ids[number * size : (number + 1) * size]))
        return keys[index]

    def _root_key(self, sequence: Sequence) -> bytes:
        return root_key(sequence.adaptation.key, self._blocks.base, sequence.request.cache_salt)
