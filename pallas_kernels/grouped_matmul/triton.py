"""The grouped product as a Pallas-Triton kernel.

A program multiplies a block of rows of one tile with a block of columns of its group's weights,
over all inputs or a share of them: with few rows there are too few blocks to keep the memory busy,
so the inputs are split, and XLA adds the partial sums.

Weights are widened between memory and the matrix unit. Scales are exact, for they multiply sums
in float32: one a channel the whole sum, one a group of inputs the sum of each step, which lies in
one group. A step of int4 is two products, one with the low and one with the high halves of its
bytes, each with inputs that are neighbours (see `int4`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..compat import triton
from .config import MIN_BLOCK, TileConfig, rows_per_step, tile_config
from .int4 import OFFSET


def grouped_matmul_triton(
    x_RD, w, tile_group_X, scale, *, out_dtype, interpret: bool = False,
    config: TileConfig | None = None,
):  # fmt: skip
    """Same result as `grouped_matmul`; `config` overrides the choice."""
    R, X = x_RD.shape[0], tile_group_X.shape[0]
    _, stored, F = w.shape
    rows, group = R // X, _scaled_together(w, scale)
    if config is None:
        config = tile_config(
            rows=rows, tiles=X, stored=stored, outputs=F, dtype=w.dtype,
            group=group if w.dtype == jnp.uint8 or group < stored else None,
            exact=x_RD.dtype == jnp.float32,
        )  # fmt: skip
    out = jax.ShapeDtypeStruct((1, R, F), out_dtype)
    if config.splits > 1:
        out = out.update(shape=(config.splits, R, F), dtype=jnp.float32)
    args = x_RD, w, tile_group_X, scale
    y_SRF = pl.pallas_call(
        functools.partial(_kernel, _Static(rows, group, config)),
        # Tiles come first: those of one group run together and find its weights in the cache.
        grid=(X * pl.cdiv(rows, config.block_q), pl.cdiv(F, config.block_f), config.splits),
        in_specs=jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), args),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=out,
        compiler_params=triton.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*args)
    return y_SRF[0] if config.splits == 1 else jnp.sum(y_SRF, axis=0).astype(out_dtype)


def unsupported(x_RD, w, scale) -> str | None:
    """Why the kernel cannot run these arguments; None if it can."""
    del x_RD
    group = _scaled_together(w, scale)
    if (w.dtype == jnp.uint8 or group < w.shape[1]) and (
        rows_per_step(group, MIN_BLOCK) < MIN_BLOCK
    ):
        return f"groups of {group} stored rows, which is no multiple of {MIN_BLOCK}"
    # Pallas takes 32-bit offsets up to 4 GiB, and Triton reads them as signed.
    if w.dtype.itemsize == 1 and 2**31 <= w.size <= 2**32:
        return f"8-bit weights of {w.size} bytes, between 2 and 4 GiB"
    return None


def _scaled_together(w, scale) -> int:
    """Stored rows of the weights that share a scale."""
    return w.shape[1] // (1 if scale is None else scale.shape[1])


class _Static(NamedTuple):
    """What is compiled in."""

    rows: int
    """Of a tile; those of its last block beyond them stand for nothing."""
    group: int
    """Stored rows that share a scale."""
    config: TileConfig


class _Block(NamedTuple):
    """What a program computes: which rows and columns, with whose weights.

    A mask is None where all are real: rows of the tile, columns of the weights.
    """

    group: jax.Array
    row_Q1: jax.Array
    real_Q1: jax.Array | None
    column_1F: jax.Array
    real_1F: jax.Array | None


def _kernel(static: _Static, x_RD, w, tile_group_X, scale, y_SRF):
    """One block of rows and columns, over the inputs of one split."""
    config, (_, stored, _) = static.config, w.shape
    tile, split = pl.program_id(0) // _blocks(static), pl.program_id(2)
    group = tile_group_X[tile]
    block = _block(static, tile, jnp.maximum(group, 0), w.shape[2])

    steps = pl.cdiv(stored, config.block_k)
    share = pl.cdiv(steps, config.splits)
    begin = split * share
    end = jnp.where(group < 0, begin, jnp.minimum(begin + share, steps))  # unused: no weight
    y_QF = jax.lax.fori_loop(
        begin,
        end,
        lambda i, sum_QF: sum_QF + _step(static, block, i * config.block_k, x_RD, w, scale),
        jnp.zeros((config.block_q, config.block_f), jnp.float32),
    )
    if scale is not None and static.group == stored:
        y_QF = y_QF * _load(scale, block.group, 0, block.column_1F, mask=block.real_1F)
    place = y_SRF.at[split, block.row_Q1, block.column_1F]
    triton.store(place, y_QF.astype(y_SRF.dtype), mask=_both(block.real_Q1, block.real_1F))


def _blocks(static: _Static) -> int:
    """Blocks of rows of a tile."""
    return pl.cdiv(static.rows, static.config.block_q)


def _block(static: _Static, tile, group, outputs: int) -> _Block:
    config = static.config
    within_Q1 = pl.program_id(0) % _blocks(static) * config.block_q + _iota(config.block_q)[:, None]
    column_1F = pl.program_id(1) * config.block_f + _iota(config.block_f)[None, :]
    return _Block(
        group,
        tile * static.rows + within_Q1,
        within_Q1 < static.rows if static.rows % config.block_q else None,
        column_1F,
        column_1F < outputs if outputs % config.block_f else None,
    )


def _step(static: _Static, block: _Block, begin, x_RD, w, scale):
    """Sum over the inputs of stored rows begin .. begin + block_k."""
    block_k, (_, stored, _) = static.config.block_k, w.shape
    lane_K = begin + _iota(block_k)
    real_K1 = lane_K[:, None] < stored if stored % block_k else None
    real_1K = lane_K[None, :] < stored if stored % block_k else None

    def rows(input_K):
        mask = _both(block.real_Q1, real_1K)
        return _load(x_RD, block.row_Q1, input_K[None, :], mask=mask)

    mask = _both(real_K1, block.real_1F)
    w_KF = _load(w, block.group, lane_K[:, None], block.column_1F, mask=mask)
    # Not `//`, whose rounding downwards hides from Triton that inputs are neighbours.
    scaled = jax.lax.div(begin, jnp.int32(static.group))
    if w.dtype == jnp.uint8:
        low_K = lane_K + scaled * static.group
        low_KF, high_KF = _widen_int4(w_KF, x_RD.dtype)
        y_QF = _dot(rows(low_K), low_KF) + _dot(rows(low_K + static.group), high_KF)
    else:
        y_QF = _dot(rows(lane_K), _widen(w_KF, x_RD.dtype))
    if scale is not None and static.group < stored:
        y_QF = y_QF * _load(scale, block.group, scaled, block.column_1F, mask=block.real_1F)
    return y_QF


def _load(ref, *index, mask):
    if mask is None:
        return triton.load(ref.at[index])
    nothing = 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0
    return triton.load(ref.at[index], mask=mask, other=nothing)


def _both(mask, other):
    """Where both masks are True; None is one that is True everywhere."""
    if mask is None or other is None:
        return other if mask is None else mask
    return mask & other


def _widen(w_KF, dtype):
    if w_KF.dtype == jnp.float8_e4m3fn:  # the direct conversion to bfloat16 has a slow instruction
        w_KF = w_KF.astype(jnp.float32)
    return w_KF.astype(dtype)


def _widen_int4(w_KF, dtype):
    """Values of the low and of the high halves of bytes."""

    def widen(half_KF):  # 0 .. 15
        if dtype != jnp.bfloat16:
            return half_KF.astype(dtype) - OFFSET
        # As the last bits of the bfloat16 128: an "or" instead of a conversion from integers.
        biased = jax.lax.bitcast_convert_type(half_KF | jnp.uint16(0x4300), jnp.bfloat16)
        return biased - jnp.bfloat16(128 + OFFSET)

    w_KF = w_KF.astype(jnp.uint16)
    return widen(w_KF & 15), widen(w_KF >> 4)


def _dot(a, b):
    """Product summed in float32; float32 operands are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _iota(size: int):
    return jnp.arange(size, dtype=jnp.int32)
