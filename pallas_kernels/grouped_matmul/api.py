"""Public entry of the grouped product: checks the shapes, chooses the implementation.

Shape letters: R rows, D inputs, F outputs, E groups of weights (experts), X tiles of rows, Q rows
of a tile, S scales along the inputs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from ..choice import choose
from .reference import grouped_matmul_reference
from .triton import grouped_matmul_triton, unsupported

IMPLEMENTATIONS = {"reference": grouped_matmul_reference, "triton": grouped_matmul_triton}


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w: Num[Array, "E stored F"],
    tile_group_X: Int[Array, "X"],
    *,
    scale: Float[Array, "E S F"] | None = None,
    out_dtype=None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "R F"]:
    """Multiplies each tile of rows with the weights of its group.

    It serves the experts of a MoE layer (`arrange` makes the tiles) and, with one group and one
    tile, any linear map of quantised weights. Those of groups that no tile names are not read. The
    kernel widens weights inside the product, so that they never exist in memory in another dtype;
    the reference widens one group at a time. Sums are in float32.

    Only the reference has a gradient, with respect to x.

    Args:
      x_RD: rows in bfloat16 or float32, X tiles of R / X each, any number. A row of the result
        depends on its own row alone, so rows of padding may hold anything.
      w: [E, D, F] in the dtype of x, float8_e4m3fn or int8; or uint8 [E, D / 2, F], int4 as
        `pack_int4` lays it out for groups of D / S inputs.
      tile_group_X: the group of each tile, below E. Negative: an unused tile, whose rows of the
        result are zeros.
      scale: float32, what the weights are multiplied by: [E, 1, F], one a channel, or [E, S, F],
        one a group of D / S inputs. Needed for int4; None for weights in the dtype of x.
      out_dtype: of the result; that of x by default.
      implementation: "reference" (plain jnp), "triton" (GPU kernel), or None: the kernel on a GPU
        where it fits the shape, the reference elsewhere.
      interpret: run the kernel in interpret mode (the reference ignores it).

    Raises:
      ValueError: shapes or dtypes that do not fit together, an unknown implementation, or a named
        one that cannot run the shape.
    """
    _check(x_RD, w, tile_group_X, scale)
    reason = unsupported(x_RD, w, scale)
    run = choose("grouped_matmul", IMPLEMENTATIONS, implementation, reason)
    return run(
        x_RD, w, tile_group_X, scale,
        out_dtype=jnp.dtype(out_dtype or x_RD.dtype), interpret=interpret,
    )  # fmt: skip


def _check(x_RD, w, tile_group_X, scale) -> None:
    R, D = x_RD.shape
    if x_RD.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"rows are {x_RD.dtype.name}, expected bfloat16 or float32")
    if w.dtype not in (x_RD.dtype, jnp.float8_e4m3fn, jnp.int8, jnp.uint8):
        raise ValueError(
            f"weights are {w.dtype.name}, expected {x_RD.dtype.name}, float8_e4m3fn, int8 or uint8"
        )
    packed = w.dtype == jnp.uint8
    E, stored, F = w.shape
    if stored * (1 + packed) != D:
        raise ValueError(f"weights {w.shape} in {w.dtype.name} do not fit rows of {D} inputs")
    if tile_group_X.ndim != 1 or not tile_group_X.size or R % tile_group_X.size:
        raise ValueError(f"{R} rows do not form tiles of one size for groups {tile_group_X.shape}")
    if scale is None:
        if packed:
            raise ValueError("int4 weights need scales: [E, 1, F], or [E, S, F] for S groups")
        return
    S = scale.shape[1] if scale.ndim == 3 else 0
    if not S or scale.shape != (E, S, F) or D % S or (packed and D // S % 2):
        raise ValueError(
            f"scales {scale.shape} do not fit weights {w.shape} in {w.dtype.name}: "
            f"expected ({E}, 1, {F}), or ({E}, S, {F}) with S groups of equal size in {D} inputs"
        )
    if scale.dtype != jnp.float32 or w.dtype == x_RD.dtype:
        raise ValueError(
            f"scales of {scale.dtype.name} for weights of {w.dtype.name}: only float8_e4m3fn, int8 "
            "and uint8 take scales, in float32"
        )
