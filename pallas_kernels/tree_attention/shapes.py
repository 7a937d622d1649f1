"""Attention shapes of real models: what tests, benchmarks and the tuner share."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Heads of one attention layer, as its checkpoint's config.json gives them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads


SHAPES = {
    "llama-3.1-8b": AttentionShape(32, 8, 128),
    "llama-3.3-70b": AttentionShape(64, 8, 128),
    "llama-4-scout": AttentionShape(40, 8, 128),
    "llama-4-maverick": AttentionShape(40, 8, 128),
    "smollm2-135m": AttentionShape(9, 3, 64),
}

NODES = (1, 4, 16, 64)
"""Tree sizes: plain decoding, a chain of three, a small and a large tree."""

PAGE_SIZE = 64


def abstract_inputs(
    shape: AttentionShape,
    *,
    batch: int,
    nodes: int,
    context: int,
    dtype=jnp.bfloat16,
    kv_dtype=None,
    causal: bool = False,
    page_size: int = PAGE_SIZE,
) -> dict[str, jax.ShapeDtypeStruct | None]:
    """Arguments of `tree_attention` by name, without data; 8-bit pools come with scales."""
    K, H, R = shape.num_kv_heads, shape.head_dim, -(-context // page_size)
    kv_dtype = jnp.dtype(kv_dtype or dtype)
    tree = jax.ShapeDtypeStruct((batch, nodes, K, H), dtype)
    pool = jax.ShapeDtypeStruct((1 + batch * R, K, page_size, H), kv_dtype)
    inputs = {
        "q_BMNH": jax.ShapeDtypeStruct((batch, nodes, shape.num_heads, H), dtype),
        "k_tree_BXKH": tree, "v_tree_BXKH": tree, "k_pages_PKCH": pool, "v_pages_PKCH": pool,
        "page_table_BR": jax.ShapeDtypeStruct((batch, R), jnp.int32),
        "length_B": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "tree_mask_BMX":
            None if causal else jax.ShapeDtypeStruct((batch, nodes, nodes), jnp.bool_),
    }  # fmt: skip
    if kv_dtype.itemsize == 1:
        scale = jax.ShapeDtypeStruct((K,), jnp.float32)
        inputs |= {"k_scale": scale, "v_scale": scale}
    return inputs
