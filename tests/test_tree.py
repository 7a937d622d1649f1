"""Trees: what strings mean, derived arrays, EAGLE-2's selection."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eagle.tree import (
    AUTO_TREES,
    STATIC_TREES,
    DynamicTree,
    StaticTree,
    ancestor_mask,
    chain_tree,
    parse_tree,
    tree_arrays,
)


def nodes_by_depth(shape: StaticTree) -> list[int]:
    """Nodes at depth 1, 2, ..."""
    return np.bincount(tree_arrays(shape)["depth"])[1:].tolist()


def brute_force_mask(parent) -> np.ndarray:
    """Ancestor or self, by walking up from each node."""
    mask = np.zeros((len(parent), len(parent)), bool)
    for node in range(len(parent)):
        at = node
        mask[node, at] = True
        while at != parent[at]:
            at = parent[at]
            mask[node, at] = True
    return mask


# ---- strings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, counts",
    [
        ("chain:3", [1, 1, 1]),
        ("chain:1", [1]),
        ("chain:0", []),
        ("static:4", [2, 1]),
        ("static:8", [4, 3]),
        ("static:16", [7, 7, 1]),
        ("static:eagle-26", [4, 8, 8, 3, 2]),  # the published trees, root left out
        ("static:medusa-64", [10, 28, 23, 2]),
        ("paths:[[0],[0,0],[1]]", [2, 1]),
        ("paths:[[1], [0, 0], [0]]", [2, 1]),
    ],
)
def test_strings_of_static_trees(text, counts):
    shape = parse_tree(text)
    assert isinstance(shape, StaticTree)
    assert nodes_by_depth(shape) == counts
    assert shape.num_nodes == 1 + sum(counts)
    assert shape.max_depth == len(counts)
    assert shape.max_children == int(tree_arrays(shape)["rank"].max() + 1 if counts else 0)
    assert shape.keeps_all


def test_names_of_static_trees_count_their_nodes():
    for name in STATIC_TREES:
        assert parse_tree(f"static:{name}").num_nodes == int(name.rsplit("-")[-1])


def test_paths_are_child_ranks():
    shape = parse_tree("paths:[[0],[0,0],[1],[1,0],[1,1]]")
    arrays = tree_arrays(shape)
    assert arrays["parent"].tolist() == [0, 0, 0, 1, 2, 2]
    assert arrays["depth"].tolist() == [0, 1, 1, 2, 2, 2]
    assert arrays["rank"].tolist() == [0, 0, 1, 0, 0, 1]


def test_strings_of_dynamic_trees():
    shape = parse_tree("dynamic:depth=4,width=3,nodes=16")
    assert shape == DynamicTree(depth=4, width=3, nodes=16)
    assert (shape.pool_size, shape.num_nodes, shape.max_depth) == (1 + 3 + 3 * 9, 16, 4)
    assert shape.max_children == 3 and not shape.keeps_all
    assert DynamicTree(depth=4, width=3, nodes=31).keeps_all


def test_dynamic_trees_have_no_more_nodes_and_depth_than_they_can():
    assert DynamicTree(depth=2, width=2, nodes=100).num_nodes == 7
    assert DynamicTree(depth=8, width=2, nodes=3).max_depth == 2


@pytest.mark.parametrize(
    "text",
    [
        "", "tree", "chain", "chain:", "chain:-1", "chain:three", "chain:1.5", "static:",
        "static:9", "static:eagle", "paths:", "paths:[[0]", "paths:7", "paths:[0]", "paths:[[]]",
        "paths:[['a']]", "paths:[[0],[0]]", "paths:[[1]]", "paths:[[0,0]]", "paths:[[0],[0,1]]",
        "paths:[[-1]]", "dynamic", "dynamic:depth=2,width=2", "dynamic:width=2,depth=2,nodes=4",
        "dynamic:depth=0,width=2,nodes=4", "dynamic:depth=2,width=0,nodes=4",
        "dynamic:depth=2,width=2,nodes=1", "dynamic:depth=2,width=2,nodes=x", "AUTO", " chain:3",
    ],
)  # fmt: skip
def test_strings_that_name_no_tree(text):
    with pytest.raises(ValueError, match="tree"):
        parse_tree(text)


@pytest.mark.parametrize("platform", AUTO_TREES)
def test_auto_takes_the_tree_of_its_batch_size(platform):
    table = AUTO_TREES[platform]
    limits = [limit for limit, _ in table]
    assert limits[-1] is None and limits[:-1] == sorted(limits[:-1])
    smallest = 1
    for limit, tree in table:
        for batch in {smallest, limit or 10**6}:
            assert parse_tree("auto", batch=batch, platform=platform) == parse_tree(tree)
        smallest = (limit or 0) + 1


def test_auto_takes_a_chain_of_three_for_large_batches_on_a_gpu():
    assert parse_tree("auto", batch=256, platform="gpu") == parse_tree("chain:3")
    assert parse_tree("auto", batch=256, platform="cuda") == parse_tree("chain:3")


# ---- derived arrays ----------------------------------------------------------------------------


def random_parents(data) -> list[int]:
    """A parent array whose root is node 0 and whose parents come before their children."""
    nodes = data.draw(st.integers(1, 12))
    return [0] + [data.draw(st.integers(0, node - 1)) for node in range(1, nodes)]


@pytest.mark.parametrize("name", STATIC_TREES)
def test_parents_come_before_children(name):
    arrays = tree_arrays(parse_tree(f"static:{name}"))
    parent, depth = arrays["parent"], arrays["depth"]
    node = np.arange(1, len(parent))
    assert (parent[node] < node).all() and parent[0] == 0
    assert (depth[node] == depth[parent[node]] + 1).all()
    siblings = {(p, r) for p, r in zip(parent[1:], arrays["rank"][1:], strict=True)}
    assert len(siblings) == len(parent) - 1


@given(data=st.data())
def test_ancestor_mask_equals_a_walk(data):
    parents = np.zeros((2, 12), np.int32)
    for row in parents:
        own = random_parents(data)
        row[: len(own)] = own
    # Twelve nodes can be eleven deep.
    mask = np.asarray(ancestor_mask(jnp.asarray(parents), 11))
    for row, expected in zip(mask, map(brute_force_mask, parents), strict=True):
        np.testing.assert_array_equal(row, expected)


def test_ancestor_mask_of_the_deepest_node_needs_the_whole_depth():
    parent = jnp.arange(-1, 4, dtype=jnp.int32).clip(0)[None]
    np.testing.assert_array_equal(ancestor_mask(parent, 4)[0], np.tri(5, dtype=bool))


def test_chain_tree_is_a_chain():
    tree = chain_tree(2, 4)
    assert tree.mask is None
    np.testing.assert_array_equal(tree.parent, [[0, 0, 1, 2]] * 2)
    np.testing.assert_array_equal(tree.depth, [[0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(tree.rank, np.zeros((2, 4)))


# ---- dynamic trees -----------------------------------------------------------------------------


def grow(shape: DynamicTree, log_probs):
    """The pool that expansion makes, by plain Python: (parents, scores), root first.

    `log_probs(n)` gives n log-probabilities of children.
    """
    parents, scores, frontier = [0], [np.inf], [0]
    for level in shape.levels:
        begin = len(parents)
        for row in level.frontier_row:
            parents.append(frontier[row])
        base = [0.0 if frontier[row] == 0 else scores[frontier[row]] for row in level.frontier_row]
        scores += [np.float32(b + x) for b, x in zip(base, log_probs(len(base)), strict=True)]
        best = shape.next_frontier(0, jnp.asarray([scores[begin:]], jnp.float32))[0]
        frontier = [begin + int(i) for i in best]
    return parents, scores


@given(data=st.data())
def test_selection_is_a_tree_of_the_best_nodes(data):
    shape = data.draw(st.sampled_from([DynamicTree(3, 2, 6), DynamicTree(3, 3, 9)]))
    # Few distinct values: ties between siblings and between parent and child (log-probability 0).
    value = st.sampled_from([0.0, -0.5, -1.0, -np.inf]) | st.floats(-8, 0, width=32)
    parents, scores = grow(
        shape, lambda n: data.draw(st.lists(value, min_size=n, max_size=n))
    )  # fmt: skip
    assert len(parents) == shape.pool_size
    selected = np.asarray(shape.select(jnp.asarray([scores], jnp.float32)))[0]
    assert len(selected) == shape.num_nodes == len(set(selected))
    assert selected[0] == 0 and (np.diff(selected) > 0).all()
    assert {parents[node] for node in selected} <= set(selected.tolist())
    left_out = np.delete(scores, selected)
    assert min(np.array(scores)[selected]) >= max(left_out)


def test_frontier_is_the_best_of_its_level():
    scores = jnp.array([[-3.0, -1.0, -2.0, -1.0], [-1.0, -1.0, -1.0, -5.0]])
    frontier = DynamicTree(2, 2, 4).next_frontier(1, scores)
    np.testing.assert_array_equal(frontier, [[1, 3], [0, 1]])


def test_static_trees_keep_the_whole_pool():
    shape = parse_tree("static:8")
    np.testing.assert_array_equal(shape.select(jnp.zeros((2, 8))), [range(8)] * 2)
