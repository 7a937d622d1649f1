"""Which compiled program decodes a batch: the tree dispatcher (arXiv 2508.08192, inference).

Verifying more nodes costs little while reading the weights bounds a step, so few sequences take a
big tree, many a small one, and very many none. A ladder lists the trees by batch size. The server
climbs to a rung of larger batches at once, and comes back down only after it has been small enough
for a while: sequences that come and go do not make it switch at every round.

A program is compiled for a number of rows and a tree. No program is compiled in traffic, so what
the ladder may ask for is listed beforehand.
"""

import dataclasses
from collections.abc import Sequence

PLAIN = "plain"
"""The tree of plain decoding, as `jax_eagle.tree` names it."""

Ladder = tuple[tuple[int | None, str], ...]
"""(largest batch, tree), by batch size; None in the last rung: no limit."""

_PATIENCE = 16
"""Rounds that a smaller rung must have been enough before it is taken."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """The decode programs of an engine: pairs of rows and tree."""

    ladder: Ladder
    """Its last rung has no limit."""
    buckets: tuple[int, ...]
    """Numbers of rows that are compiled, ascending; the last one is the number of slots."""

    @property
    def pairs(self) -> list[tuple[int, str]]:
        """Each rung at the buckets of its batch sizes; plain decoding at the least and the most."""
        pairs, least, most = [], 1, self.buckets[-1]
        for limit, tree in self.ladder:
            if least > most:
                break
            low, high = self._bucket(least), self._bucket(most if limit is None else limit)
            pairs += [(b, tree) for b in self.buckets if low <= b <= high]
            least = most + 1 if limit is None else limit + 1
        ends = [self.buckets[0], self.buckets[-1]]
        return list(dict.fromkeys([*pairs, *((b, PLAIN) for b in ends)]))

    @property
    def trees(self) -> tuple[str, ...]:
        """All trees that are compiled, plain decoding last."""
        trees = dict.fromkeys(tree for _, tree in self.pairs if tree != PLAIN)
        return (*trees, PLAIN)

    def split(self, tree: str, count: int) -> list[int]:
        """Row counts of the calls that decode `count` sequences with a tree.

        One call where a program is large enough; otherwise the largest ones, and one for the rest.
        """
        sizes = sorted(b for b, name in self.pairs if name == tree)
        calls = []
        while count > sizes[-1]:
            calls.append(sizes[-1])
            count -= sizes[-1]
        return [*calls, next(b for b in sizes if b >= count)]

    def _bucket(self, count: int) -> int:
        return next((b for b in self.buckets if b >= count), self.buckets[-1])


class Dispatcher:
    """Picks the rung of the ladder for the sequences that decode now, with hysteresis."""

    def __init__(self, ladder: Sequence[tuple[int | None, str]]):
        """`ladder` ends with a rung without limit."""
        self._ladder = ladder
        self._rung = 0
        self._calm = 0

    def choose(self, count: int) -> str:
        """The tree for a round of `count` sequences."""
        wanted = next(
            i for i, (limit, _) in enumerate(self._ladder) if limit is None or count <= limit
        )
        self._calm = self._calm + 1 if wanted < self._rung else 0
        if wanted > self._rung or self._calm >= _PATIENCE:
            self._rung, self._calm = wanted, 0
        return self._ladder[self._rung][1]
