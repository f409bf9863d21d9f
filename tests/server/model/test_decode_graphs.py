"""Recorded decode steps against the ordinary pass over the same rows: the same bits in the logits and in the cache."""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from perseid_kernels import attention
from perseid_kernels.segments import PAGE_RANK, PageList
from perseid_server.adapters.pool import AdapterPool
from perseid_server.model import graph_limits
from perseid_server.model.batch import HostBatch
from perseid_server.model.decode_graphs import DecodeGraphs
from perseid_server.model.decoder import Decoder
from perseid_server.model.graph_limits import GraphLimits
from perseid_server.model.kv_cache import KVCache
from tests.server.model.passes import BLOCK_SIZE, CPU, backend_named, decoder_of
from tests.server.model.recording import TapeRecorder
from tests.server.model.tiny import Base, write_tiny

NUM_BLOCKS = 60
NUM_PAGES = 6
LIMITS = GraphLimits(max_rows=6, max_context=600, block_size=BLOCK_SIZE, num_pages=NUM_PAGES, pages_of_row=3)
ONE, TWO, WIDE = PageList.of((4,)), PageList.of((1, 0)), PageList.of((2, 3, 5))
FAMILIES: dict[str, Sequence[PageList | None]] = {
    "base": [None] * 6,
    "one adapter": [TWO] * 6,
    "mixed": [ONE, None, TWO, WIDE, ONE, None],
}
# What padding rows compute is anything: their attention is never written.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Two layers, sharp attention, a bias: small, for the interpreter."""
    small = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "attention_bias": True}
    return Base(write_tiny(tmp_path_factory.mktemp("graphs"), "llama", torch.bfloat16, **small))


@pytest.fixture(scope="module")
def decoder(base: Base) -> Decoder:
    return decoder_of(base.checkpoint, backend_named("triton"), LIMITS.max_context)


@dataclass(frozen=True)
class Stage:
    """A decoder with recorded steps, on a cache where every slot holds something."""

    decoder: Decoder
    recorder: TapeRecorder
    kv: KVCache
    pool: AdapterPool
    graphs: DecodeGraphs

    def forward_both(self, batch: HostBatch) -> tuple[Tensor, Tensor]:
        """(recorded, ordinary) logits. The ordinary pass has a cache of its own, and both write the same; hidden states
        are the same too."""
        own = KVCache(*(tuple(part.clone() for part in parts) for parts in (self.kv.keys, self.kv.values)))
        ordinary = self.decoder.forward(batch.on(CPU), own, self.pool)
        before = self.recorder.num_replays
        assert self.graphs.takes(batch)
        recorded = self.graphs.forward(batch)
        assert torch.equal(recorded.hidden_LE, ordinary.hidden_LE), "the hidden states differ"
        assert self.recorder.num_replays == before + 1
        for ours, theirs in zip((*self.kv.keys, *self.kv.values), (*own.keys, *own.values), strict=True):
            assert torch.equal(ours, theirs), "the caches differ"
        return recorded.logits_LV.clone(), ordinary.logits_LV


@pytest.fixture
def stage(base: Base, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> Stage:
    spec = base.checkpoint.spec
    pool = AdapterPool(spec, NUM_PAGES, CPU, torch.float32)
    kv = KVCache.allocate(spec, NUM_BLOCKS, BLOCK_SIZE, CPU, torch.float32)
    rng = torch.Generator().manual_seed(3)
    for page in range(NUM_PAGES):
        write_page(pool, page, rng)
    for cache in (*kv.keys, *kv.values):
        cache.normal_(generator=rng)
    recorder = TapeRecorder(monkeypatch)
    return Stage(decoder, recorder, kv, pool, DecodeGraphs(decoder, kv, pool, recorder, LIMITS))


def write_page(pool: AdapterPool, page: int, rng: torch.Generator) -> None:
    """Random numbers that move logits by some units; every third page leaves the last projection alone."""
    for layer in pool.layers:
        for held in layer.values():
            a = torch.randn(held.a.shape[1:], generator=rng) * 0.3
            if page % 3 == 0:
                a[-PAGE_RANK:] = 0
            held.write(page, a, torch.randn(held.b.shape[1:], generator=rng) * 0.3)


def decodes(contexts: Sequence[int], pages: Sequence[PageList | None] = (), *, seed: int = 0) -> HostBatch:
    """A row for each sequence of so many tokens, this step's included, in scattered blocks."""
    order = random.Random(seed)
    free = order.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    blocks = [[free.pop() for _ in range(-(-context // BLOCK_SIZE))] for context in contexts]
    last = [context - 1 for context in contexts]
    rows = range(len(contexts))
    return HostBatch(
        token_ids=[order.randrange(64) for _ in rows],
        positions=last,
        slots=[of[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for of, at in zip(blocks, last, strict=True)],
        query_start=range(len(contexts) + 1),
        context_len=contexts,
        blocks=blocks,
        pages=list(pages[: len(contexts)]) or [None] * len(contexts),
        logits_rows=rows,
    )


# --- the same logits and the same cache -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6])
def test_a_recorded_step_is_the_ordinary_step(stage: Stage, family: str, rows: int) -> None:
    """Full buckets and padded ones; the cache that both write is compared as a whole, so padding wrote nothing."""
    batch = decodes([33, 16, 1, 17, 60, 2][:rows], FAMILIES[family])
    recorded, ordinary = stage.forward_both(batch)
    assert recorded.dtype == torch.float32
    assert torch.equal(recorded, ordinary)


def test_adapters_matter(stage: Stage) -> None:
    """Without this the others could pass on adapters that do nothing."""
    contexts = [33, 16, 1, 17]
    plain, _ = stage.forward_both(decodes(contexts))
    adapted, _ = stage.forward_both(decodes(contexts, FAMILIES["mixed"]))
    moved = (adapted - plain).abs().amax(dim=1) > 0.1
    assert moved.tolist() == [True, False, True, True]


def test_a_row_does_not_see_the_bucket_it_is_in(stage: Stage) -> None:
    contexts, pages = [33, 16, 40, 17, 60], FAMILIES["mixed"]
    together = stage.forward_both(decodes(contexts, pages))[0]
    whole = decodes(contexts, pages)
    for row in range(5):
        alone = HostBatch(
            *([values[row]] for values in (whole.token_ids, whole.positions, whole.slots)),
            query_start=[0, 1],
            context_len=[contexts[row]],
            blocks=[whole.blocks[row]],
            pages=[pages[row]],
            logits_rows=[0],
        )
        assert torch.equal(stage.forward_both(alone)[0][0], together[row]), f"row {row}"


def test_nothing_is_left_of_the_step_before(stage: Stage) -> None:
    """Fewer rows, shorter contexts and other adapters than the step before, in the same recordings and in others."""
    for contexts, family in (
        ([600, 33, 170, 16, 5], "mixed"),
        ([3, 40, 2], "mixed"),
        ([9, 8, 7, 6], "one adapter"),
        ([5, 600, 1], "base"),
        ([30], "mixed"),
    ):
        recorded, ordinary = stage.forward_both(decodes(contexts, FAMILIES[family], seed=len(contexts)))
        assert torch.equal(recorded, ordinary)


def test_contexts_grow(stage: Stage) -> None:
    """Over block borders, and from one span of attention's keys (512) into the next."""
    for grown in range(4):
        contexts = [31 + grown, 510 + grown, 1 + grown]
        recorded, ordinary = stage.forward_both(decodes(contexts, FAMILIES["mixed"]))
        assert torch.equal(recorded, ordinary)


def test_short_contexts_take_the_recordings_with_a_short_reach(
    base: Base, decoder: Decoder, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits from either, at the border too: one that reached no further would leave keys out."""
    monkeypatch.setattr(graph_limits, "SHORTEST_REACH", 64)
    limits = replace(LIMITS, max_rows=2)
    assert limits.reaches == (64, 512, 600)
    graphs = DecodeGraphs(decoder, stage.kv, stage.pool, stage.recorder, limits)
    reached: list[int] = []
    monkeypatch.setattr(attention, "cdiv", lambda value, by: reached.append(value) or -(-value // by))
    for contexts, reach in (([64, 1], 64), ([65], 512), ([3, 512], 512), ([513, 64], 600)):
        batch = decodes(contexts, FAMILIES["mixed"])
        expected = decoder.forward(batch.on(CPU), stage.kv, stage.pool).logits_LV
        reached.clear()
        assert torch.equal(graphs.forward(batch).logits_LV, expected)
        assert set(reached) == {reach}


@pytest.mark.parametrize(
    ("max_context", "reaches"),
    [(600, (600,)), (4096, (4096,)), (5000, (4096, 5000)), (131072, (4096, 32768, 131072))],
)
def test_reaches(max_context: int, reaches: tuple[int, ...]) -> None:
    assert replace(LIMITS, max_context=max_context).reaches == reaches


def test_another_adapter_in_the_same_pages(stage: Stage) -> None:
    batch = decodes([20, 30, 40], FAMILIES["one adapter"])
    before, _ = stage.forward_both(batch)
    rng = torch.Generator().manual_seed(9)
    for page in TWO.pages:
        write_page(stage.pool, page, rng)
    after, ordinary = stage.forward_both(batch)
    assert torch.equal(after, ordinary)
    assert (after - before).abs().max() > 0.1


def test_recording_writes_no_block(base: Base, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs every step once, when the cache may hold something already."""
    spec = base.checkpoint.spec
    kv = KVCache.allocate(spec, 3, BLOCK_SIZE, CPU, torch.float32)
    for cache in (*kv.keys, *kv.values):
        cache.fill_(7.0)
    pool = AdapterPool(spec, NUM_PAGES, CPU, torch.float32)
    DecodeGraphs(decoder, kv, pool, TapeRecorder(monkeypatch), replace(LIMITS, max_rows=2))
    assert all((cache == 7).all() for cache in (*kv.keys, *kv.values))


# --- which steps are taken --------------------------------------------------------------------------------------


def not_taken() -> Iterator[tuple[str, HostBatch]]:
    decode = decodes([33, 16, 7], FAMILIES["mixed"])
    two_rows = replace(decode, context_len=[33, 16], blocks=decode.blocks[:2], query_start=[0, 2, 3])
    yield "a chunk beside a decode", replace(two_rows, logits_rows=[1, 2])
    yield "a chunk, all of its logits wanted", two_rows
    yield "a decode whose logits nobody wants", replace(decode, logits_rows=[0, 1])
    yield "too many rows", decodes([5] * 7)
    yield "too long a context", replace(decode, context_len=[33, 16, 601])
    yield "too many blocks", replace(decode, blocks=[*decode.blocks[:2], [0] * 39])
    yield "too many pages", decodes([5], [PageList.of((0, 1, 2, 3))])


@pytest.mark.parametrize("batch", [pytest.param(batch, id=name) for name, batch in not_taken()])
def test_other_steps_are_not_taken(stage: Stage, batch: HostBatch) -> None:
    assert not stage.graphs.takes(batch)


# --- what is recorded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_rows", "buckets"),
    [
        (1, (1,)),
        (6, (1, 2, 4, 6)),
        (64, (1, 2, 4, 8, 16, 32, 64)),
        (300, (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 300)),
    ],
)
def test_row_buckets(max_rows: int, buckets: tuple[int, ...]) -> None:
    assert replace(LIMITS, max_rows=max_rows).buckets == buckets


def test_any_mix_of_resident_adapters_has_room() -> None:
    """Adapters that share no page, of any rank, over the rows in any way: the work list never outgrows its place."""
    order = random.Random(4)
    tightest = 1.0
    for _ in range(2000):
        rows, num_pages, most = order.randint(1, 80), order.randint(1, 40), order.randint(1, 16)
        limits = GraphLimits(rows, 64, BLOCK_SIZE, num_pages, most)
        free, adapters = list(range(num_pages)), []
        while free:
            count = order.randint(1, most)
            adapters.append(PageList.of(free[:count]))
            free = free[count:]
        lists = [order.choice(adapters[: order.randint(1, 8)]) for _ in range(rows)]
        tiles = {pages: -(-lists.count(pages) // 16) for pages in lists}
        needed = sum(len(pages.pages) * count for pages, count in tiles.items())
        assert needed <= limits.pages_of_step(rows)
        tightest = min(tightest, 1 - needed / limits.pages_of_step(rows))
    assert tightest == 0, "more room than any step needs"


def test_the_largest_is_recorded_first_and_all_share_one_pool(
    base: Base, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = base.checkpoint.spec
    sizes: list[tuple[int, bool]] = []
    hidden = Decoder.hidden

    def watched(self, batch, kv, adapters):
        sizes.append((batch.token_ids_T.shape[0], batch.segments is not None))
        return hidden(self, batch, kv, adapters)

    monkeypatch.setattr(Decoder, "hidden", watched)
    recorder = TapeRecorder(monkeypatch)
    with caplog.at_level(logging.INFO, logger="perseid_server.model.decode_graphs"):
        DecodeGraphs(
            decoder,
            KVCache.allocate(spec, 3, BLOCK_SIZE, CPU, torch.float32),
            AdapterPool(spec, NUM_PAGES, CPU, torch.float32),
            recorder,
            replace(LIMITS, max_rows=3),
        )
    assert sizes == [(3, True), (3, False), (2, True), (2, False), (1, True), (1, False)]
    assert len(recorder.pools) == 6
    assert len(set(map(id, recorder.pools))) == 1
    assert recorder.pools[0] is not None
    assert caplog.messages[0].startswith("recorded 6 decode steps of up to 3 rows in ")
