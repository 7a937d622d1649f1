"""Paged KV cache: flat page pools, written by `commit` alone.

The pools of all layers are one array [layers * pages, kv_heads, page_size, head_dim]; layer l uses
the ids `page_table + l * pages`. Page 0 of each layer is the trash page: table entries that nobody
reserved point there, and rows that must not be written go there. Nothing reads behind `length`, so
its content never matters (tests fill it with NaN).

Each rank of a mesh's data axis has pools, page ids and trash pages of its own, one rank's pools
behind the other's: functions that use page ids see those of one rank alone (`sharding.over_data`).
"""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from .config import LlamaConfig
from .sharding import data_size, page_sharding


class KV(struct.PyTreeNode):
    """Keys (RoPE applied) and values that a forward computed and nobody has committed yet."""

    k: Float[Array, "L B M K H"]
    v: Float[Array, "L B M K H"]

    def append(self, new: "KV") -> "KV":
        """Both sets of nodes, this one first."""
        return KV(*(jnp.concatenate(pair, axis=2) for pair in ((self.k, new.k), (self.v, new.v))))


class PagedCache(struct.PyTreeNode):
    """Committed keys and values of a batch of sequences."""

    k_pages: Float[Array, "L*P K C H"]
    v_pages: Float[Array, "L*P K C H"]
    page_table: Int[Array, "B R"]
    """Page ids of each sequence, without layer offset; 0 = the trash page = not reserved."""
    length: Int[Array, "B"]
    """Tokens of each sequence whose keys and values are in the pages."""
    num_layers: int = struct.field(pytree_node=False)

    @property
    def pages_per_layer(self) -> int:
        """P, trash page included."""
        return self.k_pages.shape[0] // self.num_layers

    @property
    def page_size(self) -> int:
        """C, tokens per page."""
        return self.k_pages.shape[2]

    def layer_table(self, layer: int) -> Int[Array, "B R"]:
        """The page table with the offset of one layer, as the attention kernels take it."""
        return self.page_table + layer * self.pages_per_layer


def init_cache(
    config: LlamaConfig,
    page_table_BR: Int[Array, "B R"],
    *,
    num_pages: int,
    page_size: int,
    mesh: Mesh | None = None,
) -> PagedCache:
    """An empty cache for `config` with `num_pages` pages a layer (page 0 is the trash page).

    On a mesh each rank of the data axis has that many.
    """
    num_pages *= config.num_layers * data_size(mesh)
    shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)
    device = None if mesh is None else page_sharding(mesh)
    return PagedCache(
        k_pages=jnp.zeros(shape, config.kv_dtype or config.dtype, device=device),
        v_pages=jnp.zeros(shape, config.kv_dtype or config.dtype, device=device),
        page_table=page_table_BR,
        length=jnp.zeros(page_table_BR.shape[0], jnp.int32),
        num_layers=config.num_layers,
    )


def cached_bytes(config: LlamaConfig) -> int:
    """Of one cached number."""
    return jnp.dtype(config.kv_dtype or config.dtype).itemsize


def token_bytes(config: LlamaConfig, mesh: Mesh | None = None) -> int:
    """Of one token's keys and values, in all layers, on each device that has it."""
    shape = data_size(mesh) * config.num_layers, config.num_kv_heads, 1, config.head_dim
    if mesh is not None:
        shape = page_sharding(mesh).shard_shape(shape)
    return 2 * cached_bytes(config) * math.prod(shape)


def as_cached(x: Float[Array, "*shape"], dtype: str | None) -> Float[Array, "*shape"]:
    """New keys or values as pages of `dtype` will hold them, in their own dtype.

    In one run a node reads its ancestors from the tree, in another from the pages: so what a tree
    attends to is rounded first. XLA may drop a conversion to fewer bits and back, so the rounding
    to e4m3 is spelt out: four significant bits, multiples of 2^-9 below 2^-6, at most 448.
    """
    if dtype is None:
        return x
    assert dtype == "float8_e4m3fn"
    x32 = jnp.clip(x.astype(jnp.float32), -448.0, 448.0)
    normal = jax.lax.reduce_precision(x32, exponent_bits=8, mantissa_bits=3)
    small = jnp.round(x32 * 2.0**9) * 2.0**-9
    return jnp.where(jnp.abs(x32) < 2.0**-6, small, normal).astype(x.dtype)


def commit(
    cache: PagedCache, new_kv: KV, path_BA: Int[Array, "B A"], count_B: Int[Array, "B"]
) -> PagedCache:
    """Writes nodes path[:count] at positions length..length+count-1 and adds count to length.

    Args:
      cache: donated by the caller's jit, so that the scatter happens in place.
      new_kv: keys and values of all nodes of the forward, [L, B, M, K, H].
      path_BA: node indices in order of position; what lies at or behind count is ignored.
      count_B: rows to keep: num_accepted + 1 when verifying, the real tokens of a prefill chunk,
        0 for an inactive sequence. The pages must have been reserved. It has to depend on the
        forward's output (`order_after`): the new keys and values of the last layer do not need that
        layer's attention, and a write that might come before the read makes XLA copy the cache.
    """
    L, B, _, K, H = new_kv.k.shape
    A = path_BA.shape[1]
    step_1A = jnp.arange(A, dtype=jnp.int32)[None, :]
    keep_BA = step_1A < count_B[:, None]
    position_BA = cache.length[:, None] + step_1A
    last_page = cache.page_table.shape[1] - 1
    page_BA = jnp.take_along_axis(
        cache.page_table, jnp.minimum(position_BA // cache.page_size, last_page), axis=1
    )
    trash_slot_BA = jnp.reshape(jnp.arange(B * A, dtype=jnp.int32), (B, A)) % cache.page_size
    page_BA = jnp.where(keep_BA, page_BA, 0)
    slot_BA = jnp.where(keep_BA, position_BA % cache.page_size, trash_slot_BA)

    page_LBA = page_BA[None] + cache.pages_per_layer * jnp.arange(L, dtype=jnp.int32)[:, None, None]
    slot_LBA = jnp.broadcast_to(slot_BA[None], page_LBA.shape)
    take_LBAKH = jnp.broadcast_to(path_BA[None, :, :, None, None], (L, B, A, K, H))

    def write(pages, new):
        # Every dropped row has a trash slot of its own only while they all fit into one page.
        return pages.at[page_LBA, :, slot_LBA].set(
            jnp.take_along_axis(new, take_LBAKH, axis=2).astype(pages.dtype),
            mode="promise_in_bounds",
            unique_indices=B * A <= cache.page_size,
        )

    return cache.replace(
        k_pages=write(cache.k_pages, new_kv.k),
        v_pages=write(cache.v_pages, new_kv.v),
        length=cache.length + count_B,
    )


def gather(cache: PagedCache) -> KV:
    """The cache as dense arrays [L, B, R * C, K, H], for tests and for moving a sequence."""

    def dense(pages: jax.Array) -> jax.Array:
        per_layer = jnp.reshape(pages, (cache.num_layers, -1, *pages.shape[1:]))
        rows_LBRKCH = jnp.take(per_layer, cache.page_table, axis=1)
        L, B, R, K, C, H = rows_LBRKCH.shape
        return jnp.reshape(jnp.moveaxis(rows_LBRKCH, 3, 4), (L, B, R * C, K, H))

    return KV(k=dense(cache.k_pages), v=dense(cache.v_pages))
