"""Which row of which tile each choice of an expert goes to: integers alone, no weight, no token.

Rows are sorted by group (expert), and each group takes whole tiles, so that a tile needs the
weights of one group. The number of tiles is static: the most that any routing can need.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

_FEW_CHOICES = 1024
"""Up to so many all are compared with all."""


class Arrangement(NamedTuple):
    """Rows of tiles for T tokens that chose K groups each. Used as

    rows_RD = x_TD[arrangement.token_of_row]
    y_RF = grouped_matmul(rows_RD, w, arrangement.tile_group)
    y_TKF = y_RF.at[arrangement.row_of_choice].get(mode="fill", fill_value=0)
    """

    choice_of_row: Int[Array, "R"]
    """t * K + k of the choice that stands in a row; -1 in rows of padding."""
    tile_group: Int[Array, "X"]
    """Group of each tile's rows; -1 for the unused tiles, which come last."""
    row_of_choice: Int[Array, "T K"]
    """Where each choice went; R for a choice that was left out."""

    @property
    def token_of_row(self) -> Int[Array, "R"]:
        """The token of each row; in rows of padding token 0, so that it is always an index."""
        return jnp.maximum(self.choice_of_row, 0) // self.row_of_choice.shape[1]


def num_tiles(num_choices: int, num_groups: int, rows_per_tile: int) -> int:
    """The most tiles that `num_choices` rows in `num_groups` groups can need, and no fewer.

    If h groups are hit, group e by n_e >= 1 choices, they need the sum of
    ceil(n_e / q) = 1 + floor((n_e - 1) / q) tiles, which is at most h + floor((n - h) / q): the
    floors of parts add up to no more than the floor of the sum. One more group hit adds 1 and takes
    at most 1 away, so the bound is largest for as many as can be hit, h = min(groups, n). A routing
    that sends one choice to each but the last of them, and the rest there, needs exactly that many.
    """
    hit = min(num_choices, num_groups)
    return hit + (num_choices - hit) // rows_per_tile


def arrange(group_TK: Int[Array, "T K"], num_groups: int, rows_per_tile: int) -> Arrangement:
    """Sorts the choices by group into tiles; the order within a group stays.

    Those of a round are compared all with all and summed along one axis: on a GPU a few fused
    kernels, no sort, no loop, and the squares never exist in memory. Those of long prompts are
    sorted.

    Args:
      group_TK: the groups that each token chose, below `num_groups`. Negative: the choice is left
        out (an idle slot, or a group that another device holds).
      rows_per_tile: see `config.rows_per_tile`.
    """
    n = group_TK.size
    tiles = num_tiles(n, num_groups, rows_per_tile)
    group_n = jnp.reshape(group_TK, n).astype(jnp.int32)
    group_E = jnp.arange(num_groups, dtype=jnp.int32)

    rank_n = _rank_by_comparing(group_n) if n <= _FEW_CHOICES else _rank_by_sorting(group_n)
    used_E = -(-_count(group_E[:, None] == group_n[None, :]) // rows_per_tile)  # tiles
    before_EE = group_E[None, :] < group_E[:, None]
    first_E = jnp.sum(jnp.where(before_EE, used_E[None, :], 0), axis=1, dtype=jnp.int32)

    kept_n = group_n >= 0
    first_n = first_E[jnp.where(kept_n, group_n, 0)]
    row_n = jnp.where(kept_n, first_n * rows_per_tile + rank_n, tiles * rows_per_tile)
    nothing_R = jnp.full(tiles * rows_per_tile, -1, jnp.int32)
    choice_of_row = nothing_R.at[row_n].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
    tile_X = jnp.arange(tiles, dtype=jnp.int32)
    behind_E = first_E + used_E
    group_X = _count(behind_E[None, :] <= tile_X[:, None])
    tile_group = jnp.where(group_X < num_groups, group_X, -1)
    return Arrangement(choice_of_row, tile_group, jnp.reshape(row_n, group_TK.shape))


def _rank_by_comparing(group_n: Int[Array, "n"]) -> Int[Array, "n"]:
    """How many earlier choices have the group of each."""
    choice_n = jnp.arange(group_n.size, dtype=jnp.int32)
    same_nn = group_n[:, None] == group_n[None, :]
    return _count(same_nn & (choice_n[None, :] < choice_n[:, None]))


def _rank_by_sorting(group_n: Int[Array, "n"]) -> Int[Array, "n"]:
    """The same."""
    order_n = jnp.argsort(group_n, stable=True)
    sorted_n = group_n[order_n]
    place_n = jnp.arange(group_n.size, dtype=jnp.int32)
    first_n = jnp.searchsorted(sorted_n, sorted_n).astype(jnp.int32)
    return jnp.zeros_like(group_n).at[order_n].set(place_n - first_n, unique_indices=True)


def _count(true_AB: jax.Array) -> jax.Array:
    return jnp.sum(true_AB, axis=1, dtype=jnp.int32)
