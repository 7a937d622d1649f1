"""Tree attention as Pallas-Triton kernels.

The queries of all nodes that share a KV head fold into the rows of one tile (row = node * group +
head of the group), so keys and values are read once for all of them and the products suit a matrix
unit. A program holds one tile of one KV head of one sequence.

Pass 1 walks the prefix in blocks of keys, whose pages it looks up itself, with no mask but the
length (and `first`). Pass 2 walks the tree's own keys under the ancestor bits. Both continue one
running softmax, which is the log-sum-exp merge. Where there are too few programs to fill the GPU,
the prefix is split: programs of their own leave partial sums, and those of pass 2 add them up.

Keys that nobody may see are not loaded, or their values are cleared: NaN in them cannot spread.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..compat import triton
from .config import MAX_ROWS, TileConfig, num_splits, tile_config
from .inputs import Inputs

_LOWEST = float(jnp.finfo(jnp.float32).min)
"""Maximum of a row that has seen no key: exp2(-inf - _LOWEST) is 0, never NaN."""

_WORD = 32
"""Tree keys in a word of mask."""


def tree_attention_triton(
    inputs: Inputs,
    *,
    scale: float,
    interpret: bool = False,
    config: TileConfig | None = None,
    splits: int | None = None,
):
    """Same result as `tree_attention`; `config` and `splits` override the choice."""
    q_BMNH, dtype = inputs.q_BMNH, inputs.k_pages_PKCH.dtype
    B, M, N, H = q_BMNH.shape
    K, R, C = (
        inputs.k_tree_BXKH.shape[2],
        inputs.page_table_BR.shape[1],
        inputs.k_pages_PKCH.shape[2],
    )
    if q_BMNH.dtype == jnp.float32:  # exact products, whatever the pages hold
        dtype = q_BMNH.dtype
    config = config or tile_config(head_dim=H, group=N // K, nodes=M, dtype=dtype)
    tiles = -(-M * N // K // config.block_q)
    splits = splits or num_splits(config, programs=B * K * tiles, capacity=R * C)
    chunk = inputs.tree_mask_BMX is None and M * N // K > MAX_ROWS
    inputs = _for_kernels(inputs)

    def call(kernel, *args, rows: int, grid: int, out_shape):
        return pl.pallas_call(
            functools.partial(kernel, _Static(rows, config.block_k, scale * math.log2(math.e))),
            grid=(grid, K, B),
            in_specs=jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), args),
            out_specs=jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), out_shape),
            out_shape=out_shape,
            compiler_params=triton.CompilerParams(
                num_warps=config.num_warps, num_stages=config.num_stages
            ),
            interpret=interpret,
            name="tree_attention" + kernel.__name__.removesuffix("_kernel"),
        )(*args)

    out = jax.ShapeDtypeStruct(q_BMNH.shape, q_BMNH.dtype)
    if splits == 1:
        return call(_whole_kernel, inputs, rows=config.block_q, grid=tiles, out_shape=out)
    sums = jax.ShapeDtypeStruct((B, K, splits, M * N // K), jnp.float32)
    partial = _Running(sums.update(shape=(*sums.shape, H)), sums, sums)
    part = call(_prefix_kernel, inputs, rows=config.block_q, grid=tiles * splits, out_shape=partial)
    # Small tiles have the merge over sooner; the own keys of a chunk of a prompt want large ones.
    rows = config.block_q if chunk else config.merge_q
    return call(_merge_kernel, inputs, part, rows=rows, grid=-(-M * N // K // rows), out_shape=out)


def unsupported(q_BMNH, k_pages_PKCH) -> str | None:
    """Why the kernels cannot run these arguments; None if they can."""
    H, pool = q_BMNH.shape[3], k_pages_PKCH
    if H not in (16, 32, 64, 128):
        return f"a head dimension of {H}, which is no power of two from 16 to 128"
    # Pallas takes 32-bit offsets up to 4 GiB, and Triton reads them as signed.
    if pool.dtype.itemsize == 1 and 2**31 <= pool.size <= 2**32:
        return f"an 8-bit page pool of {pool.size} bytes, between 2 and 4 GiB"
    return None


def pack_bits(mask_BMX: jax.Array) -> jax.Array:
    """Rows of booleans as int32 words: key x is bit x % 32 of word x // 32."""
    B, M, X = mask_BMX.shape
    words = -(-X // _WORD)
    padded_BMX = jnp.pad(mask_BMX, ((0, 0), (0, 0), (0, words * _WORD - X)))
    bits_BMWb = padded_BMX.reshape(B, M, words, _WORD).astype(jnp.uint32)
    place_b = jnp.left_shift(jnp.uint32(1), jnp.arange(_WORD, dtype=jnp.uint32))
    words_BMW = jnp.sum(bits_BMWb * place_b[None, None, None], axis=-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words_BMW, jnp.int32)


def _for_kernels(inputs: Inputs) -> Inputs:
    """The mask as bits, a scale for each KV head, and nothing of a prefix without pages."""
    K = inputs.k_tree_BXKH.shape[2]
    mask, scales = inputs.tree_mask_BMX, (inputs.k_scale, inputs.v_scale)
    k_scale, v_scale = (None if s is None else jnp.broadcast_to(s, (K,)) for s in scales)
    inputs = inputs._replace(
        tree_mask_BMX=None if mask is None else pack_bits(mask), k_scale=k_scale, v_scale=v_scale
    )
    if inputs.page_table_BR.shape[1]:
        return inputs
    prefix = ("k_pages_PKCH", "v_pages_PKCH", "page_table_BR", "length_B", "first_BM")
    return inputs._replace(**dict.fromkeys(prefix))


class _Static(NamedTuple):
    """What is compiled in."""

    rows: int
    block_k: int
    scale: float
    """Of the scores, times log2(e): weights are powers of two."""


class _Running(NamedTuple):
    """A softmax under way: sum of weighted values, sum of weights, maximum so far."""

    out: Any
    total: Any
    max: Any


class _Tile(NamedTuple):
    """The rows of a program: which queries they are."""

    sequence: Any
    kv_head: Any
    row_Q: Any
    node_Q: Any
    head_Q: Any
    real_Q: Any
    """Rows of the last tile that stand for no query are False."""


def _whole_kernel(static, inputs, out_BMNH):
    tile = _tile(static, inputs, pl.program_id(0))
    q_QH = _load_queries(tile, inputs)
    running = _nothing(static, inputs)
    if inputs.page_table_BR is not None:
        running = _prefix_pass(
            static, tile, inputs, q_QH, *_prefix_range(static, tile, inputs), running
        )
    running = _tree_pass(static, tile, inputs, q_QH, running)
    _store_output(tile, running, out_BMNH)


def _prefix_kernel(static, inputs, *part):
    """Pass 1 of one split: an equal share of the blocks of this sequence's prefix."""
    part = _Running(*part)
    splits = part.total.shape[2]
    tile = _tile(static, inputs, pl.program_id(0) // splits)
    split = pl.program_id(0) % splits
    q_QH = _load_queries(tile, inputs)
    begin, end, first_Q = _prefix_range(static, tile, inputs)
    share = pl.cdiv(jnp.maximum(end - begin, 0), splits)
    begin = begin + split * share
    end = jnp.minimum(begin + share, end)
    running = _nothing(static, inputs)
    running = _prefix_pass(static, tile, inputs, q_QH, begin, end, first_Q, running)
    place = (tile.sequence, tile.kv_head, split, tile.row_Q)
    triton.store(_rows(part.out, *place), running.out, mask=tile.real_Q[:, None])
    triton.store(part.total.at[place], running.total, mask=tile.real_Q)
    triton.store(part.max.at[place], running.max, mask=tile.real_Q)


def _merge_kernel(static, inputs, part, out_BMNH):
    """Pass 2, then the partial sums of pass 1."""
    tile = _tile(static, inputs, pl.program_id(0))
    running = _tree_pass(
        static, tile, inputs, _load_queries(tile, inputs), _nothing(static, inputs)
    )

    def add(split, running):
        place = (tile.sequence, tile.kv_head, split, tile.row_Q)
        other = _Running(
            triton.load(_rows(part.out, *place), mask=tile.real_Q[:, None], other=0.0),
            triton.load(part.total.at[place], mask=tile.real_Q, other=0.0),
            triton.load(part.max.at[place], mask=tile.real_Q, other=_LOWEST),
        )
        top = jnp.maximum(running.max, other.max)
        a, b = jnp.exp2(running.max - top), jnp.exp2(other.max - top)
        out = running.out * a[:, None] + other.out * b[:, None]
        return _Running(out, running.total * a + other.total * b, top)

    running = jax.lax.fori_loop(0, part.total.shape[2], add, running)
    _store_output(tile, running, out_BMNH)


def _tile(static: _Static, inputs: Inputs, index) -> _Tile:
    M, N = inputs.q_BMNH.shape[1:3]
    group = N // inputs.k_tree_BXKH.shape[2]
    kv_head, sequence = pl.program_id(1), pl.program_id(2)
    row_Q = index * static.rows + jnp.arange(static.rows, dtype=jnp.int32)
    real_Q = row_Q < M * group
    head_Q = kv_head * group + row_Q % group
    return _Tile(sequence, kv_head, row_Q, row_Q // group, head_Q, real_Q)


def _load_queries(tile: _Tile, inputs: Inputs):
    queries = _rows(inputs.q_BMNH, tile.sequence, tile.node_Q, tile.head_Q)
    return triton.load(queries, mask=tile.real_Q[:, None], other=0.0)


def _rows(ref, *index):
    """Rows of H elements at scalar or vector indices; interpret mode wants the lanes spelt out."""
    lane_1H = jnp.arange(ref.shape[-1], dtype=jnp.int32)[None, :]
    return ref.at[*(i[:, None] if i.ndim else i for i in index), lane_1H]


def _prefix_range(static: _Static, tile: _Tile, inputs: Inputs):
    """(first block, behind the last block, first position of each row) of the visible prefix."""
    length = inputs.length_B[tile.sequence]
    end = pl.cdiv(length, static.block_k)
    if inputs.first_BM is None:
        return jnp.int32(0), end, None
    never = jnp.iinfo(jnp.int32).max
    first = inputs.first_BM.at[tile.sequence, tile.node_Q]
    first_Q = triton.load(first, mask=tile.real_Q, other=never)
    return jnp.minimum(jnp.min(first_Q), length) // static.block_k, end, first_Q


def _prefix_pass(static, tile, inputs, q_QH, begin, end, first_Q, running) -> _Running:
    """Pass 1 over blocks begin..end: the scales of a quantised cache apply here alone."""
    b, h = tile.sequence, tile.kv_head
    page_size = inputs.k_pages_PKCH.shape[2]
    length = inputs.length_B[b]
    lowest = jnp.int32(0) if first_Q is None else jnp.min(first_Q)
    scale = static.scale
    if inputs.k_scale is not None:
        scale = scale * inputs.k_scale[h]

    def block(i, running):
        start = i * static.block_k
        position_S = start + jnp.arange(static.block_k, dtype=jnp.int32)
        read_S = (position_S < length) & (position_S >= lowest)
        if page_size % static.block_k == 0:  # one page a block
            page = inputs.page_table_BR[b, start // page_size]
        else:
            entry = inputs.page_table_BR.at[b, position_S // page_size]
            page = triton.load(entry, mask=position_S < length, other=0)
        place = (page, h, position_S % page_size)
        k_SH = triton.load(_rows(inputs.k_pages_PKCH, *place), mask=read_S[:, None], other=0.0)
        v_SH = triton.load(_rows(inputs.v_pages_PKCH, *place), mask=read_S[:, None], other=0.0)
        mask_QS = read_S[None, :]
        if first_Q is not None:
            mask_QS = mask_QS & (position_S[None, :] >= first_Q[:, None])
        return _add_block(running, q_QH, k_SH, v_SH, mask_QS, scale)

    running = jax.lax.fori_loop(begin, end, block, running)
    if inputs.v_scale is not None:
        running = running._replace(out=running.out * inputs.v_scale[h])
    return running


def _tree_pass(static, tile, inputs, q_QH, running: _Running) -> _Running:
    """Pass 2: the tree's own keys under the ancestor bits, or causally."""
    causal = inputs.tree_mask_BMX is None
    M, X = inputs.q_BMNH.shape[1], inputs.k_tree_BXKH.shape[1]
    behind = jnp.where(tile.real_Q, tile.node_Q + X - M + 1, 0)  # causal: keys before this one
    block_x = static.block_k if causal else _WORD
    blocks = pl.cdiv(jnp.max(behind), block_x) if causal else pl.cdiv(X, block_x)

    def block(i, running):
        key_S = i * block_x + jnp.arange(block_x, dtype=jnp.int32)
        if causal:
            mask_QS = key_S[None, :] < behind[:, None]
        else:  # one word a row: a block of mask would fill the registers
            word = inputs.tree_mask_BMX.at[tile.sequence, tile.node_Q, i]
            word_Q = triton.load(word, mask=tile.real_Q, other=0)
            mask_QS = (word_Q[:, None] >> (key_S % _WORD)[None, :]) & 1 == 1
        used_S1 = jnp.max(mask_QS.astype(jnp.int32), axis=0)[:, None] > 0
        place = (tile.sequence, key_S, tile.kv_head)
        k_SH = triton.load(_rows(inputs.k_tree_BXKH, *place), mask=used_S1, other=0.0)
        v_SH = triton.load(_rows(inputs.v_tree_BXKH, *place), mask=used_S1, other=0.0)
        return _add_block(running, q_QH, k_SH, v_SH, mask_QS, static.scale)

    return jax.lax.fori_loop(0, blocks, block, running)


def _nothing(static: _Static, inputs: Inputs) -> _Running:
    Q, H = static.rows, inputs.q_BMNH.shape[3]
    zeros_Q = jnp.zeros(Q, jnp.float32)
    return _Running(jnp.zeros((Q, H), jnp.float32), zeros_Q, jnp.full(Q, _LOWEST, jnp.float32))


def _add_block(running: _Running, q_QH, k_SH, v_SH, mask_QS, scale) -> _Running:
    """The running softmax after one more block of keys."""
    k_SH, v_SH = k_SH.astype(q_QH.dtype), v_SH.astype(q_QH.dtype)  # an 8-bit cache widens here
    scores_QS = jnp.where(mask_QS, _dot(q_QH, k_SH.T) * scale, -jnp.inf)
    top_Q = jnp.maximum(running.max, jnp.max(scores_QS, axis=1))
    weights_QS = jnp.exp2(scores_QS - top_Q[:, None])
    shrink_Q = jnp.exp2(running.max - top_Q)
    out_QH = running.out * shrink_Q[:, None] + _dot(weights_QS.astype(v_SH.dtype), v_SH)
    return _Running(out_QH, running.total * shrink_Q + jnp.sum(weights_QS, axis=1), top_Q)


def _dot(a, b):
    """Product summed in float32; float32 operands are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _store_output(tile: _Tile, running: _Running, out_BMNH) -> None:
    """Divides by the total; a node that saw nothing gets zeros."""
    total_Q = jnp.where(running.total > 0, running.total, 1.0)
    out_QH = (running.out / total_Q[:, None]).astype(out_BMNH.dtype)
    place = (tile.sequence, tile.node_Q, tile.head_Q)
    triton.store(_rows(out_BMNH, *place), out_QH, mask=tile.real_Q[:, None])
