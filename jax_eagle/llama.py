"""The Llama target. One forward serves prefill, plain decoding and verification.

All three are a tree of M nodes hung under a committed prefix: a chain, the root alone, or the draft
tree. The forward returns the new keys and values instead of writing them; `cache.commit` does.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Num

from .attention import Attention, View
from .cache import KV, PagedCache
from .config import LlamaConfig
from .layers import Embed, Linear, RMSNorm, SwiGLU, rope_angles
from .moe import Experts
from .packing import BLOCKS, pack_params
from .placement import Placement
from .sharding import Backend
from .tokenizer import Tokenizer
from .tree import Tree, chain_tree


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)), or experts in its place.

    EAGLE-1 drafts drop the first norm.
    """

    config: LlamaConfig
    layer: int
    attention_norm: bool = True
    backend: Backend = Backend()

    @nn.compact
    def __call__(self, x_BMD, rope, view: View):
        c = self.config
        with jax.named_scope("attention"):
            h_BMD = x_BMD
            if self.attention_norm:
                h_BMD = RMSNorm(c.hidden_size, c.rms_norm_eps, name="attention_norm")(x_BMD)
            out_BMD, k, v = Attention(c, self.layer, self.backend, name="attention")(
                h_BMD, rope, view
            )
            x_BMD = self.backend.by_batch(x_BMD + out_BMD)
        with jax.named_scope("mlp"):
            h_BMD = RMSNorm(c.hidden_size, c.rms_norm_eps, name="mlp_norm")(x_BMD)
            if c.uses_experts(self.layer):
                h_BMD = Experts(c, self.backend, self.layer, name="moe")(h_BMD, view.live)
            else:
                stored = c.stored("mlp", self.layer)
                h_BMD = SwiGLU(c, None, stored, self.backend, name="mlp")(h_BMD)
            return self.backend.by_batch(x_BMD + h_BMD), k, v


class Llama(nn.Module):
    """Embedding, layers, final norm, head (tied or own)."""

    config: LlamaConfig
    backend: Backend = Backend()

    def setup(self):
        c = self.config
        self.embed = Embed(c.vocab_size, c.hidden_size, jnp.dtype(c.dtype), self.backend)
        self.layers = [DecoderLayer(c, i, backend=self.backend) for i in range(c.num_layers)]
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if not c.tie_embeddings:
            self.lm_head = Linear(
                (c.hidden_size,), (c.vocab_size,), ("embed", "vocab"), out_dtype=jnp.float32,
                stored=c.stored("head"), backend=self.backend,
            )  # fmt: skip

    def __call__(self, tokens_BM, view: View, taps: tuple[int, ...] = ()):
        x_BMD = self.embed(tokens_BM)
        rope = rope_angles(self.config, view.position)
        keys, values, tapped = [], [], []
        for i, layer in enumerate(self.layers):
            if i in taps:
                tapped.append(x_BMD)
            with jax.named_scope(f"layer_{i}"):
                x_BMD, k, v = layer(x_BMD, rope, view)
            keys.append(k)
            values.append(v)
        x_BMD = self.norm(x_BMD)
        features_BMF = jnp.concatenate(tapped, axis=-1) if taps else x_BMD
        new_kv = KV(k=jnp.stack(keys), v=jnp.stack(values))
        return x_BMD, features_BMF, new_kv

    def embed_tokens(self, tokens):
        return self.embed(tokens)

    def head(self, x):
        return self.embed.attend(x) if self.config.tie_embeddings else self.lm_head(x)

    def initialise(self, tokens_BM, view: View):
        """Touches every parameter once."""
        return self.head(self(tokens_BM, view)[0])


class TargetOutput(NamedTuple):
    """What one forward of the target returns."""

    x: Float[Array, "B M D"]
    """Final-norm states, the head's input."""
    features: Float[Array, "B M F"]
    """What the draft consumes: x for EAGLE, tapped residual streams for EAGLE-3."""
    new_kv: KV


class Target(struct.PyTreeNode):
    """Parameters of a Llama plus its static config and tokenizer: a pytree.

    `target.replace(params=new)` is a target of the same compiled programs.
    """

    params: Any
    config: LlamaConfig = struct.field(pytree_node=False)
    tokenizer: Tokenizer | None = struct.field(pytree_node=False, default=None)
    backend: Backend = struct.field(pytree_node=False, default=Backend())

    def __call__(
        self,
        tokens_BM: Int[Array, "B M"],
        tree: Tree,
        cache: PagedCache | None,
        taps: tuple[int, ...] = (),
        live_BM: Bool[Array, "B M"] | None = None,
    ) -> TargetOutput:
        """One forward of the M nodes of `tree` under the prefix in `cache` (None: no prefix).

        `taps` names layers whose incoming residual stream becomes the features (EAGLE-3); without
        taps the features are the final-norm states (EAGLE). `live_BM`: see `View.live`.
        """
        position_BM = tree.depth if cache is None else cache.length[:, None] + tree.depth
        view = View(position=position_BM, mask=tree.mask, cache=cache, live=live_BM)
        return TargetOutput(*self._apply(tokens_BM, view, taps))

    def _apply(self, *args, method: str | None = None) -> Any:
        module = Llama(self.config, self.backend)
        return module.apply({"params": self.params}, *args, method=method)

    def embed(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Token embeddings, which the draft shares."""
        return self._apply(tokens, method="embed_tokens")

    def head_columns(
        self, tokens_U: Int[Array, "U"]
    ) -> tuple[Num[Array, "D U"], Float[Array, "S U"] | None]:
        """The head for some tokens only, a reduced draft vocabulary: kernel and scales, if any."""
        if self.config.tie_embeddings:
            return jnp.take(self.params["embed"]["embedding"], tokens_U, axis=0).T, None
        head = self.params["lm_head"]
        scale = jnp.take(head["scale"], tokens_U, axis=1) if "scale" in head else None
        return jnp.take(head["kernel"], tokens_U, axis=1), scale

    def head(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits in float32, summed in float32: rounded to bfloat16 they would tie."""
        return self.backend.by_vocab(self._apply(x, method="head"))

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError where the checkpoint had none."""
        if self.tokenizer is None:
            raise ValueError("this target has no tokenizer: give prompts as token ids")
        return self.tokenizer

    @property
    def packed(self) -> bool:
        """Whether `pack` made blocks."""
        return any(BLOCKS in path for path in traverse_util.flatten_dict(self.params))

    def pack(self) -> "Target":
        """On a CPU, the target with its weights in blocks as well: faster, up to twice as large.

        On other backends, or spread over several devices, the target itself. See `packing`.
        """
        call = jnp.zeros((1, 1), jnp.int32), View(position=jnp.zeros((1, 1), jnp.int32))
        return self.replace(
            params=pack_params(Llama(self.config), self.params, *call, method="initialise")
        )

    def spread(self, mesh: Mesh, *, expert_parallel: bool = False) -> "Target":
        """The target with its parameters spread over the devices of `mesh` (see `sharding`).

        Args:
          expert_parallel: each device has some experts whole, not a share of every expert.

        Raises:
          ConfigError: heads, FFN, vocabulary or experts do not divide evenly.
        """
        backend = dataclasses.replace(self.backend, mesh=mesh, expert_parallel=expert_parallel)
        placement = target_placement(self.config, backend)
        return self.replace(
            params=placement.spread(self.params),
            config=placement.fitted(self.config),
            backend=backend,
        )

    def logits(self, tokens_BT: Sequence[Sequence[int]] | jax.Array) -> Float[Array, "B T V"]:
        """Plain full forward in float32 [B, T, V], without a cache: for parity checks."""
        return _full_logits(self.replace(tokenizer=None), jnp.asarray(tokens_BT, jnp.int32))


@jax.jit
def _full_logits(target: Target, tokens_BT):
    return target.head(target(tokens_BT, chain_tree(*tokens_BT.shape), cache=None).x)


def init_params(config: LlamaConfig, key: jax.Array) -> Any:
    """Random parameters of a Llama, as plain arrays (no partitioning boxes)."""
    return nn.unbox(_init(config, key))


def abstract_params(config: LlamaConfig) -> Any:
    """Shapes, dtypes and logical axes of the parameters; nothing is allocated."""
    return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


def target_placement(config: LlamaConfig, backend: Backend) -> Placement:
    """Where the parameters of a target lie; ConfigError if they do not divide over the mesh."""
    return Placement.of(config, functools.partial(abstract_params, config), backend)


def _init(config: LlamaConfig, key: jax.Array) -> Any:
    view = View(position=jnp.zeros((1, 1), jnp.int32))
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Llama(config).init(key, tokens, view, method="initialise")["params"]
