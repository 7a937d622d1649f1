"""Tile sizes of the kernels: a table of measured ones, and a rule for everything else.

`python -m benchmarks.tune` measures the candidates on a GPU and writes the table.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from importlib import resources

import jax.numpy as jnp

MAX_ROWS = 256
"""Rows that one tile takes: up to here the keys and values of a KV head are read once."""

_MAX_SPLITS = 32
TABLE = "tiles.json"


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """What is compiled into the kernels for one shape."""

    block_q: int
    """Rows of a tile (queries times heads of a group), a power of two of at least 16."""
    block_k: int
    """Keys of a block, a power of two of at least 16."""
    num_warps: int
    num_stages: int
    """Blocks in flight between memory and the matrix unit."""
    merge_q: int = 16
    """Rows of a tile of the merge, which has more tiles so that it is over sooner."""
    programs: int = 264
    """The prefix is split until there are about so many programs: two for each SM of an H100."""


def tile_config(*, head_dim: int, group: int, nodes: int, dtype) -> TileConfig:
    """The tiles for `nodes` queries of each of `group` heads a KV head.

    Args:
      dtype: of the page pool: what is read decides the speed.
    """
    key = table_key(head_dim, group, nodes, dtype)
    return _table().get(key) or default_tiles(head_dim, group, nodes, dtype)


def default_tiles(head_dim: int, group: int, nodes: int, dtype) -> TileConfig:
    """The rule: one tile while the rows fit, warps for its accumulator, blocks of one page."""
    rows = max(16, _power_of_two(nodes * group))
    if jnp.dtype(dtype) == jnp.float32:  # exact products use no tensor core: small tiles
        return TileConfig(block_q=min(rows, 16), block_k=32, num_warps=4, num_stages=2)
    if rows > MAX_ROWS:
        rows = 128
    wide = rows * head_dim >= 128 * 128
    return TileConfig(rows, block_k=64, num_warps=8 if wide else 4, num_stages=2 if wide else 3)


def candidates(head_dim: int, group: int, nodes: int, dtype) -> Iterator[TileConfig]:
    """What the tuner tries, the rule's own choice first."""
    base = default_tiles(head_dim, group, nodes, dtype)
    yield base
    for block_k in (32, 64, 128):
        for num_warps in (4, 8):
            for num_stages in (2, 3, 4):
                for programs in (132, 264, 528):
                    tiles = dataclasses.replace(
                        base, block_k=block_k, num_warps=num_warps, num_stages=num_stages,
                        programs=programs,
                    )  # fmt: skip
                    if tiles != base:
                        yield tiles


def num_splits(config: TileConfig, *, programs: int, capacity: int) -> int:
    """Parts of the prefix that different programs read, a power of two.

    Args:
      programs: programs of a launch without splitting.
      capacity: slots that the page table reserves for a sequence: the length is not known here.
    """
    splits = 1
    while (
        splits < _MAX_SPLITS
        and splits * programs < config.programs
        and capacity >= 4 * splits * config.block_k  # at least two blocks a part
    ):
        splits *= 2
    return splits


def table_key(head_dim: int, group: int, nodes: int, dtype) -> str:
    """How the table names a shape."""
    return f"{head_dim}/{group}/{nodes}/{jnp.dtype(dtype).name}"


@functools.cache
def _table() -> dict[str, TileConfig]:
    file = resources.files("pallas_kernels.tree_attention") / TABLE
    if not file.is_file():
        return {}
    return {key: TileConfig(**entry) for key, entry in json.loads(file.read_text()).items()}


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
