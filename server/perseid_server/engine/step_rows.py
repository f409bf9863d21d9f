"""A scheduled step as rows of a batch: chunks side by side, drafted trees behind the tokens they may follow."""

from collections.abc import Callable, Sequence

from perseid_kernels.segments import PageList
from perseid_server.engine.adaptation import Adaptation
from perseid_server.engine.ports import Chunk
from perseid_server.engine.routed_rows import Tables
from perseid_server.engine.sequence import Sequence as Running
from perseid_server.model.batch import HostBatch, HostRouted
from perseid_server.speculation.tree import ancestor_masks


def host_batch(
    chunks: Sequence[Chunk],
    block_size: int,
    pages_of: Callable[[Adaptation], PageList | None],
    routed: Sequence[HostRouted],
) -> HostBatch:
    """The rows of all chunks, and those whose logits are wanted (`logits_spans`)."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    pages: list[PageList | None] = []
    ancestors: list[int] = []
    query_start = [0]
    for chunk in chunks:
        sequence, end = chunk.sequence, chunk.start + chunk.count
        tokens += sequence.token_ids[chunk.start : end]
        positions += range(chunk.start, end)
        if chunk.draft is None:
            ancestors += [0] * chunk.count
        else:
            tokens += chunk.draft.tree.token_ids
            positions += [chunk.start + depth for depth in chunk.draft.tree.depths]
            ancestors += ancestor_masks(chunk.draft.tree.parents)
        slots += slots_of(sequence, range(chunk.start, chunk.start + chunk.num_rows), block_size)
        pages += [pages_of(sequence.adaptation)] * chunk.num_rows
        query_start.append(query_start[-1] + chunk.num_rows)
    return HostBatch(
        token_ids=tokens,
        positions=positions,
        slots=slots,
        query_start=query_start,
        context_len=[chunk.start + chunk.num_rows for chunk in chunks],
        blocks=[chunk.sequence.blocks for chunk in chunks],
        pages=pages,
        logits_rows=[row for span in logits_spans(chunks) for row in span],
        routed=routed,
        ancestors=ancestors if any(chunk.draft is not None for chunk in chunks) else (),
    )


def page_list(tables: Tables, adaptation: Adaptation) -> PageList | None:
    """The pages of one adapter, or of a blend's, one adapter after the other; None for the base and for gates."""
    if not adaptation.weights:
        return None
    lists = [(tables.pages(version), weight) for version, weight in adaptation.weights]
    return PageList(
        tuple(page for pages, _ in lists for page in pages.pages),
        tuple(weight * each for pages, weight in lists for each in pages.weights),
    )


def logits_spans(chunks: Sequence[Chunk]) -> list[range]:
    """The rows of each chunk whose logits are wanted: all for prompt logprobs, the last and those of its drafts where
    tokens are sampled."""
    spans = []
    first = 0
    for chunk in chunks:
        end = first + chunk.num_rows
        if chunk.sequence.wants_prompt_logprobs and chunk.start < chunk.sequence.num_prompt:
            spans.append(range(first, end))
        else:
            spans.append(range(first + chunk.count - 1, end) if chunk.samples else range(0))
        first = end
    return spans


def slots_of(sequence: Running, places: Sequence[int], block_size: int) -> list[int]:
    """Cache slots of places in a sequence."""
    return [sequence.blocks[place // block_size] * block_size + place % block_size for place in places]


def accepted_moves(chunk: Chunk, accepted: Sequence[int], block_size: int) -> list[tuple[int, int]]:
    """(from, to): slots of accepted drafts that do not yet lie right behind the chunk's last token."""
    end = chunk.start + chunk.count
    moves = [(end + node, end + depth) for depth, node in enumerate(accepted) if node != depth]
    sources = slots_of(chunk.sequence, [source for source, _ in moves], block_size)
    return list(zip(sources, slots_of(chunk.sequence, [target for _, target in moves], block_size), strict=True))
