"""Recorded steps with trees against the ordinary pass over the same rows: the same bits in logits and in the cache."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from perseid_kernels.segments import PageList
from perseid_server.adapters.pool import AdapterPool
from perseid_server.model.batch import HostBatch
from perseid_server.model.decode_graphs import DecodeGraphs
from perseid_server.model.graph_limits import GraphLimits, most_tree_rows
from perseid_server.model.kv_cache import KVCache
from perseid_server.model.warm_up import warm_up
from perseid_server.speculation.tree import ancestor_masks
from tests.server.model.passes import BLOCK_SIZE, CPU, backend_named, decoder_of
from tests.server.model.recording import TapeRecorder
from tests.server.model.test_decode_graphs import NUM_BLOCKS, NUM_PAGES, ONE, TWO, WIDE, Stage, decodes, write_page
from tests.server.model.tiny import Base, write_tiny

LIMITS = GraphLimits(4, 600, BLOCK_SIZE, NUM_PAGES, pages_of_row=3, max_tree_rows=18)
MIXED = [ONE, None, TWO, WIDE]
LONE: tuple[int, ...] = ()  # parents of a decode's tree
FORK, CHAIN, BUSHY = (-1, -1), (-1, 0, 1), (-1, -1, 0, 0, 1, 2, -1, 6)
STEPS: dict[str, tuple[Sequence[int], Sequence[Sequence[int]]]] = {  # prefixes, trees
    "one draft": ([33], [(-1,)]),
    "decodes and ragged trees": ([20, 15, 63, 1], [LONE, FORK, CHAIN, LONE]),
    "a full bucket": ([47, 16, 30], [BUSHY, LONE, (*CHAIN, -1, 3)]),
    "a tree beyond a tile of rows": ([18], [(*BUSHY, *BUSHY)]),
    "the fullest step": ([5, 40, 31, 2], [BUSHY, FORK, (*CHAIN, 2), LONE]),
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of padding rows


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Recorded once for all tests: each fills the inputs anew."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    base = Base(write_tiny(tmp_path_factory.mktemp("graphs"), "llama", torch.bfloat16, **small))
    decoder = decoder_of(base.checkpoint, backend_named("triton"), LIMITS.max_context)
    pool = AdapterPool(base.checkpoint.spec, NUM_PAGES, CPU, torch.float32)
    kv = KVCache.allocate(base.checkpoint.spec, NUM_BLOCKS, BLOCK_SIZE, CPU, torch.float32)
    rng = torch.Generator().manual_seed(3)
    for page in range(NUM_PAGES):
        write_page(pool, page, rng)
    for cache in (*kv.keys, *kv.values):
        cache.normal_(generator=rng)
    before = [cache.clone() for cache in (*kv.keys, *kv.values)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        warm_up(decoder, kv, pool, 2)  # as the server does: it uploads what kernels cache
        recorder = TapeRecorder(monkeypatch)
        graphs = DecodeGraphs(decoder, kv, pool, recorder, LIMITS)
        assert all(map(torch.equal, before, (*kv.keys, *kv.values))), "recording wrote into the cache"
        yield Stage(decoder, recorder, kv, pool, graphs)


def tree_step(
    prefixes: Sequence[int],
    trees: Sequence[Sequence[int]],
    pages: Sequence[PageList | None] = (),
    *,
    seed: int = 0,
) -> HostBatch:
    """A tree behind each prefix, in scattered blocks; a tree of its root alone is handed in as a decode is."""
    order = random.Random(seed)
    free = order.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    masks = [ancestor_masks(parents) for parents in trees]
    contexts = [prefix + len(rows) for prefix, rows in zip(prefixes, masks, strict=True)]
    blocks = [[free.pop() for _ in range(-(-context // BLOCK_SIZE))] for context in contexts]
    places = [range(*ends) for ends in zip(prefixes, contexts, strict=True)]
    owners = [sequence for sequence, rows in enumerate(masks) for _ in rows]
    lists = list(pages) or [None] * len(trees)
    return HostBatch(
        token_ids=[order.randrange(64) for _ in owners],
        positions=[prefixes[s] + mask.bit_count() - 1 for s, rows in enumerate(masks) for mask in rows],
        slots=[blocks[s][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for s, of in enumerate(places) for at in of],
        query_start=[0, *accumulate(map(len, masks))],
        context_len=contexts,
        blocks=blocks,
        pages=[lists[sequence] for sequence in owners],
        logits_rows=range(len(owners)),
        ancestors=[mask if len(rows) > 1 else 0 for rows in masks for mask in rows],
    )


# --- the same logits and the same cache -------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "mixed"])
@pytest.mark.parametrize("name", STEPS)
def test_a_recorded_step_with_trees_is_the_ordinary_step(stage: Stage, name: str, adapted: bool) -> None:
    """Full buckets and padded ones; the cache that both write is compared as a whole, so padding wrote nothing."""
    prefixes, trees = STEPS[name]
    recorded, ordinary = stage.forward_both(tree_step(prefixes, trees, MIXED[: len(trees)] if adapted else ()))
    assert torch.equal(recorded, ordinary)


def test_a_decode_beside_trees_has_the_bits_of_a_recorded_decode(stage: Stage) -> None:
    """Sequences 0 and 3 have no drafts; and a root sees its prefix alone, whatever hangs on it."""
    prefixes, trees = STEPS["decodes and ragged trees"]
    step = tree_step(prefixes, trees, MIXED)
    together, _ = stage.forward_both(step)
    roots = list(step.query_start[:-1])
    plain = replace(
        step,
        **{name: [getattr(step, name)[row] for row in roots] for name in ("token_ids", "positions", "slots", "pages")},
        query_start=range(len(roots) + 1),
        context_len=[prefix + 1 for prefix in prefixes],
        logits_rows=range(len(roots)),
        ancestors=(),
    )
    assert plain.is_decode
    assert torch.equal(stage.forward_both(plain)[0], together[roots])


def test_branches_and_adapters_matter(stage: Stage) -> None:
    """Without this the others could pass on rows that see the prefix alone, and on adapters that do nothing."""
    prefixes, trees = [2, 3], [CHAIN, FORK]
    chain, _ = stage.forward_both(tree_step(prefixes, trees))
    star, _ = stage.forward_both(replace(tree_step(prefixes, trees), ancestors=[1, 3, 5, 9, 1, 3, 5]))
    adapted, _ = stage.forward_both(tree_step(prefixes, trees, [None, TWO]))
    assert ((chain - star).abs().amax(dim=1) > 0.1).tolist() == [False, False, True, True, False, False, False]
    assert ((chain - adapted).abs().amax(dim=1) > 0.1).tolist() == [False] * 4 + [True] * 3


def test_nothing_is_left_of_the_step_before(stage: Stage) -> None:
    """Fewer rows, sequences and tokens than the step before, other adapters and other trees; then decodes."""
    for prefixes, trees, pages in (
        ([570, 33], [BUSHY, CHAIN], MIXED[:2]),
        ([3], [FORK], [ONE]),
        ([9, 40, 2], [CHAIN, BUSHY, LONE], [TWO] * 3),
        ([30, 7], [LONE, (-1,)], ()),
        ([12], [(*BUSHY, *BUSHY)], ()),
        ([5, 6], [CHAIN, LONE], [WIDE, None]),
    ):
        recorded, ordinary = stage.forward_both(tree_step(prefixes, trees, pages, seed=len(prefixes)))
        assert torch.equal(recorded, ordinary)
    recorded, ordinary = stage.forward_both(decodes([4, 21], [ONE, None]))
    assert torch.equal(recorded, ordinary)


def test_prefixes_grow(stage: Stage) -> None:
    """Over block borders, and trees from one span of attention's keys (512) into the next."""
    for grown in range(0, 6, 2):
        recorded, ordinary = stage.forward_both(tree_step([508 + grown, 29 + grown], [CHAIN, FORK], MIXED[:2]))
        assert torch.equal(recorded, ordinary)


# --- which steps are taken --------------------------------------------------------------------------------------


def not_taken() -> Iterator[tuple[str, HostBatch]]:
    step = tree_step([20, 15, 30], [LONE, FORK, CHAIN], MIXED[:3])
    yield "a chunk beside trees", replace(step, ancestors=[0] * 4 + list(step.ancestors[4:]))
    yield "rows whose logits nobody wants", replace(step, logits_rows=[0, 1, 4])
    yield "too many rows", tree_step([20, 30], [(*BUSHY, *BUSHY), (-1,)])
    yield "too long a context", tree_step([599], [FORK])
    yield "too many pages", tree_step([5], [(-1,)], [PageList.of(range(7))])


@pytest.mark.parametrize("batch", [pytest.param(batch, id=name) for name, batch in not_taken()])
def test_other_steps_are_not_taken(stage: Stage, batch: HostBatch) -> None:
    assert not stage.graphs.takes(batch)


# --- what is recorded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_rows", "max_tree_rows", "buckets"),
    [
        (64, 0, ()),
        (1, 64, (16, 32, 64)),
        (4, 18, (16, 18)),
        (2, 5, (5,)),
        (64, 128, (16, 32, 64, 128)),
        (256, 320, (16, 32, 64, 128, 192, 256, 320)),
    ],
)
def test_buckets_of_steps_with_trees(max_rows: int, max_tree_rows: int, buckets: tuple[int, ...]) -> None:
    limits = replace(LIMITS, max_rows=max_rows, max_tree_rows=max_tree_rows)
    assert limits.tree_buckets == buckets
    assert limits.most_rows == max((*buckets, max_rows))


@pytest.mark.parametrize(
    ("max_sequences", "max_batch_tokens", "rows"), [(1, 512, 64), (2, 512, 66), (64, 512, 128), (3, 24, 24)]
)
def test_rows_of_the_largest_step_with_trees(max_sequences: int, max_batch_tokens: int, rows: int) -> None:
    assert most_tree_rows(max_sequences, max_batch_tokens) == rows


def test_all_recordings_share_one_pool(stage: Stage) -> None:
    """Trees in two buckets, decodes in three, each with adapters and without."""
    assert len(stage.recorder.pools) == 2 * (2 + 3)
    assert len(set(map(id, stage.recorder.pools))) == 1
