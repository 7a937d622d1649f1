"""The distillation loss: smooth-L1 on features plus soft cross entropy on the next token.

EAGLE's regression of the target's feature keeps the draft's own output usable as its next input;
the cross entropy through the target's head says which errors matter (arXiv 2508.08192: weights 1
and 0.1). With a reduced draft vocabulary the target's law is restricted to it and renormalised,
which is what the draft proposes from. Teacher logits come from the features through the same head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class Metrics:
    """Weighted means over the positions of a batch."""

    loss: Float[Array, ""]
    feature_loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    kl: Float[Array, ""]
    """Target law against draft law, both over the draft vocabulary."""
    top1: Float[Array, ""]
    """Share of positions where both laws have the same favourite in the draft vocabulary."""


def distillation_loss(
    x_BTD: Float[Array, "B T D"],
    features_BTD: Float[Array, "B T D"],
    weight_BT: Float[Array, "B T"],
    head: Callable[[jax.Array], jax.Array],
    *,
    ce_weight: float,
    chunk: int = 1024,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of draft outputs against target features.

    Args:
      x_BTD: the draft's outputs, estimates of `features_BTD`.
      head: features -> float32 logits over the draft vocabulary.
      chunk: positions that go through the head at once; it bounds the memory of logits.
    """
    weight_N = jnp.reshape(weight_BT, -1)
    x_ND = jnp.reshape(x_BTD, (weight_N.size, -1))
    features_ND = jnp.reshape(features_BTD, x_ND.shape).astype(x_ND.dtype)

    def of_chunk(part):
        x, features, weight = part
        return jnp.stack([jnp.sum(weight * term) for term in _terms(x, features, head)])

    parts = _chunks((x_ND, features_ND, weight_N), chunk)
    if len(parts[0]) > 1:
        of_chunk = jax.checkpoint(of_chunk)  # one chunk of logits at a time in the backward pass
    sums = jnp.sum(jax.lax.map(of_chunk, parts), axis=0) / jnp.maximum(jnp.sum(weight_N), 1e-6)
    feature_loss, cross_entropy, kl, top1 = sums
    loss = feature_loss + ce_weight * cross_entropy
    return loss, Metrics(loss, feature_loss, cross_entropy, kl, top1)


def smooth_l1(difference: jax.Array) -> jax.Array:
    """Quadratic below 1, linear above."""
    size = jnp.abs(difference)
    return jnp.where(size < 1.0, 0.5 * size * size, size - 0.5)


def _terms(x_ND, features_ND, head):
    """(feature loss, cross entropy, KL, agreement) of each position."""
    difference_ND = x_ND.astype(jnp.float32) - features_ND.astype(jnp.float32)
    teacher_NU = jax.lax.stop_gradient(jax.nn.log_softmax(head(features_ND)))
    draft_NU = jax.nn.log_softmax(head(x_ND))
    probs_NU = jnp.exp(teacher_NU)
    cross_entropy_N = -jnp.sum(probs_NU * draft_NU, axis=-1)
    entropy_N = -jnp.sum(probs_NU * teacher_NU, axis=-1)
    agree_N = jnp.argmax(teacher_NU, axis=-1) == jnp.argmax(draft_NU, axis=-1)
    return (
        jnp.mean(smooth_l1(difference_ND), axis=-1),
        cross_entropy_N,
        jax.lax.stop_gradient(cross_entropy_N - entropy_N),
        agree_N.astype(jnp.float32),
    )


def _chunks(arrays, chunk: int):
    """Arrays [N, ...] as [chunks, chunk, ...], padded with zeros (of weight zero)."""
    size = min(chunk, arrays[0].shape[0])
    padding = -arrays[0].shape[0] % size

    def split(x):
        padded = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return jnp.reshape(padded, (-1, size, *x.shape[1:]))

    return jax.tree.map(split, arrays)
