"""Trees of drafted tokens through the decoder: each row is a plain decode along its path, and so is what follows.

On the native backend that holds for every bit, of the whole pass and op by op. The eager backend's products differ with
the number of rows of a step, within rounding; its attention of trees has the bits of decodes (tests/kernels).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from perseid_kernels.fused import Outputs
from perseid_kernels.segments import PageList
from perseid_server.adapters.pool import AdapterPool
from perseid_server.model.checkpoint import Checkpoint
from perseid_server.model.decoder import Decoder
from perseid_server.speculation.tree import ancestor_masks
from tests.server.model.passes import TOLERANCE, Part, Passes, Route, Tree, backend_named, decoder_of
from tests.server.model.test_decoder_adapters import (
    ADAPTERS,
    Adapted,
    adapted,  # noqa: F401  (a fixture)
    loaded,
    random_gates,
)
from tests.server.model.tiny import random_prompt

# Prefixes around the ends of blocks and of attention's tiles, and trees of ragged sizes
PREFIXES = (63, 5, 48, 31, 64)
ROWS = (9, 1, 20, 5, 7)
ORDER = ("rank-17", "base", "rank-8", None, None)  # None: routed by gates
FOLLOWING = 6


def trees() -> list[Tree]:
    """A random tree behind each prefix; rows of one tree have different tokens."""
    rng = torch.Generator().manual_seed(5)
    built = []
    for sequence, (start, rows) in enumerate(zip(PREFIXES, ROWS, strict=True)):
        parents = [int(torch.randint(-1, node, (1,), generator=rng)) for node in range(rows - 1)]
        tokens = torch.randperm(320, generator=rng)[:rows].tolist()
        built.append(Tree(sequence, start, tuple(tokens), tuple(ancestor_masks(parents))))
    return built


TREES = trees()
DEEPEST = [tree.path(max(range(len(tree.masks)), key=lambda row: tree.masks[row].bit_count())) for tree in TREES]


def prompt(tree: Tree, path: Sequence[int]) -> list[int]:
    """The prefix, the path's tokens, and room for all of the tree, filled with what comes after the path."""
    tokens = [tree.token_ids[row] for row in path]
    return [*random_prompt(tree.sequence, tree.start), *tokens, *random_prompt(90, max(ROWS) + FOLLOWING)]


@dataclass(frozen=True)
class Stage:
    """A decoder, and what adapts each sequence: an adapter that it names, or two gate sets that choose."""

    decoder: Decoder
    checkpoint: Checkpoint
    pool: AdapterPool
    pages: list[PageList | None]
    routes: list[Route | None]

    def passes(self, paths: Sequence[Sequence[int]]) -> Passes:
        """All sequences, each as it goes on along a path of its tree."""
        prompts = [prompt(tree, path) for tree, path in zip(TREES, paths, strict=True)]
        return Passes(self.decoder, self.checkpoint, prompts, self.pool, self.pages, self.routes)

    def assert_same(self, actual: Outputs, expected: Outputs) -> None:
        tolerance = 0.0 if self.decoder.backend.name == "native" else TOLERANCE
        torch.testing.assert_close(actual.hidden_LE, expected.hidden_LE, rtol=0, atol=tolerance)
        torch.testing.assert_close(actual.logits_LV, expected.logits_LV, rtol=0, atol=tolerance)


@pytest.fixture(scope="module", params=["eager", "native"])
def stage(request: pytest.FixtureRequest, adapted: Adapted) -> Stage:  # noqa: F811
    checkpoint = adapted.base.checkpoint
    pool, lists = loaded(adapted.folders, checkpoint.spec)
    columns = tuple(pages.pages for name in ADAPTERS if (pages := lists[name]) is not None)
    by_five = Route(random_gates(pool, 5, 5), (*columns, ()), 2, 1.0, (1, 1, 1, 1, 1))
    by_three = Route(random_gates(pool, 3, 3), (*columns[:2], ()), 3, 20.0, (1, 0, 1))
    return Stage(
        decoder_of(checkpoint, backend_named(request.param), 128),
        checkpoint,
        pool,
        [lists[name] if name is not None else None for name in ORDER],
        [None, None, None, by_five, by_three],
    )


def prefill(run: Passes) -> None:
    run.run(*[Part(s, 0, start) for s, start in enumerate(PREFIXES)])


def last(outputs: Outputs, row: int) -> Outputs:
    return Outputs(outputs.hidden_LE[row], outputs.logits_LV[row])


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "op by op"])
def test_a_row_of_a_tree_is_a_decode_along_its_path(stage: Stage, whole: bool) -> None:
    """Base, adapted and routed rows side by side, all trees in one pass; then each row's path, a token at a time."""
    run = stage.passes(DEEPEST)
    prefill(run)
    of_trees = run.outputs(*TREES) if whole else run.outputs_op_by_op(*TREES)
    for s, tree in enumerate(TREES):
        for row in range(len(tree.masks)):
            path = tree.path(row)
            plain = stage.passes([path if s == other else [0] for other in range(len(TREES))])
            plain.run(Part(s, 0, tree.start))
            for place in range(tree.start, tree.start + len(path)):
                (alone,) = plain.outputs(Part(s, place, place + 1))
            stage.assert_same(last(of_trees[s], row), last(alone, 0))


def test_what_follows_an_accepted_path_is_as_without_a_tree(stage: Stage) -> None:
    """Decodes go on from the moved K and V; a sequence whose tree was only its root had nothing to move."""
    assert any(path != list(range(len(path))) for path in DEEPEST), "nothing moves"
    run, plain = stage.passes(DEEPEST), stage.passes(DEEPEST)
    for each in (run, plain):
        prefill(each)
    run.outputs(*TREES)
    run.accept(*zip(TREES, DEEPEST, strict=True))
    ends = [tree.start + len(path) for tree, path in zip(TREES, DEEPEST, strict=True)]
    for s, tree in enumerate(TREES):
        for place in range(tree.start, ends[s]):
            plain.run(Part(s, place, place + 1))
    for step in range(FOLLOWING):
        parts = [Part(s, end + step, end + step + 1) for s, end in enumerate(ends)]
        for actual, expected in zip(run.outputs(*parts), plain.outputs(*parts), strict=True):
            stage.assert_same(actual, expected)


def test_trees_beside_chunks_and_decodes_change_nothing(stage: Stage) -> None:
    """Two trees, a chunk, and a decode in one pass, and each in a pass of its own."""
    parts = [TREES[0], Part(1, 3, 5), TREES[2], Part(3, 30, 31), TREES[4]]
    together, apart = stage.passes(DEEPEST), stage.passes(DEEPEST)
    for each in (together, apart):
        each.run(*[Part(part.sequence, 0, part.start) for part in parts])
    for one, part in zip(together.outputs(*parts), parts, strict=True):
        (alone,) = apart.outputs(part)
        stage.assert_same(one, alone)


def test_the_paths_of_a_tree_differ(stage: Stage) -> None:
    """Without this the others could pass on rows that see the prefix alone."""
    run, chunk = stage.passes(DEEPEST), stage.passes(DEEPEST)
    for each in (run, chunk):
        each.run(Part(2, 0, PREFIXES[2]))
    (of_tree,) = run.outputs(TREES[2])
    (as_chunk,) = chunk.outputs(Tree(2, PREFIXES[2], TREES[2].token_ids, tuple((2 << row) - 1 for row in range(20))))
    assert (of_tree.logits_LV - as_chunk.logits_LV).abs().max() > 0.1
