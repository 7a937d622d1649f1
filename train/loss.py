"""What a draft is trained on: how far its states and its laws are from the target's.

The feature loss keeps the draft's own output usable as its next input; the loss on logits says
which errors matter (arXiv 2508.08192: weights 1 and 0.1; EAGLE-3 has the second alone). With a
reduced draft vocabulary the target's law is restricted to it and renormalised, which is what the
draft proposes from.

Logits of all positions never exist at once. `chunked_sum` goes through the positions in chunks, and
differentiates each chunk while its logits are there: the gradient costs the three products of a
chunk (teacher, draft, and back), none of them twice, and [chunk, vocabulary] is all the memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from .config import LossConfig


class Mean(struct.PyTreeNode):
    """A weighted mean in two parts, so that means of parts can be joined."""

    sum: Float[Array, "..."]
    count: Float[Array, "..."]

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.sum + other.sum, self.count + other.count)


class Positions(struct.PyTreeNode):
    """Positions of packed rows under all passes of the draft."""

    state: Float[Array, "B T J D"]
    """The draft's states, pass by pass; these alone (and a head of the draft's) are trained."""
    feature: Float[Array, "B T D"] | None
    """The target's states that they estimate; None without a feature loss."""
    teacher: Float[Array, "B T E"]
    """What the target's head takes."""
    weight: Float[Array, "B T J"]
    """Loss weights, zero where a pass has nothing to say."""


class Heads(struct.PyTreeNode):
    """From states to logits over the draft vocabulary."""

    draft: Callable[[Any, jax.Array], jax.Array]
    """(its trained parameters, states) -> logits; a pytree itself (`jax.tree_util.Partial`)."""
    teacher: Callable[[jax.Array], jax.Array]


def distillation_loss(
    config: LossConfig, params: Any, positions: Positions, heads: Heads, scale_J: jax.Array
) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """The weighted sum of losses over positions and passes, and figures of each pass.

    Args:
      params: the head's trained parameters; an empty dict where the head is the target's.
      scale_J: what the sums of each pass are multiplied with, 1 / (weights in the whole batch).

    Returns:
      The loss, and (sum, count) of "loss", "feature_loss", "logits_loss" and of the "agreement" of
      both laws' favourites within the draft vocabulary, [J] each.
    """

    def terms(params, state_BCJD, rest):
        positions, heads, scale_J = rest
        teacher_BCU = jax.nn.log_softmax(heads.teacher(positions.teacher))
        favourite_BC = _favourite(teacher_BCU)
        sums = []
        for j in range(config.unroll):
            x_BCD, weight_BC = state_BCJD[:, :, j], positions.weight[:, :, j]
            draft_BCU = jax.nn.log_softmax(heads.draft(params, x_BCD))
            logits_BC = logits_loss(config, teacher_BCU, draft_BCU)
            agree_BC = (favourite_BC == _favourite(draft_BCU)) & (favourite_BC >= 0)
            feature_BC = jnp.zeros_like(logits_BC)
            if positions.feature is not None:
                feature_BC = feature_loss(config, x_BCD, positions.feature)
            loss_BC = config.feature_weight * feature_BC + config.logits_weight * logits_BC
            each = loss_BC, feature_BC, logits_BC, agree_BC.astype(jnp.float32)
            # A weight of zero must silence whatever the position holds.
            parts = [jnp.sum(jnp.where(weight_BC > 0, weight_BC * x, 0.0)) for x in each]
            sums.append(jnp.stack([*parts, jnp.sum(weight_BC)]))
        sums_JS = jnp.stack(sums)
        return jnp.sum(sums_JS[:, 0] * scale_J), sums_JS

    decay_J = config.decay ** jnp.arange(config.unroll, dtype=jnp.float32)
    rest = positions.replace(state=None), heads, scale_J * decay_J
    of_chunks: Any = chunked_sum
    loss, sums_JS = of_chunks(terms, config.chunk, params, positions.state, rest)
    names = "loss", "feature_loss", "logits_loss", "agreement"
    return loss, {name: Mean(sums_JS[:, i], sums_JS[:, -1]) for i, name in enumerate(names)}


def _favourite(scores_BCU: jax.Array) -> jax.Array:
    """The best token, of equals the first; -1 where a score is NaN.

    An argmax is the same but for NaN, and takes several times as long on a CPU.
    """
    scores_BCU = jax.lax.stop_gradient(scores_BCU)
    is_best_BCU = scores_BCU == jnp.max(scores_BCU, axis=-1, keepdims=True)
    token_U = jnp.arange(scores_BCU.shape[-1], dtype=jnp.int32)
    first_BC = jnp.min(jnp.where(is_best_BCU, token_U[None, None], token_U.size), axis=-1)
    return jnp.where(first_BC < token_U.size, first_BC, -1)


def feature_loss(config: LossConfig, x_BCD, feature_BCD) -> Float[Array, "B C"]:
    """Distance of states from the target's, a mean over channels."""
    size = jnp.abs(x_BCD.astype(jnp.float32) - feature_BCD.astype(jnp.float32))
    if config.feature == "smooth_l1":  # quadratic below 1, linear above
        size = jnp.where(size < 1.0, 0.5 * size * size, size - 0.5)
    return jnp.mean(size, axis=-1)


def logits_loss(config: LossConfig, teacher_BCU, draft_BCU) -> Float[Array, "B C"]:
    """How far the draft's law is from the target's; both are log-probabilities in float32.

    cross_entropy  of the draft under the target's law
    kl             the same less the target's entropy
    reverse_kl     the other way round: the draft must not say what the target would not
    top_k_kl       the terms of `kl` that belong to the target's `top_k` favourites
    """
    if config.logits == "none":
        return jnp.zeros(teacher_BCU.shape[:-1])
    if config.logits == "reverse_kl":
        return jnp.sum(jnp.exp(draft_BCU) * (draft_BCU - teacher_BCU), axis=-1)
    if config.logits == "cross_entropy":
        return -jnp.sum(jnp.exp(teacher_BCU) * draft_BCU, axis=-1)
    if config.logits == "top_k_kl":
        teacher_BCU, favourite_BCk = jax.lax.top_k(teacher_BCU, config.top_k)
        draft_BCU = jnp.take_along_axis(draft_BCU, favourite_BCk, axis=-1)
    return jnp.sum(jnp.exp(teacher_BCU) * (teacher_BCU - draft_BCU), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_sum(
    terms: Callable, chunk: int, params: Any, state_BTJD: jax.Array, rest: Any
) -> tuple[jax.Array, Any]:
    """Sums of `terms` over chunks of positions; differentiable by params and state alone.

    Args:
      terms: (params, state [B, C, J, D], rest of the chunk) -> (scalar, further sums).
      chunk: positions of each row that go through `terms` at once.
      rest: (arrays [B, T, ...], anything else...): the first is cut like the state.
    """
    return _sums(terms, chunk, params, state_BTJD, rest, with_gradient=False)[0]


def _sums(terms, chunk: int, params, state_BTJD, rest, *, with_gradient: bool):
    by_position, *whole = rest
    T = state_BTJD.shape[1]
    size = min(chunk, T)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(jnp.reshape(x, (x.shape[0], -1, size, *x.shape[2:])), 1, 0)

    def of_chunk(part) -> Any:
        state, rest = part[0], (part[1], *whole)
        if not with_gradient:
            return (terms(params, state, rest), {}), {}
        of = jax.value_and_grad(terms, argnums=(0, 1), has_aux=True)
        values, (d_params, d_state) = of(params, state, rest)
        d_params = jax.tree.map(lambda d: d.astype(jnp.float32), d_params)  # many chunks are added
        return (values, d_params), d_state

    def step(carry, part):
        sums, d_state = of_chunk(part)
        return jax.tree.map(jnp.add, carry, sums), d_state

    parts = jax.tree.map(split, (state_BTJD, by_position))
    shapes, _ = jax.eval_shape(of_chunk, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (values, d_params), d_parts = jax.lax.scan(step, zeros, parts)
    if not with_gradient:
        return values, None
    d_params = jax.tree.map(lambda d, x: d.astype(x.dtype), d_params, params)
    joined = jnp.moveaxis(d_parts, 0, 1)
    d_state = jnp.reshape(joined, (joined.shape[0], -1, *joined.shape[3:]))[:, :T]
    return values, (d_params, d_state)


def _forward(terms, chunk: int, params, state_BTJD, rest):
    return _sums(terms, chunk, params, state_BTJD, rest, with_gradient=True)


def _backward(terms, chunk: int, gradients, cotangents):
    factor = cotangents[0]
    d_params, d_state = jax.tree.map(lambda d: d * factor.astype(d.dtype), gradients)
    return d_params, d_state, None


chunked_sum.defvjp(_forward, _backward)
