"""Tile sizes of the kernel, by rule.

With few rows the time is that of reading the weights, so the rule keeps memory busy: 128 bytes of a
row of weights at a time, several blocks in flight, and so many splits of the inputs that every
multiprocessor has programs to alternate between. With the rows of a prompt the matrix unit is the
limit, and the blocks become as large as its registers allow.
"""

import dataclasses

import jax.numpy as jnp

MAX_ROWS = 128
"""Rows of a block at most; larger tiles take several."""

MIN_BLOCK = 16
"""Inputs that a tensor-core product takes at least."""

_MULTIPROCESSORS = 132
"""Of an H100."""


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """What is compiled into the kernel for one shape."""

    block_q: int
    """Rows of a block, a power of two of at least 16."""
    block_k: int
    """Stored rows of weights (of bytes, in int4) of a step, a power of two of at least 16."""
    block_f: int
    """Outputs of a block, a power of two."""
    splits: int
    """Parts of the inputs whose sums different programs compute."""
    num_warps: int
    num_stages: int
    """Blocks in flight between memory and the matrix unit."""


def rows_per_tile(num_choices: int, num_groups: int) -> int:
    """Rows of a tile for `arrange`: about what a group gets on average, from 16 to 128.

    Smaller tiles read a group's weights more often (from the cache), larger ones multiply more rows
    of padding. Never more rows than there are choices: one token fills one row, not 16.
    """
    rows = MIN_BLOCK
    while rows < MAX_ROWS and 2 * rows * num_groups <= num_choices:
        rows *= 2
    return min(rows, num_choices)


def tile_config(
    *, rows: int, tiles: int, stored: int, outputs: int, group: int | None, exact: bool, dtype
) -> TileConfig:
    """The rule.

    Args:
      rows: of a tile.
      stored: rows of the weights of one group as they are stored.
      group: of those, the ones that share a scale; None: all of them, or there are none.
      exact: the rows are in float32.
      dtype: of the weights.
    """
    block_q = min(MAX_ROWS, max(16, _power_of_two(rows)))
    bytes_each = jnp.dtype(dtype).itemsize
    # `resident`: programs of a multiprocessor that registers and shared memory have room for.
    if exact:  # no tensor core: small tiles
        block_q, block_k, block_f, num_warps, num_stages, resident = 16, 32, 64, 4, 2, 2
    elif block_q < 64 and dtype == jnp.uint8:  # 128 inputs a step, which 64 rows of bytes hold
        block_k, block_f, num_warps, num_stages, resident = 64, 128, 4, 4, 3
    elif block_q < 64:
        block_k, block_f, num_warps, num_stages, resident = 128, 128 // bytes_each, 4, 3, 4
    else:  # the widened weights pass through shared memory, so steps are half as long
        block_k, block_f, num_stages, resident = 32 if dtype == jnp.uint8 else 64, 128, 3, 2
        num_warps = 4 if block_q == 64 else 8
    block_k = rows_per_step(group, block_k)
    steps = -(-stored // block_k)
    # Partial sums may cost half as much traffic as the weights.
    most = max(1, min(steps, stored * bytes_each // (8 * min(rows, block_q))))
    blocks = tiles * -(-rows // block_q)
    if blocks * most * -(-outputs // block_f) < 2 * _MULTIPROCESSORS:
        block_f //= 2
    # As many programs as run at once: one more would run alone, after them.
    splits = resident * _MULTIPROCESSORS // (blocks * -(-outputs // block_f))
    share = -(-steps // max(1, min(splits, most)))  # steps of a program
    return TileConfig(block_q, block_k, block_f, -(-steps // share), num_warps, num_stages)


def rows_per_step(group: int | None, largest: int) -> int:
    """Stored rows of a step: a step has one scale, so it divides the group. May be too small."""
    while group is not None and group % largest:
        largest //= 2
    return largest


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
