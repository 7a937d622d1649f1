"""The frozen target in the form that training wants: one scan over its stacked layers.

A program with one layer in it compiles in seconds for any depth, and its memory is that of one
layer. Decoding wants the layers apart (`jax_eagle.llama`): `unstacked` gives that form for
evaluation, as a copy that lives as long as its evaluation.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jax_eagle import Target
from jax_eagle.attention import View
from jax_eagle.config import ConfigError, LlamaConfig
from jax_eagle.layers import RMSNorm, rope_angles
from jax_eagle.llama import DecoderLayer
from jax_eagle.unroll import Text


class Teaching(NamedTuple):
    """What the target says about a text."""

    features: Float[Array, "B T F"]
    """What the draft takes."""
    x: Float[Array, "B T D"]
    """What the target's head takes; without taps the same as the features."""


class Teacher(struct.PyTreeNode):
    """A target whose layers are stacked: a pytree of parameters plus its static target."""

    layers: Any
    """Parameters of groups of layers, stacked along a leading axis."""
    base: Target
    """The target without its layers: embedding, final norm and head."""

    @classmethod
    def of(cls, target: Target) -> "Teacher":
        """Stacks a target's layers; the target's own arrays are not needed afterwards.

        Raises:
          ConfigError: a target with MoE layers.
        """
        if target.config.moe is not None:
            layers = list(target.config.moe.layers)
            raise ConfigError(
                f"a target with MoE layers {layers}: expected a dense one to learn from"
            )
        names = [f"layers_{i}" for i in range(target.config.num_layers)]
        size = period(target.config)
        groups = [
            {f"layers_{i}": target.params[name] for i, name in enumerate(names[begin:][:size])}
            for begin in range(0, len(names), size)
        ]
        rest = {name: value for name, value in target.params.items() if name not in names}
        return cls(_stack(groups), target.replace(params=rest, tokenizer=None))

    def unstacked(self) -> Target:
        """The target with its layers apart."""
        config = self.base.config
        groups = _split(self.layers, config.num_layers // period(config))
        layers = [group[f"layers_{i}"] for group in groups for i in range(period(config))]
        apart = {f"layers_{i}": layer for i, layer in enumerate(layers)}
        return self.base.replace(params=self.base.params | apart)

    def __call__(self, text: Text, taps: tuple[int, ...] = ()) -> Teaching:
        """Features of packed rows; no segment sees another. Nothing flows back."""
        config, backend = self.base.config, self.base.backend
        view = View(text.position, ancestors_of_text(text))
        rope = rope_angles(config, text.position)
        size = period(config)

        def group(carry, layers):
            x_BTD, tapped, first = carry
            for i in range(size):
                tapped = tuple(
                    jnp.where(first + i == tap, x_BTD, kept)
                    for tap, kept in zip(taps, tapped, strict=True)
                )
                module: Any = DecoderLayer(config, i, backend=backend)
                x_BTD, _, _ = module.apply({"params": layers[f"layers_{i}"]}, x_BTD, rope, view)
            return (x_BTD, tapped, first + size), None

        x_BTD = self.base.embed(text.tokens)
        carry = x_BTD, tuple(jnp.zeros_like(x_BTD) for _ in taps), jnp.int32(0)
        (x_BTD, tapped, _), _ = jax.lax.scan(group, carry, self.layers)
        norm: Any = RMSNorm(config.hidden_size, config.rms_norm_eps)
        x_BTD = norm.apply({"params": self.base.params["norm"]}, x_BTD)
        features_BTF = jnp.concatenate(tapped, axis=-1) if taps else x_BTD
        return jax.lax.stop_gradient(Teaching(features_BTF, x_BTD))


def ancestors_of_text(text: Text) -> jax.Array:
    """What each token of a text sees in the target, [B, T, T]."""
    T = text.tokens.shape[1]
    same_BTT = text.segment[:, :, None] == text.segment[:, None, :]
    return same_BTT & jnp.tril(jnp.ones((T, T), bool))[None]


def period(config: LlamaConfig) -> int:
    """Layers after which the kinds of layers repeat: the unit of the scan."""
    kinds = [
        (config.uses_rope(i), config.stored("attention", i), config.stored("mlp", i))
        for i in range(config.num_layers)
    ]
    sizes = (n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0)
    return next(n for n in sizes if kinds[:n] * (len(kinds) // n) == kinds)


@jax.jit
def _stack(groups: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *groups)


@functools.partial(jax.jit, static_argnames="count")
def _split(stacked: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]
