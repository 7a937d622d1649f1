"""The grouped product in plain jnp: the meaning of the kernel, and what runs on a CPU.

Everything is computed in float32. The weights of one tile at a time are read and widened, and of
none that no tile names; a backward pass does it again instead of keeping them.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from .int4 import unpack_int4


@functools.partial(jax.jit, static_argnames=("out_dtype", "interpret"))
def grouped_matmul_reference(x_RD, w, tile_group_X, scale, *, out_dtype, interpret: bool = False):
    """Same result as `grouped_matmul`, in plain jnp."""
    del interpret
    X, (E, _, F) = tile_group_X.shape[0], w.shape
    x_XQD = jnp.reshape(x_RD, (X, -1, x_RD.shape[1]))

    def group(index):
        one = jax.lax.dynamic_index_in_dim
        w_DF = one(w, index, keepdims=False)
        return w_DF, None if scale is None else one(scale, index, keepdims=False)

    if E == 1:  # a plain product, whatever the tiles
        y_RF = _product(x_RD, *group(0))
        used_X11 = (tile_group_X >= 0)[:, None, None]
        y_XQF = jnp.where(used_X11, jnp.reshape(y_RF, (X, -1, F)), 0.0)
    else:

        def tile(part):
            x_QD, index = part
            nothing_QF = jnp.zeros((x_QD.shape[0], F), jnp.float32)
            return jax.lax.cond(
                index < 0, lambda: nothing_QF, lambda: _product(x_QD, *group(index))
            )

        y_XQF = jax.lax.map(jax.checkpoint(tile, prevent_cse=False), (x_XQD, tile_group_X))
    return jnp.reshape(y_XQF, (-1, F)).astype(out_dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _product(x_QD, w_DF, scale_SF):
    return jnp.dot(
        x_QD.astype(jnp.float32), dequantize(w_DF, scale_SF), precision=jax.lax.Precision.HIGHEST
    )


def dequantize(
    w: Num[Array, "*E stored F"], scale: Float[Array, "*E S F"] | None
) -> Float[Array, "*E D F"]:
    """The weights in float32 that `grouped_matmul` multiplies with: bytes of int4 unpacked.

    `scale` None: the weights are whole, and only widened.
    """
    if scale is None:
        return w.astype(jnp.float32)
    if w.dtype == jnp.uint8:
        w = unpack_int4(w, 2 * w.shape[-2] // scale.shape[-2])
    w = w.astype(jnp.float32)
    *experts, D, F = w.shape
    grouped = jnp.reshape(w, (*experts, scale.shape[-2], -1, F))
    return jnp.reshape(grouped * scale[..., None, :], (*experts, D, F))
