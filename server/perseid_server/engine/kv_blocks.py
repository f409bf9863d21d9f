"""KV blocks: reference-counted, keyed by content, reused by equal prefixes.

A full block's key is a hash chained over everything its K and V depend on: the base, the adapter version, and all
tokens up to and including its own; and over the salt of those who may share it. Equal keys mean equal K and V, so a
block found by key can be shared. A block that
nobody holds keeps its key and can still be found until it is taken for something else, least recently used first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from struct import pack

KEY_BYTES = 16


def root_key(adaptation: str, base: str = "", salt: str = "") -> bytes:
    """The key before the first block of a sequence: the base's content hash, the key of what adapts it, and a salt.
    Whatever the salt says, it cannot imitate the bytes that make another key, of a root or of a block."""
    salted = f" salted {salt}" if salt else ""
    return blake2b(f"base {base} adapted by {adaptation}{salted}".encode(), digest_size=KEY_BYTES).digest()


def chain_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of the block that holds `token_ids` after the prefix named by `parent`."""
    return blake2b(parent + pack(f"<{len(token_ids)}I", *token_ids), digest_size=KEY_BYTES).digest()


class BlockAllocator:
    """Hands out `num_blocks` blocks of `block_size` tokens, whose K and V come from one `base`."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True, base: str = "") -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be positive, got {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.base = base
        self._caching = caching
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be taken first
        self._references = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, whether they can still be found by key or not."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Of the free ones, those that can still be found by key. Looks at each of them."""
        return sum(self._key_of[block] is not None for block in self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """⌈tokens / block size⌉"""
        return -(-num_tokens // self.block_size)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest run of known keys from the start. Takes no reference."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_held(self, blocks: Iterable[int]) -> int:
        """How many of these blocks somebody holds: sharing them takes nothing from the free ones."""
        return sum(self._references[block] > 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Take a reference to blocks found by key."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks for new content, each with one reference; None, and nothing taken, if there are too few."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget_key(block)
            self._references[block] = 1
        return blocks

    def allocate_unkeyed(self, most: int) -> list[int]:
        """Up to `most` blocks that hold nothing that could be found."""
        blocks: list[int] = []
        while len(blocks) < most and self._free:
            block = next(iter(self._free))  # those without a key come first
            if self._key_of[block] is not None:
                break
            del self._free[block]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Let a block whose K and V are complete be found. The first block of equal content stays the one found."""
        if self._caching and key not in self._block_of:
            self._forget_key(block)
            self._key_of[block] = key
            self._block_of[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give references back. The end of a prefix becomes reusable before its beginning."""
        for block in reversed(blocks):
            if self._references[block] <= 0:
                raise ValueError(f"block {block} is released but nobody holds it")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._key_of[block] is None:
                    self._free.move_to_end(block, last=False)  # nothing to find in it: take it first

    def _forget_key(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._block_of[key]
            self._key_of[block] = None
