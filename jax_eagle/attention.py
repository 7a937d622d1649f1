"""Grouped-query attention of a decoder layer, over a paged prefix and the nodes of a tree.

Llama 4 has two kinds of layers (arXiv 2508.08192 on iRoPE): rotary ones see a chunk of positions,
the others do not rotate and see all. What a layer does not see is cut by the position of a node,
its prefix length + depth, so a tree may lie across the border of two chunks.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.tree_attention import tree_attention

from .cache import KV, PagedCache, as_cached
from .config import LlamaConfig
from .layers import Linear, apply_rope, scale_queries, unit_rms
from .sharding import TENSOR, Backend


class View(struct.PyTreeNode):
    """What the M nodes of one forward see: a committed prefix, scratch nodes, themselves."""

    position: Int[Array, "B M"]
    """prefix length + depth; RoPE, chunks and query factors use nothing else."""
    mask: Bool[Array, "B M X"] | None = None
    """Ancestor-or-self over scratch nodes and new nodes; None: causal."""
    cache: PagedCache | None = None
    first: Int[Array, "B M"] | None = None
    """First prefix position a node sees; None: all."""
    scratch: KV | None = None
    """Earlier nodes of the same tree that are not committed (the draft's levels)."""
    live: Bool[Array, "B M"] | None = None
    """Nodes that somebody asks for; None: all. Others (of finished sequences, or behind the end of
    a prompt) read no experts, and what becomes of them is not defined."""

    def in_chunk(self, chunk: int) -> "View":
        """The same without positions below each node's own chunk.

        The keys that a node sees have consecutive positions, in this order, and the last one is
        its own: so the keys seen behind a key tell its distance, in trees and in packed rows alike.
        """
        M, S = self.position.shape[1], 0 if self.scratch is None else self.scratch.k.shape[2]
        inside_BM = self.position % chunk  # positions of the chunk before the node
        mask_BMX = jnp.tril(jnp.ones((1, M, S + M), bool), S) if self.mask is None else self.mask
        seen_BMX = jnp.cumsum(mask_BMX, axis=2, dtype=jnp.int32)
        distance_BMX = seen_BMX[:, :, -1:] - seen_BMX
        first_BM = self.position - inside_BM
        return self.replace(
            mask=mask_BMX & (distance_BMX <= inside_BM[:, :, None]),
            first=first_BM if self.first is None else jnp.maximum(self.first, first_BM),
        )


class Attention(nn.Module):
    """Projections and RoPE around `tree_attention`; returns the new keys and values as well."""

    config: LlamaConfig
    layer: int
    backend: Backend = Backend()
    input_width: int | None = None
    """Of what q, k and v are made from; None: the hidden size."""

    @nn.compact
    def __call__(
        self, x_BMD: Float[Array, "B M D"], rope, view: View
    ) -> tuple[Float[Array, "B M D"], jax.Array, jax.Array]:
        c = self.config
        D, N, K, H = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        inputs = (self.input_width or D,)
        linear = functools.partial(
            Linear,
            use_bias=c.attention_bias,
            stored=c.stored("attention", self.layer),
            backend=self.backend,
        )
        with jax.named_scope("qkv"):
            q_BMNH = linear(inputs, (N, H), ("embed", "heads", "head_dim"), name="q")(x_BMD)
            k_BMKH, v_BMKH = (
                linear(inputs, (K, H), ("embed", "kv_heads", "head_dim"), name=n)(x_BMD)
                for n in "kv"
            )
            q_BMNH, k_BMKH = self._encode(q_BMNH, k_BMKH, rope, view.position)
            k_BMKH, v_BMKH = (as_cached(x, c.kv_dtype) for x in (k_BMKH, v_BMKH))
        with jax.named_scope("tree_attention"):
            out_BMNH = self._attend(q_BMNH, k_BMKH, v_BMKH, view)
        with jax.named_scope("output"):
            out_BMD = linear((N, H), (D,), ("heads", "head_dim", "embed"), name="o")(out_BMNH)
        return out_BMD, k_BMKH, v_BMKH

    def _encode(self, q_BMNH, k_BMKH, rope, position_BM):
        """Queries and keys that know their positions."""
        c, own = self.config, self.config.llama4
        if own is not None and not c.uses_rope(self.layer):
            return scale_queries(own, q_BMNH, position_BM), k_BMKH
        q_BMNH, k_BMKH = apply_rope(q_BMNH, rope), apply_rope(k_BMKH, rope)
        if own is not None and own.qk_norm:
            return unit_rms(q_BMNH, c.rms_norm_eps), unit_rms(k_BMKH, c.rms_norm_eps)
        return q_BMNH, k_BMKH

    def _attend(self, q_BMNH, k_BMKH, v_BMKH, view: View):
        own = self.config.llama4
        if own is not None and own.chunk is not None and self.config.uses_rope(self.layer):
            view = view.in_chunk(own.chunk)
        k_tree, v_tree = k_BMKH, v_BMKH
        if view.scratch is not None:
            k_tree = jnp.concatenate([view.scratch.k[self.layer], k_BMKH], axis=1)
            v_tree = jnp.concatenate([view.scratch.v[self.layer], v_BMKH], axis=1)
        if view.cache is not None:
            pages = view.cache.k_pages, view.cache.v_pages, view.cache.layer_table(self.layer)
            length_B = view.cache.length
        else:
            B, _, K, H = k_BMKH.shape
            empty = jnp.zeros((1, K, 1, H), k_BMKH.dtype)
            pages = empty, empty, jnp.zeros((B, 0), jnp.int32)
            length_B = jnp.zeros(B, jnp.int32)
        attend = functools.partial(
            tree_attention,
            implementation=self.backend.attention,
            interpret=self.backend.interpret,
        )
        # XLA cuts the reference by itself; what it cannot see into runs on each device.
        if self.backend.mesh is not None and self.backend.attention != "reference":
            attend = _over_heads(attend, self.backend)
        return attend(q_BMNH, k_tree, v_tree, *pages, length_B, view.mask, first_BM=view.first)


def _over_heads(attend, backend: Backend):
    """`attend` on each device of the mesh, for the heads that lie there. No cache scales yet."""
    heads, pages = P(None, None, TENSOR, None), P(None, TENSOR, None, None)

    def call(*arrays, first_BM):
        return backend.on_each_device(
            lambda first_BM, *arrays: attend(*arrays, first_BM=first_BM),
            (P(), heads, heads, heads, pages, pages, P(), P(), P()),
            heads,
            check_vma=False,  # the kernels do not say how their outputs vary
        )(first_BM, *arrays)

    return call
