"""Losses and their gradients: in chunks, whole, and by finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial

from jax_eagle.config import ConfigError
from train.config import FEATURE_LOSSES, LOGIT_LOSSES, LossConfig
from train.loss import Heads, Positions, _favourite, distillation_loss

pytestmark = pytest.mark.usefixtures("quick_compiler")

B, T, J, D, E, U = 2, 7, 2, 8, 6, 20
KINDS = [(f, z) for f in FEATURE_LOSSES for z in LOGIT_LOSSES if (f, z) != ("none", "none")]


def draft_head(params, x):
    return x @ params["kernel"]


def teacher_head(kernel, x):
    return x @ kernel


def case(seed: int, config: LossConfig):
    """(head's parameters, positions, heads, scale) at random; a third of the weights is zero."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    weight = jnp.asarray(rng.integers(0, 3, (B, T, J)), jnp.float32)
    feature = None if config.feature == "none" else draw(B, T, D)
    positions = Positions(draw(B, T, J, D), feature, draw(B, T, E), weight)
    heads = Heads(Partial(draft_head), Partial(teacher_head, 2.0 * draw(E, U)))
    scale_J = 1.0 / jnp.maximum(jnp.sum(weight, axis=(0, 1)), 1.0)
    return {"kernel": draw(D, U)}, positions, heads, scale_J


def plain_loss(config: LossConfig, params, state, positions, heads, scale_J):
    """The same in one piece, from the definitions."""
    law = jax.nn.softmax(heads.teacher(positions.teacher))
    total = jnp.zeros(())
    for j in range(J):
        guess = jax.nn.softmax(heads.draft(params, state[:, :, j]))
        ratio = jnp.log(law) - jnp.log(guess)
        if config.logits == "top_k_kl":
            kth = jnp.sort(law, axis=-1)[..., -config.top_k][..., None]
            of_logits = jnp.sum(jnp.where(law >= kth, law * ratio, 0.0), axis=-1)
        else:
            of_logits = {
                "kl": lambda p, q, r: jnp.sum(p * r, axis=-1),
                "cross_entropy": lambda p, q, r: -jnp.sum(p * jnp.log(q), axis=-1),
                "reverse_kl": lambda p, q, r: -jnp.sum(q * r, axis=-1),
                "none": lambda p, q, r: jnp.zeros(p.shape[:-1]),
            }[config.logits](law, guess, ratio)
        of_features = jnp.zeros((B, T))
        if positions.feature is not None:
            size = jnp.abs(state[:, :, j] - positions.feature)
            if config.feature == "smooth_l1":
                size = jnp.where(size < 1, size**2 / 2, size - 0.5)
            of_features = size.mean(axis=-1)
        each = config.feature_weight * of_features + config.logits_weight * of_logits
        total += config.decay**j * scale_J[j] * jnp.sum(positions.weight[:, :, j] * each)
    return total


@functools.partial(jax.jit, static_argnums=0)
def chunked_with_gradient(config: LossConfig, params, state, positions, heads, scale_J):
    of = jax.value_and_grad(chunked, argnums=(1, 2))
    return of(config, params, state, positions, heads, scale_J)


@functools.partial(jax.jit, static_argnums=0)
def chunked(config: LossConfig, params, state, positions, heads, scale_J):
    positions = positions.replace(state=state)
    return distillation_loss(config, params, positions, heads, scale_J)[0]


@pytest.mark.parametrize("feature, logits", KINDS)
def test_in_chunks_and_whole(feature, logits):
    config = LossConfig(feature=feature, logits=logits, logits_weight=0.3, top_k=4, unroll=J)
    params, positions, heads, scale = case(0, config)
    arguments = params, positions.state, positions, heads, scale
    wanted, wanted_grads = jax.value_and_grad(plain_loss, argnums=(1, 2))(config, *arguments)
    for chunk in (3, 100):  # 3 does not divide T
        config = dataclasses.replace(config, chunk=chunk)
        value, grads = chunked_with_gradient(config, *arguments)
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.sampled_from(KINDS))
def test_gradient_against_finite_differences(seed, kinds):
    config = LossConfig(feature=kinds[0], logits=kinds[1], top_k=4, unroll=J, chunk=3)
    params, positions, heads, scale = case(seed, config)
    if kinds[0] == "l1":  # away from its kink
        positions = positions.replace(feature=positions.feature + 10.0)
    rng = np.random.default_rng(seed)
    where = params, positions.state
    along = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), where)

    def at(step: float):
        params, state = jax.tree.map(lambda x, d: x + step * d, where, along)
        return float(chunked(config, params, state, positions, heads, scale))

    _, grads = chunked_with_gradient(config, *where, positions, heads, scale)
    products = jax.tree.map(lambda g, d: float(jnp.vdot(g, d)), grads, along)
    slope = sum(jax.tree.leaves(products))
    assert slope == pytest.approx((at(2e-3) - at(-2e-3)) / 4e-3, rel=3e-2, abs=6e-3)


def test_metrics_are_sums_and_counts():
    config = LossConfig(unroll=J, logits="kl", logits_weight=0.5)
    params, positions, heads, scale = case(1, config)
    loss, metrics = distillation_loss(config, params, positions, heads, scale)
    np.testing.assert_allclose(metrics["loss"].count, jnp.sum(positions.weight, axis=(0, 1)))
    mean = {name: value.sum / value.count for name, value in metrics.items()}
    np.testing.assert_allclose(
        mean["loss"], mean["feature_loss"] + 0.5 * mean["logits_loss"], rtol=1e-5
    )
    np.testing.assert_allclose(loss, jnp.sum(mean["loss"] * jnp.asarray([1.0, 0.8])), rtol=1e-5)
    both = metrics["loss"] + metrics["loss"]
    np.testing.assert_allclose(both.sum / both.count, mean["loss"], rtol=1e-6)


def test_a_perfect_draft_agrees():
    config = LossConfig(unroll=J, logits="kl")
    params, positions, heads, scale = case(2, config)
    same = Heads(Partial(lambda head, params, x: head(x), heads.teacher), heads.teacher)
    state = jnp.repeat(positions.teacher[:, :, None], J, axis=2)
    positions = positions.replace(state=state, feature=positions.teacher)
    loss, metrics = distillation_loss(config, {}, positions, same, scale)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(metrics["agreement"].sum, metrics["agreement"].count)


def test_agreement_is_that_of_the_favourites():
    config = LossConfig(unroll=J, logits="kl")
    params, positions, heads, scale = case(10, config)  # a seed where some agree, in both passes
    _, metrics = distillation_loss(config, params, positions, heads, scale)
    favourite_BT = np.argmax(heads.teacher(positions.teacher), axis=-1)
    agree_BTJ = np.argmax(heads.draft(params, positions.state), axis=-1) == favourite_BT[..., None]
    expected_J = np.sum(np.where(agree_BTJ, positions.weight, 0), axis=(0, 1))
    assert np.all(expected_J > 0) and np.all(expected_J < metrics["agreement"].count)
    np.testing.assert_allclose(metrics["agreement"].sum, expected_J, rtol=1e-6)


def test_of_equal_favourites_the_first_counts_and_none_where_a_score_is_nan():
    scores = jnp.array([[[0.0, 2.0, 2.0], [1.0, 1.0, 0.0], [jnp.nan, 1.0, 0.0]]])
    np.testing.assert_array_equal(_favourite(scores), [[1, 0, -1]])


def test_what_weighs_nothing_may_be_anything():
    config = LossConfig(unroll=J)
    params, positions, heads, scale = case(3, config)
    silent = (positions.weight == 0)[..., None]
    wild = positions.replace(state=jnp.where(silent, 1e30, positions.state))
    for one, other in zip(
        jax.tree.leaves(distillation_loss(config, params, wild, heads, scale)),
        jax.tree.leaves(distillation_loss(config, params, positions, heads, scale)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"feature": "l3"}, "feature 'l3': expected smooth_l1, l1, none"),
        ({"logits": "mse"}, "logits 'mse': expected cross_entropy"),
        ({"feature": "none", "logits": "none"}, "nothing to minimise"),
        ({"unroll": 8}, "unroll 8: expected 1 to 7"),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**change)
