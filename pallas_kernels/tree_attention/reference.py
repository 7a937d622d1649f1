"""Tree attention in plain jnp: the meaning of the kernels, and what runs on a CPU.

The queries of a KV head's group fold into one axis (Q = M * G rows per KV head), so both passes
are matrix products. Two invariants hold for every implementation: a slot at or behind `length`
never reaches the output, even if it holds NaN, and the merge is exact.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from ..compat import order_after
from .inputs import Inputs

_BLOCK_SLOTS = 256
"""Slots of the prefix that one block reads."""
_BLOCK_NODES = 128
"""Nodes whose scores over the tree exist at the same time."""
_LOWEST = float(jnp.finfo(jnp.float32).min)
"""Maximum of a row that sees nothing: finite, so that its weights are exp(-inf) = 0, not NaN."""


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))  # traced once for all layers
def tree_attention_reference(inputs: Inputs, *, scale: float, interpret: bool = False):
    """Same result as `tree_attention`, in plain jnp."""
    del interpret
    q_BMNH, k_tree_BXKH, v_tree_BXKH, *_, tree_mask_BMX, first_BM, k_scale, v_scale = inputs
    pages = inputs.k_pages_PKCH, inputs.v_pages_PKCH, inputs.page_table_BR, inputs.length_B
    M, K = q_BMNH.shape[1], k_tree_BXKH.shape[2]
    G = q_BMNH.shape[2] // K
    dtype = q_BMNH.dtype
    q_BKQH = rearrange(q_BMNH * jnp.asarray(scale, dtype), "b m (k g) h -> b k (m g) h", k=K)

    if tree_mask_BMX is None:
        X = k_tree_BXKH.shape[1]
        tree_mask_BMX = (jnp.arange(X)[None, :] <= jnp.arange(M)[:, None] + X - M)[None]
    used_BX = jnp.any(tree_mask_BMX, axis=1)
    tree = _tree_pass(
        q_BKQH,
        rearrange(k_tree_BXKH, "b x k h -> b k x h"),
        _clear(rearrange(v_tree_BXKH, "b x k h -> b k x h"), used_BX),
        tree_mask_BMX,
        group=G,
    )
    if inputs.page_table_BR.shape[1]:
        prefix = _prefix_pass(q_BKQH, *pages, first_BM, scales=(k_scale, v_scale), group=G)
        tree = _merge(tree, prefix)
    out_BKQH, total_BKQ1, _ = tree
    nothing_BKQ1 = total_BKQ1 == 0  # a node that sees no key: zeros
    out_BKQH = (out_BKQH / jnp.where(nothing_BKQ1, 1.0, total_BKQ1)).astype(dtype)
    return rearrange(out_BKQH, "b k (m g) h -> b m (k g) h", m=M)


def _tree_pass(q_BKQH, k_BKXH, v_BKXH, mask_BMX, *, group):
    """Pass 2: all nodes against the tree's own keys.

    Long texts go block by block of nodes, and a backward pass computes each block again: memory is
    linear in the length, in training as well.
    """

    def block(part):
        q_BKQH, mask_BMX = part
        return _softmax_pass(q_BKQH, k_BKXH, v_BKXH, jnp.repeat(mask_BMX, group, axis=1))

    M = mask_BMX.shape[1]
    if M <= _BLOCK_NODES:
        return block((q_BKQH, mask_BMX))

    def split(x, axis, size):  # [blocks, ..., size, ...]
        x = jnp.pad(x, [(0, -x.shape[i] % size if i == axis else 0) for i in range(x.ndim)])
        x = jnp.reshape(x, (*x.shape[:axis], -1, size, *x.shape[axis + 1 :]))
        return jnp.moveaxis(x, axis, 0)

    parts = split(q_BKQH, 2, _BLOCK_NODES * group), split(mask_BMX, 1, _BLOCK_NODES)
    blocks = jax.lax.map(jax.checkpoint(block, prevent_cse=False), parts)
    return tuple(rearrange(x, "n b k q h -> b k (n q) h")[:, :, : M * group] for x in blocks)


def _prefix_pass(
    q_BKQH, k_pages_PKCH, v_pages_PKCH, page_table_BR, length_B, first_BM, *, scales, group
):
    """Pass 1: all nodes against the committed pages; the only mask is the length (and `first`).

    Block by block, so blocks stay in the CPU's cache, and no further than the longest sequence
    reaches: a step costs what its prefixes are long, not what the table has room for.
    """
    C, R = k_pages_PKCH.shape[2], page_table_BR.shape[1]
    pages = max(1, min(R, _BLOCK_SLOTS // C))  # of a block
    page_table_BR = jnp.pad(order_after(q_BKQH, page_table_BR), ((0, 0), (0, -R % pages)))

    def block(index, running):
        table = jax.lax.dynamic_slice_in_dim(page_table_BR, index * pages, pages, axis=1)
        position = index * pages * C
        new = _block_pass(
            q_BKQH, k_pages_PKCH, v_pages_PKCH, table, length_B, position, first_BM,
            scales=scales, group=group,
        )  # fmt: skip
        return _merge(running, new)

    sums_BKQ1 = jnp.zeros((*q_BKQH.shape[:-1], 1), jnp.float32)
    nothing = jnp.zeros(q_BKQH.shape, jnp.float32), sums_BKQ1, jnp.full_like(sums_BKQ1, _LOWEST)
    used = jnp.minimum((jnp.max(length_B) - 1) // (pages * C) + 1, page_table_BR.shape[1] // pages)
    return jax.lax.fori_loop(0, used, block, nothing)


def _block_pass(
    q_BKQH, k_pages_PKCH, v_pages_PKCH, pages_BR, length_B, position, first_BM, *, scales, group
):
    """One pass over a few pages; `position` is that of their first slot."""
    B, K, _, _ = q_BKQH.shape
    # Indexing the head as well makes the gather produce [B, K, R, C, H]: no transposition.
    index = pages_BR[:, None, :], jnp.arange(K)[None, :, None]
    k_BKSH, v_BKSH = (
        _dequantize(jnp.reshape(pages[index], (B, K, -1, pages.shape[3])), factor, q_BKQH.dtype)
        for pages, factor in zip((k_pages_PKCH, v_pages_PKCH), scales, strict=True)
    )
    position_1S = position + jnp.arange(k_BKSH.shape[2])[None, :]
    used_BS = position_1S < length_B[:, None]
    mask_BQS = used_BS[:, None, :]
    if first_BM is not None:
        used_BS &= position_1S >= jnp.min(first_BM, axis=1, keepdims=True)
        seen_BMS = position_1S[:, None, :] >= first_BM[:, :, None]
        mask_BQS = mask_BQS & jnp.repeat(seen_BMS, group, axis=1)
    return _softmax_pass(q_BKQH, k_BKSH, _clear(v_BKSH, used_BS), mask_BQS)


def _clear(v_BKSH, used_BS):
    """Values that nobody sees as zeros: 0 * NaN is NaN, so masking their weights is not enough."""
    return jnp.where(used_BS[:, None, :, None], v_BKSH, jnp.zeros((), v_BKSH.dtype))


def _dequantize(x_BKSH, factor, dtype):
    if factor is None:
        return x_BKSH.astype(dtype)
    factor_K = jnp.broadcast_to(factor, x_BKSH.shape[1:2])
    return (x_BKSH.astype(jnp.float32) * factor_K[None, :, None, None]).astype(dtype)


def _softmax_pass(q_BKQH, k_BKSH, v_BKSH, mask_BQS):
    """Attention of one pass, not normalised: (sum of weighted values, sum of weights, max)."""
    product = functools.partial(
        jnp.einsum,
        precision=jax.lax.Precision.HIGHEST if q_BKQH.dtype == jnp.float32 else None,  # no TF32
        preferred_element_type=jnp.float32,
    )
    # Keys as the left operand: on a CPU this product is several times faster than q @ k^T.
    scores_BKSQ = product("bksh,bkqh->bksq", k_BKSH, q_BKQH)
    scores_BKQS = jnp.where(mask_BQS[:, None], jnp.swapaxes(scores_BKSQ, 2, 3), -jnp.inf)
    max_BKQ1 = jnp.maximum(jnp.max(scores_BKQS, axis=-1, keepdims=True), _LOWEST)
    weights_BKQS = jnp.exp(scores_BKQS - max_BKQ1)
    out_BKQH = product("bkqs,bksh->bkqh", weights_BKQS.astype(v_BKSH.dtype), v_BKSH)
    return out_BKQH, jnp.sum(weights_BKQS, axis=-1, keepdims=True), max_BKQ1


def _merge(a, b):
    """Exact merge of two passes over disjoint keys: rescale both to the common maximum."""
    (out_a, total_a, max_a), (out_b, total_b, max_b) = a, b
    top = jnp.maximum(max_a, max_b)
    scale_a, scale_b = jnp.exp(max_a - top), jnp.exp(max_b - top)
    return scale_a * out_a + scale_b * out_b, scale_a * total_a + scale_b * total_b, top
