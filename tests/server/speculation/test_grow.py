"""Trees of drafts: the best nodes in order, and what they yield; held against the published figures."""

import itertools
import math

import pytest

from perseid_server.speculation.grow import expected_tokens, grow
from perseid_server.speculation.heads_config import PUBLISHED_TOP1

TABLE = ((0.6, 0.2, 0.1), (0.5, 0.25, 0.05), (0.4, 0.1, 0.1))


def value(accuracy, path):
    return math.prod(accuracy[head][rank] for head, rank in enumerate(path))


def all_nodes(accuracy):
    depths = range(1, len(accuracy) + 1)
    return [path for depth in depths for path in itertools.product(*(range(len(row)) for row in accuracy[:depth]))]


@pytest.mark.parametrize("num_nodes", [0, 1, 3, 7, 12, 39])
def test_the_nodes_are_the_likeliest_ones_in_order(num_nodes):
    best = sorted(all_nodes(TABLE), key=lambda path: (-value(TABLE, path), len(path), path))
    assert list(grow(TABLE, num_nodes)) == best[:num_nodes]


def test_parents_come_before_children_and_every_first_part_is_the_tree_of_its_size():
    nodes = grow(TABLE, 20)
    for place, path in enumerate(nodes):
        assert path[:-1] in ((), *nodes[:place])
        assert grow(TABLE, place) == nodes[:place]


def test_there_are_no_more_nodes_than_the_table_has_candidates():
    assert len(grow(TABLE, 100)) == 3 + 9 + 27
    assert grow((), 5) == ()


def test_ties_go_to_the_shorter_and_then_to_the_first_path():
    assert grow(((0.5, 0.5), (1.0, 1.0)), 6) == ((0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1))
    assert grow(((0.0, 0.0), (0.3, 0.2)), 4) == ((0,), (1,), (0, 0), (0, 1))


@pytest.mark.parametrize(("num_nodes", "tokens"), [(1, 1.56), (2, 1.739), (3, 1.775), (5, 1.781)])
def test_a_chain_of_first_candidates_yields_what_their_published_accuracy_says(num_nodes, tokens):
    chain = [(share,) for share in PUBLISHED_TOP1]
    nodes = grow(chain, num_nodes)
    assert nodes == tuple((0,) * depth for depth in range(1, num_nodes + 1))
    assert expected_tokens(chain, nodes) == pytest.approx(tokens, abs=5e-4)


def test_a_second_candidate_lifts_three_nodes_to_the_published_figure():
    table = ((0.56, 0.11), (0.32, 0.09))  # ranks as in a 7B model; 1.85 is published for three nodes
    nodes = grow(table, 3)
    assert nodes == ((0,), (0, 0), (1,))
    assert expected_tokens(table, nodes) == pytest.approx(1.85, abs=0.005)


def test_no_node_yields_the_plain_token():
    assert expected_tokens(TABLE, ()) == 1.0
