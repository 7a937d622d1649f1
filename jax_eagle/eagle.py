"""The draft networks: EAGLE and EAGLE-3.

EAGLE (arXiv 2401.15077; several dense layers and an output norm as in arXiv 2508.08192): FC over
(embedding of a token, feature before it), then decoder layers. The output estimates the target's
next feature: the target's own head turns it into logits, and the next pass takes it as its feature.

EAGLE-3 (arXiv 2503.01840): FC over tapped residual streams gives a state; the attention of the
first layer reads (normed embedding, normed state) side by side. The output is the next pass's
state, which skips FC, and a norm and a head of the draft's own turn it into logits.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .attention import Attention, View
from .cache import KV
from .config import DraftConfig
from .layers import Embed, Linear, RMSNorm, SwiGLU, rope_angles
from .llama import DecoderLayer
from .sharding import Backend


class EagleDraft(nn.Module):
    """The network of a draft; embedding and head are the target's unless the config says own."""

    config: DraftConfig
    backend: Backend = Backend()

    def setup(self):
        c, layer = self.config, self.config.layer
        D = layer.hidden_size
        num_inputs = c.feature_width if c.is_eagle3 else D + c.feature_width
        self.fc = Linear((num_inputs,), (D,), ("feature", "embed"), c.fc_bias)
        if c.feature_norm == "joint":
            self.feature_norm = RMSNorm(c.feature_width, layer.rms_norm_eps)
        elif c.feature_norm == "each":
            width = c.feature_width // len(c.taps)
            self.feature_norms = [RMSNorm(width, layer.rms_norm_eps) for _ in c.taps]
        first = Eagle3Layer(c, self.backend) if c.is_eagle3 else self._layer(0, c.input_norm)
        self.layers = [first, *(self._layer(i, True) for i in range(1, layer.num_layers))]
        if c.is_eagle3 or c.output_norm:
            self.norm = RMSNorm(D, layer.rms_norm_eps)
        if c.own_embedding:
            self.embed = Embed(layer.vocab_size, D, jnp.dtype(layer.dtype), self.backend)
        if c.own_head:
            num_tokens = c.draft_vocab_size or layer.vocab_size
            self.lm_head = Linear(
                (D,), (num_tokens,), ("embed", "vocab"), out_dtype=jnp.float32,
                stored=layer.stored("head"), backend=self.backend,
            )  # fmt: skip

    def _layer(self, index: int, attention_norm: bool) -> DecoderLayer:
        return DecoderLayer(self.config.layer, index, attention_norm, self.backend)

    def __call__(self, embeds_BMD, features_BMF, view: View):
        """(state [B, M, D] for the next pass and for the head, new KV).

        Features are the target's, or the states of an earlier pass of the draft [B, M, D].
        """
        features_BMF = features_BMF.astype(embeds_BMD.dtype)
        rope = rope_angles(self.config.layer, view.position)
        with jax.named_scope("fc"):
            x_BMD = self._first_state(embeds_BMD, features_BMF)
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            inputs = (x_BMD, embeds_BMD) if self.config.is_eagle3 and i == 0 else (x_BMD,)
            with jax.named_scope(f"draft_layer_{i}"):
                x_BMD, k, v = layer(*inputs, rope, view)
            keys.append(k)
            values.append(v)
        if self.config.output_norm:
            x_BMD = self.norm(x_BMD)
        return x_BMD, KV(k=jnp.stack(keys), v=jnp.stack(values))

    def _first_state(self, embeds_BMD, features_BMF):
        c = self.config
        if not c.is_eagle3:
            features_BMF = jnp.concatenate([embeds_BMD, features_BMF], axis=-1)
        elif features_BMF.shape[-1] != c.feature_width:
            return features_BMF
        if c.feature_norm == "joint":
            features_BMF = self.feature_norm(features_BMF)
        elif c.feature_norm == "each":
            parts = jnp.split(features_BMF, len(c.taps), axis=-1)
            normed = [norm(x) for norm, x in zip(self.feature_norms, parts, strict=True)]
            features_BMF = jnp.concatenate(normed, axis=-1)
        # Or the cut of FC's input spreads to the features and the target's residual stream.
        return self.backend.by_batch(self.fc(self.backend.by_batch(features_BMF)))

    def embed_tokens(self, tokens):
        """Of the draft's own embedding."""
        return self.embed(tokens)

    def before_head(self, x):
        """What the head takes, from a state."""
        return x if self.config.output_norm or not self.config.is_eagle3 else self.norm(x)

    def head(self, x):
        """Float32 logits over the draft vocabulary, by the draft's own head."""
        return self.lm_head(self.before_head(x))

    def initialise(self, embeds_BMD, features_BMF, view: View):
        """Touches every parameter once."""
        x_BMD, _ = self(embeds_BMD, features_BMF, view)
        x_BMD = self.before_head(x_BMD)
        if self.config.own_embedding:
            x_BMD = x_BMD + self.embed(jnp.zeros(x_BMD.shape[:2], jnp.int32))
        return self.lm_head(x_BMD) if self.config.own_head else x_BMD


class Eagle3Layer(nn.Module):
    """The first layer of an EAGLE-3 draft."""

    config: DraftConfig
    backend: Backend = Backend()

    @nn.compact
    def __call__(self, x_BMD, embeds_BMD, rope, view: View) -> Any:
        c = self.config.layer

        def norm(name, x):
            return RMSNorm(c.hidden_size, c.rms_norm_eps, name=name)(x)

        with jax.named_scope("attention"):
            state_BMD = norm("hidden_norm", x_BMD)
            pair = jnp.concatenate([norm("attention_norm", embeds_BMD), state_BMD], axis=-1)
            attention = Attention(
                c, 0, self.backend, input_width=2 * c.hidden_size, name="attention"
            )
            out_BMD, k, v = attention(pair, rope, view)
            residual_BMD = state_BMD if self.config.norm_before_residual else x_BMD
            x_BMD = self.backend.by_batch(residual_BMD + out_BMD)
        with jax.named_scope("mlp"):
            h_BMD = norm("mlp_norm", x_BMD)
            mlp = SwiGLU(c, None, c.stored("mlp", 0), self.backend, name="mlp")
            return self.backend.by_batch(x_BMD + mlp(h_BMD)), k, v


def init_draft_params(config: DraftConfig, key: jax.Array) -> Any:
    """Random parameters of a draft, as plain arrays."""
    return nn.unbox(_init(config, key))


def abstract_draft_params(config: DraftConfig) -> Any:
    """Shapes, dtypes and logical axes of the parameters; nothing is allocated."""
    return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


def _init(config: DraftConfig, key: jax.Array) -> Any:
    variables = EagleDraft(config).init(key, *smallest_call(config), method="initialise")
    return variables["params"]


def smallest_call(config: DraftConfig):
    """Arguments of EagleDraft for one pair."""
    embeds = jnp.zeros((1, 1, config.layer.hidden_size), config.layer.dtype)
    features = jnp.zeros((1, 1, config.feature_width), config.layer.dtype)
    return embeds, features, View(position=jnp.zeros((1, 1), jnp.int32))
