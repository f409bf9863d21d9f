"""Drafts take what tokens and blocks are left in a step: nobody is preempted or put off for them, and blocks that
rejected ones needed go back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from perseid_server.engine.kv_blocks import BlockAllocator
from perseid_server.engine.ports import Chunk
from perseid_server.speculation.draft import Draft

DRAFTS_SHARE = 4
"""A step's drafted rows are at most this part of its token budget, so that prefills go on."""


class DraftRoom:
    """Room behind the chunks of a step."""

    def __init__(self, blocks: BlockAllocator, max_batch_tokens: int) -> None:
        self._blocks = blocks
        self._most = max_batch_tokens // DRAFTS_SHARE

    def most(self, tokens_left: int) -> int:
        """Drafted rows of a step that has so many tokens left."""
        return max(min(tokens_left, self._most), 0)

    def with_drafts(self, chunks: Sequence[Chunk], drafts: Mapping[str, Draft], tokens_left: int) -> Iterator[Chunk]:
        """The chunks, and behind those that have drafts as many of them as there is room for."""
        budget = self.most(tokens_left)
        for chunk in chunks:
            draft = drafts.get(chunk.sequence.id)
            room = 0 if draft is None else self._make_room(chunk, min(len(draft.tree), budget))
            if draft is None or room == 0:
                yield chunk
                continue
            budget -= room
            yield replace(chunk, draft=draft.first(room))

    def _make_room(self, chunk: Chunk, count: int) -> int:
        """Take free blocks for up to `count` tokens behind a chunk; how many of them have room then. One block may be
        taken from the prefix cache, as the sequence grows into it soon; more only where nothing is cached."""
        sequence, end = chunk.sequence, chunk.start + chunk.count
        missing = self._blocks.blocks_for(end + count) - len(sequence.blocks)
        if missing > 0 and count > 0:
            sequence.blocks += self._blocks.allocate(1) or []
            sequence.blocks += self._blocks.allocate_unkeyed(missing - 1)
        return min(count, len(sequence.blocks) * self._blocks.block_size - end)
