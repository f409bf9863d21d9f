"""Trees of drafted tokens: what they refuse, depths, masks, children."""

import pytest

from perseid_server.speculation.tree import ROOT, DraftTree, ancestor_masks

TREE = DraftTree((7, 8, 9, 7, 5), (ROOT, ROOT, 0, 0, 3), (0.5, 0.3, 0.2, 0.1, 0.05))


def test_depths_and_masks() -> None:
    """Rows: the root, then the nodes. A row has one bit for each token from the root to itself."""
    assert TREE.depths == (1, 1, 2, 2, 3)
    masks = ancestor_masks(TREE.parents)
    assert masks == [0b1, 0b11, 0b101, 0b1011, 0b10011, 0b110011]
    assert [mask.bit_count() - 1 for mask in masks] == [0, *TREE.depths]


def test_children() -> None:
    assert TREE.children(ROOT) == [7, 8]
    assert TREE.children(0) == [9, 7]
    assert TREE.children(4) == []
    assert TREE.child(ROOT, 7) == 0
    assert TREE.child(0, 7) == 3, "the same token at another place is another node"
    assert TREE.child(1, 9) is None


def test_a_beginning_of_a_tree_is_a_tree() -> None:
    for count in range(6):
        assert len(TREE.first(count)) == count
    assert TREE.first(3) == DraftTree((7, 8, 9), (ROOT, ROOT, 0), (0.5, 0.3, 0.2))


@pytest.mark.parametrize(
    ("tokens", "parents", "values"),
    [
        ((1, 2), (ROOT,), (0.5, 0.5)),
        ((1, 2), (ROOT, 1), (0.5, 0.5)),
        ((1, 2), (ROOT, -2), (0.5, 0.5)),
        ((1, 1), (ROOT, ROOT), (0.5, 0.5)),
        (tuple(range(64)), (ROOT,) * 64, (0.5,) * 64),
    ],
    ids=["lengths", "its own parent", "no parent", "equal siblings", "65 rows"],
)
def test_what_is_no_tree(tokens: tuple[int, ...], parents: tuple[int, ...], values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"tree has at most 63|parent comes before|siblings have different"):
        DraftTree(tokens, parents, values)
