"""Draft trees: their shapes (static or grown per sequence) and the arrays derived from them.

A tree is a parent array; depth, rank, mask follow from it. Node 0 is the root: the last committed
token, whose keys and values are not cached yet. Parents come before children.

A *shape* says how a tree grows. Growth is the same loop for all shapes (`Draft.expand`): at each
depth the frontier proposes children, a fixed list of (frontier row, rank) pairs joins the pool, and
some of those become the next frontier. At the end the tree is a selection from the pool. Static
trees fix frontier and selection beforehand; EAGLE-2's dynamic trees (arXiv 2406.16858) take the
best by cumulative log-probability.
"""

import ast
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int


class Tree(struct.PyTreeNode):
    """The nodes of one call, for each sequence of the batch."""

    parent: Int[Array, "B M"]
    """Parent node; the root points to itself."""
    depth: Int[Array, "B M"]
    rank: Int[Array, "B M"]
    """Order of the node among its siblings: 0 is what the draft likes best (or drew first)."""
    mask: Bool[Array, "B M M"] | None
    """Ancestor or self; None: causal (a chain)."""


def chain_tree(B: int, M: int) -> Tree:
    """A chain of M nodes: a prefill chunk, the draft's sync rows, or (M = 1) the root alone."""
    node_BM = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32)[None], (B, M))
    return Tree(
        parent=jnp.maximum(node_BM - 1, 0), depth=node_BM, rank=jnp.zeros_like(node_BM), mask=None
    )


def ancestor_mask(parent_BM: Int[Array, "B M"], max_depth: int) -> Bool[Array, "B M M"]:
    """True where the column is an ancestor of the row or the row itself."""
    M = parent_BM.shape[1]
    own_BMM = jnp.broadcast_to(jnp.eye(M, dtype=bool)[None], (parent_BM.shape[0], M, M))
    mask_BMM = own_BMM
    for _ in range(max_depth):
        mask_BMM = own_BMM | jnp.take_along_axis(mask_BMM, parent_BM[:, :, None], axis=1)
    return mask_BMM


@dataclasses.dataclass(frozen=True)
class Level:
    """Children that join the pool at one depth: row of the frontier and rank, for each child."""

    frontier_row: tuple[int, ...]
    rank: tuple[int, ...]

    @property
    def width(self) -> int:
        """Children that each row of the frontier has to propose."""
        return max(self.rank) + 1


@dataclasses.dataclass(frozen=True)
class StaticTree:
    """A fixed tree. `paths` holds each node's child ranks from the root, root excluded."""

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        known = set(self.paths) | {()}
        if not all(isinstance(rank, int) and rank >= 0 for path in self.paths for rank in path):
            raise ValueError("child ranks are integers from 0")
        if len(known) != len(self.paths) + 1 or () in self.paths:
            raise ValueError("a path is empty or given twice")
        for path in self.paths:
            if path[:-1] not in known or (path[-1] > 0 and (*path[:-1], path[-1] - 1) not in known):
                raise ValueError(
                    f"path {list(path)} needs its parent and its elder siblings in the tree"
                )
        object.__setattr__(self, "paths", tuple(sorted(self.paths, key=lambda p: (len(p), p))))

    @property
    def num_nodes(self) -> int:
        """M, root included."""
        return len(self.paths) + 1

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node; a path has max_depth + 1 nodes."""
        return max(map(len, self.paths), default=0)

    @property
    def pool_size(self) -> int:
        """Nodes proposed in all, root included."""
        return self.num_nodes

    @property
    def keeps_all(self) -> bool:
        """Whether every node of the pool is in the tree."""
        return True

    @functools.cached_property
    def _frontiers(self) -> list[list[tuple[int, ...]]]:
        """The nodes that have children, by depth."""
        parents = {path[:-1] for path in self.paths}
        by_depth = [[()]] + [
            [p for p in self.paths if len(p) == d and p in parents]
            for d in range(1, self.max_depth)
        ]
        return by_depth[: self.max_depth]

    @functools.cached_property
    def levels(self) -> tuple[Level, ...]:
        """Children per depth, in node order."""
        return tuple(
            Level(
                frontier_row=tuple(frontier.index(p[:-1]) for p in self._at(d + 1)),
                rank=tuple(p[-1] for p in self._at(d + 1)),
            )
            for d, frontier in enumerate(self._frontiers)
        )

    @property
    def max_children(self) -> int:
        """The most children that any node has."""
        return max((level.width for level in self.levels), default=0)

    def _at(self, depth: int) -> list[tuple[int, ...]]:
        return [p for p in self.paths if len(p) == depth]

    def next_frontier(self, level: int, scores_BX: Float[Array, "B X"]) -> Int[Array, "B W"]:
        """Which children of `level` propose in their turn."""
        members = self._at(level + 1)
        rows = [members.index(p) for p in self._frontiers[level + 1]]
        return jnp.broadcast_to(jnp.asarray(rows, jnp.int32)[None], (scores_BX.shape[0], len(rows)))

    def select(self, scores_BX: Float[Array, "B X"]) -> Int[Array, "B M"]:
        """The pool indices of the tree's nodes, root first: all of them."""
        B, X = scores_BX.shape
        return jnp.broadcast_to(jnp.arange(X, dtype=jnp.int32)[None], (B, X))


@dataclasses.dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2: expand the `width` best nodes of each depth, then keep the best `nodes` of all."""

    depth: int
    width: int
    nodes: int

    def __post_init__(self):
        if min(self.depth, self.width) < 1 or self.nodes < 2:
            raise ValueError(
                f"depth {self.depth} and width {self.width} must be at least 1 and "
                f"nodes {self.nodes} at least 2 (the root counts)"
            )

    @property
    def pool_size(self) -> int:
        """Nodes proposed in all, root included."""
        return 1 + self.width + (self.depth - 1) * self.width**2

    @property
    def num_nodes(self) -> int:
        """M, root included."""
        return min(self.nodes, self.pool_size)

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node; a path has max_depth + 1 nodes."""
        return min(self.depth, self.nodes - 1)

    @property
    def keeps_all(self) -> bool:
        """Whether every node of the pool is in the tree (then sampled drafting is lossless)."""
        return self.nodes >= self.pool_size

    @functools.cached_property
    def levels(self) -> tuple[Level, ...]:
        """The root proposes `width` children; later each of `width` rows proposes as many."""
        W = self.width
        first = Level((0,) * W, tuple(range(W)))
        rows = tuple(row for row in range(W) for _ in range(W))
        return (first,) + (Level(rows, tuple(range(W)) * W),) * (self.max_depth - 1)

    @property
    def max_children(self) -> int:
        """The most children that any node can have."""
        return self.width

    def next_frontier(self, level: int, scores_BX: Float[Array, "B X"]) -> Int[Array, "B W"]:
        """The `width` best children of `level` by cumulative log-probability."""
        del level
        return jax.lax.top_k(scores_BX, self.width)[1].astype(jnp.int32)

    def select(self, scores_BX: Float[Array, "B X"]) -> Int[Array, "B M"]:
        """The best M of the pool in pool order. A child never beats its parent: its score is lower
        or equal and its index higher, so the selection is a tree and parents come first.
        """
        # top_k puts NaN first: a broken draft must not displace the root.
        scores_BX = jnp.where(jnp.isnan(scores_BX), -jnp.inf, scores_BX)
        best_BM = jax.lax.top_k(scores_BX, self.num_nodes)[1].astype(jnp.int32)
        return jnp.sort(best_BM, axis=1)


TreeShape = StaticTree | DynamicTree

_EAGLE_26 = """
0  1  2  3  0,0  0,1  0,2  1,0  1,1  2,0  2,1  3,0  0,0,0  0,0,1  0,0,2  0,1,0  0,1,1  0,2,0
0,2,1  1,0,0  0,0,0,0  0,0,0,1  0,0,0,2  0,0,0,0,0  0,0,0,0,1
"""
_MEDUSA_64 = """
0  0,0  1  0,1  2  0,0,0  1,0  0,2  3  0,3  4  0,4  2,0  0,5  0,0,1  5  0,6  6  0,7  0,1,0  1,1  7
0,8  0,0,2  3,0  0,9  8  9  1,0,0  0,2,0  1,2  0,0,3  4,0  2,1  0,0,4  0,0,5  0,0,0,0  0,1,1
0,0,6  0,3,0  5,0  1,3  0,0,7  0,0,8  0,0,9  6,0  0,4,0  1,4  7,0  0,1,2  2,0,0  3,1  2,2  8,0
0,5,0  1,5  1,0,1  0,2,1  9,0  0,6,0  0,0,0,1  1,6  0,7,0
"""

STATIC_TREES = {
    "3": "0  1",
    "4": "0  1  0,0",
    "8": "0  1  2  3  0,0  0,1  1,0",
    "16": "0  1  2  3  4  5  6  0,0  0,1  0,2  1,0  1,1  2,0  3,0  0,0,0",
    "eagle-26": _EAGLE_26,  # EAGLE-1's tree of 25 drafted nodes, `mc_sim_7b_63` in its repository
    "medusa-64": _MEDUSA_64,  # Medusa's 63 drafted nodes, of the same name there
}
"""Named static trees; the name is the number of nodes with the root. 4, 8 and 16 were fitted to
a one-layer draft of SmolLM2, the last two are the published ones."""


def _paths(text: str) -> StaticTree:
    return StaticTree(tuple(tuple(map(int, node.split(","))) for node in text.split()))


_MAX_DEPTH, _MAX_NODES = 64, 4096
"""Deeper or larger trees are refused: nobody gains from them, and they take minutes to compile."""


def _check_size(depth: int, nodes: int) -> None:
    if depth > _MAX_DEPTH or nodes > _MAX_NODES:
        raise ValueError(
            f"depth {depth} with {nodes} nodes is too large, expected a depth of {_MAX_DEPTH} and "
            f"{_MAX_NODES} nodes at most"
        )


PLAIN = "plain"
"""Plain decoding: the tree of the root alone."""

AUTO_TREES: dict[str, tuple[tuple[int | None, str], ...]] = {
    "cpu": ((1, "chain:2"), (None, PLAIN)),
    "gpu": ((4, "static:eagle-26"), (16, "static:8"), (256, "chain:3"), (None, PLAIN)),
}
"""The tree dispatcher (arXiv 2508.08192, inference): (largest batch, tree), by platform. Verifying
more nodes is free while weights bound the step, so small batches take bigger trees. A CPU becomes
compute-bound at a few rows: for one sequence small trees are level on chats and chains are ahead on
code, eight sequences are fastest without (benchmarks/results/speed_avx512_cpu.json and
speed_avx512_humaneval_cpu.json, engine_cpu.json). The GPU's table is a guess, unmeasured."""


def parse_tree(text: str, *, batch: int = 1, platform: str = "cpu") -> TreeShape:
    """The tree shape that a string names.

    Args:
      text: "auto", "plain", "chain:K", "static:NAME", "paths:[[0],[0,0],[1]]" (child ranks) or
        "dynamic:depth=D,width=W,nodes=M".
      batch: sequences decoded together; "auto" chooses by it.
      platform: "cpu" or "gpu", for "auto".

    Raises:
      ValueError: a string of none of these forms, or a tree that cannot be.
    """
    if text == "auto":
        table = AUTO_TREES.get(platform, AUTO_TREES["gpu"])
        text = next(tree for limit, tree in table if limit is None or batch <= limit)
    if text == PLAIN:
        return StaticTree(())
    kind, _, rest = text.partition(":")
    try:
        if kind == "chain" and rest.isdigit():
            _check_size(int(rest), int(rest) + 1)
            return StaticTree(tuple((0,) * d for d in range(1, int(rest) + 1)))
        if kind == "static" and rest in STATIC_TREES:
            return _paths(STATIC_TREES[rest])
        if kind == "paths":
            paths = tuple(map(tuple, ast.literal_eval(rest)))
            _check_size(max(map(len, paths), default=0), len(paths) + 1)
            return StaticTree(paths)
        if kind == "dynamic" and (m := re.fullmatch(r"depth=(\d+),width=(\d+),nodes=(\d+)", rest)):
            tree = DynamicTree(*map(int, m.groups()))
            _check_size(tree.depth, tree.pool_size)
            return tree
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"tree {text!r}: {error}") from None
    raise ValueError(
        f"unknown tree {text!r}: expected auto, plain, chain:K, static:NAME with NAME one of "
        f"{', '.join(STATIC_TREES)}, paths:[[0],[0,0],[1]] or dynamic:depth=D,width=W,nodes=M"
    )


def tree_arrays(shape: StaticTree) -> dict[str, np.ndarray]:
    """Parent, depth and rank [M] of a static tree, for display and tests."""
    index = {(): 0} | {path: i + 1 for i, path in enumerate(shape.paths)}
    paths = [(), *shape.paths]
    return {
        "parent": np.array([index[p[:-1]] if p else 0 for p in paths], np.int32),
        "depth": np.array([len(p) for p in paths], np.int32),
        "rank": np.array([p[-1] if p else 0 for p in paths], np.int32),
    }
