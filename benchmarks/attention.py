"""Times one attention layer as a decoder meets it: many layers' pages, none of them in a cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_eagle.config import LlamaConfig
from pallas_kernels.tree_attention.shapes import AttentionShape, abstract_inputs

from .timing import per_iteration


def prefix_bytes(shape: AttentionShape | LlamaConfig, *, batch: int, context: int, dtype) -> int:
    """Keys and values of the prefix, which every call has to read."""
    row = 2 * shape.num_kv_heads * shape.head_dim * jnp.dtype(dtype).itemsize
    return batch * context * row


def seconds_per_call(
    attend: Callable[..., jax.Array],
    shape: AttentionShape,
    *,
    batch: int,
    context: int,
    nodes: int,
    kv_dtype=jnp.bfloat16,
    calls: int = 64,
) -> float:
    """Of `attend`, which takes the arguments of `tree_attention`, on random data in bfloat16."""
    like = abstract_inputs(shape, batch=batch, nodes=nodes, context=context, kv_dtype=kv_dtype)
    pages = like["k_pages_PKCH"]
    one = prefix_bytes(shape, batch=batch, context=context, dtype=kv_dtype)
    layers = max(1, min(64, -(-(2**29) // one)))  # up to half a gigabyte: several times any cache
    key = jax.random.key(0)
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    data: dict[str, Any] = {
        name: draw(key, like[name].shape, like[name].dtype)
        for name in ("q_BMNH", "k_tree_BXKH", "v_tree_BXKH")
    }
    pool = layers * pages.shape[0], *pages.shape[1:]
    for name in ("k_pages_PKCH", "v_pages_PKCH"):  # two pools: one would be read from the cache
        data[name] = jnp.asarray(draw(key, pool, jnp.bfloat16), kv_dtype)
    R = like["page_table_BR"].shape[1]
    table = 1 + np.random.default_rng(0).permutation(batch * R).reshape(batch, R)
    chain = np.broadcast_to(np.tri(nodes, dtype=bool), (batch, nodes, nodes))
    data |= {"tree_mask_BMX": chain, "length_B": np.full(batch, context, np.int32)}
    if "k_scale" in like:
        data |= {"k_scale": np.float32(1), "v_scale": np.float32(1)}

    def layer(carry, data, table):
        q, i = carry
        here = table + i % layers * pages.shape[0]
        return attend(**data, q_BMNH=q, page_table_BR=here), i + 1

    carry = data.pop("q_BMNH"), jnp.int32(0)
    return per_iteration(layer, carry, calls, data, table.astype(np.int32))[0]
