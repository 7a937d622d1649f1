"""Sampling: the processed law against a slow one in Hugging Face's order, and the random keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from jax_eagle.sampling import (
    Purpose,
    Sampling,
    SamplingParams,
    draw,
    draw_key,
    gumbel,
    is_defined,
    processed_scores,
    restrict,
    uniform,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")

B, M, V = 3, 2, 11

jitted_scores = jax.jit(processed_scores)
jitted_draw = jax.jit(draw)

params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]) | st.floats(0.01, 5),
    top_p=st.just(1.0) | st.floats(0.01, 1),
    top_k=st.integers(-1, V + 3),
    min_p=st.just(0.0) | st.floats(0, 1),
)
ties = st.sampled_from([-1.5, -1.0, 0.0, 0.5, 2.0])
# A grid of eighths: exact in float32, so rounding makes no ties of its own.
grid = st.integers(-160, 160).map(lambda i: i / 8)
logits_strategy = st.lists(ties | grid, min_size=V, max_size=V)


def law_options(params: SamplingParams) -> dict:
    filters = "temperature", "top_k", "top_p", "min_p"
    return {name: getattr(params, name) for name in filters}


def softmax(scores) -> np.ndarray:
    weights = np.exp(np.float64(scores) - np.max(scores))
    return weights / weights.sum()


def is_clear(law, logits, params: SamplingParams) -> bool:
    """Whether thresholds moved by rounding leave the same tokens in."""
    kept = law(logits, **law_options(params)) > 0
    for step in (-1e-4, 1e-4):
        moved = dataclasses.replace(
            params,
            top_p=min(max(params.top_p + step, 1e-6), 1.0) if params.top_p < 1 else 1.0,
            min_p=min(max(params.min_p + step, 0.0), 1.0),
        )
        if ((law(logits, **law_options(moved)) > 0) != kept).any():
            return False
    return True


# ---- the processed law -------------------------------------------------------------------------


@given(data=st.data())
def test_processed_law_equals_the_slow_one(processed_law, data):
    params = data.draw(st.lists(params_strategy, min_size=B, max_size=B))
    logits = [[data.draw(logits_strategy) for _ in range(M)] for _ in range(B)]
    for row, own in zip(logits, params, strict=True):
        assume(all(is_clear(processed_law, node, own) for node in row))
    scores = np.asarray(jitted_scores(np.float32(logits), Sampling.stack(params)))
    for b, m in np.ndindex(B, M):
        expected = processed_law(logits[b][m], **law_options(params[b]))
        found = softmax(scores[b, m])  # at low temperatures a score may be too low for both
        np.testing.assert_array_equal(found > 0, expected > 0)
        np.testing.assert_allclose(found, expected, atol=1e-5)


TIED = [2.0, 1.0, 1.0, 1.0, 0.0, 2.0, -3.0]


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"top_k": 1}, [0, 5]),  # both favourites tie
        ({"top_k": 3}, [0, 1, 2, 3, 5]),
        ({"top_k": 5}, [0, 1, 2, 3, 5]),
        ({"top_k": 100}, range(7)),
        ({"top_k": -1}, range(7)),
        ({"top_p": 1e-6}, [0, 5]),
        ({"top_p": 0.7}, [0, 1, 2, 3, 5]),  # the favourites hold 0.62
        ({"top_p": 0.97}, range(6)),  # without the token of 0 they hold 0.956
        ({"top_p": 0.97, "top_k": 2}, [0, 5]),  # of what top-k left
        ({"min_p": 1.0}, [0, 5]),
        ({"min_p": 0.3}, [0, 1, 2, 3, 5]),
        ({"min_p": 0.0}, range(7)),
    ],
)
def test_ties_at_a_threshold_stay_in(processed_law, options, kept):
    params = SamplingParams(temperature=1.0, **options)
    scores = processed_scores(jnp.array([[TIED]]), Sampling.stack([params]))
    assert np.flatnonzero(scores[0, 0] > -np.inf).tolist() == list(kept)
    assert np.flatnonzero(processed_law(TIED, **law_options(params))).tolist() == list(kept)


def test_temperature_zero_is_the_first_favourite():
    logits = jnp.array([[[1.0, 3.0, 3.0, -jnp.inf]]])
    sampling = Sampling.stack([SamplingParams(top_k=2, top_p=0.5, min_p=0.9)])
    np.testing.assert_array_equal(
        processed_scores(logits, sampling), [[[-np.inf, 0.0, -np.inf, -np.inf]]]
    )
    assert draw(logits, sampling, jnp.zeros((1, 1), jnp.int32)) == 1


@pytest.mark.parametrize("temperature", [1e-30, 2e-38, 1e-42])
def test_a_tiny_temperature_is_nearly_greedy(temperature):
    logits = jnp.array([[[10.0, 30.0, 20.0, -jnp.inf]]])
    sampling = Sampling.stack([SamplingParams(temperature=temperature)])
    assert jitted_draw(logits, sampling, jnp.zeros((1, 1), jnp.int32)) == 1


def test_rows_of_a_batch_have_their_own_parameters():
    logits = jnp.tile(jnp.array(TIED), (4, 1, 1))
    params = [
        SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=0.5, top_k=2),
        SamplingParams(temperature=2.0, min_p=0.3),
    ]  # fmt: skip
    together = processed_scores(logits, Sampling.stack(params))
    for b, own in enumerate(params):
        alone = processed_scores(logits[:1], Sampling.stack([own]))
        np.testing.assert_array_equal(together[b], alone[0])


def test_top_p_needs_an_exact_half():
    """Two equal tokens hold one half each: the nucleus of 0.5 takes both, since they tie."""
    scores = processed_scores(
        jnp.array([[[0.0, 0.0, -50.0]]]), Sampling.stack([SamplingParams(temperature=1, top_p=0.5)])
    )
    assert np.isfinite(scores[0, 0]).tolist() == [True, True, False]


BAD_ROWS = {
    "nan": [0.0, np.nan, 1.0, 2.0],
    "all nan": [np.nan] * 4,
    "empty": [-np.inf] * 4,
    "overflow": [0.0, np.inf, 1.0, 2.0],
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("others", [0.0, 0.8])
@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_undefined_laws_are_flagged(row, temperature, others):
    logits = jnp.array([[row], [[0.0, 9.0, 1.0, 2.0]]], jnp.float32)
    sampling = Sampling.stack(
        [SamplingParams(temperature=t, top_k=3, top_p=0.9) for t in (temperature, others)]
    )
    scores = processed_scores(logits, sampling)
    assert is_defined(scores).tolist() == [[False], [True]]
    assert not np.isnan(scores).any()
    assert draw(logits, sampling, jnp.zeros((2, 1), jnp.int32)).tolist() == [[-1], [1]]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_allowed_tokens(temperature):
    logits = jnp.tile(jnp.array([5.0, 4.0, 3.0, jnp.nan]), (3, 1, 1)).at[0, 0, 3].set(0.0)
    allowed = jnp.array([[[0b1100]], [[0b0110]], [[0]]], jnp.uint32)
    sampling = Sampling.stack([SamplingParams(temperature=temperature, top_k=1)] * 3)
    tokens = draw(logits, sampling, jnp.zeros((3, 1), jnp.int32), allowed)
    # The NaN of the second row is not allowed, so it does not count; the third may say nothing.
    assert tokens.tolist() == [[2], [1], [-1]]
    scores = processed_scores(logits, sampling, allowed)
    assert is_defined(scores).tolist() == [[True], [True], [False]]


@given(st.integers(0, 2**16), st.sampled_from([5, 32, 70]))
def test_allowed_bits_restrict_their_tokens(seed, vocab):
    allowed = np.random.default_rng(seed).random((2, 3, vocab)) < 0.5
    words = np.packbits(np.pad(allowed, ((0, 0), (0, 0), (0, -vocab % 32))), -1, "little")
    bits = jnp.asarray(words.reshape(2, 3, -1).view("<u4"))
    got = restrict(jnp.ones((2, 3, vocab)), bits)
    np.testing.assert_array_equal(got, np.where(allowed, 1, -np.inf))


# ---- random draws ------------------------------------------------------------------------------


def test_keys_of_different_draws_differ():
    seed, position, purpose, index = np.meshgrid(
        np.array([0, 1, 2**31, 2**32 - 1], np.uint32), np.arange(12), list(Purpose), np.arange(6)
    )
    keys = jax.vmap(lambda *x: jax.random.key_data(draw_key(*x)))(
        *(x.ravel() for x in (seed, position, purpose.astype(np.uint32), index))
    )
    assert len(np.unique(keys, axis=0)) == seed.size


def test_draws_do_not_depend_on_the_batch_row():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, M, V)).astype(np.float32)
    position = rng.integers(0, 100, (5, M)).astype(np.int32)
    params = [SamplingParams(temperature=1.0, seed=int(seed)) for seed in rng.integers(0, 2**32, 5)]
    tokens = jitted_draw(logits, Sampling.stack(params), position)
    order = rng.permutation(5)
    shuffled = jitted_draw(
        logits[order], Sampling.stack([params[i] for i in order]), position[order]
    )
    np.testing.assert_array_equal(shuffled, tokens[order])
    alone = draw(logits[3:4], Sampling.stack(params[3:4]), position[3:4])
    np.testing.assert_array_equal(alone, tokens[3:4])


def test_a_greedy_row_is_greedy_in_a_batch_that_samples():
    logits = np.random.default_rng(1).standard_normal((2, M, V)).astype(np.float32)
    position = np.zeros((2, M), np.int32)
    mixed = Sampling.stack([SamplingParams(), SamplingParams(temperature=1.0)])
    np.testing.assert_array_equal(jitted_draw(logits, mixed, position)[0], logits[0].argmax(-1))


def test_draws_follow_the_law(processed_law):
    logits = np.float32([0.5, -1.0, 2.0, 1.0, 0.0])
    n = 20000
    params = SamplingParams(temperature=1.3, top_k=4, seed=5)
    tokens = jitted_draw(
        np.broadcast_to(logits, (1, n, 5)),
        Sampling.stack([params]),
        np.arange(n, dtype=np.int32)[None],
    )
    expected = processed_law(logits, **law_options(params)) * n
    counts = np.bincount(np.ravel(tokens), minlength=5)
    assert counts[expected == 0].sum() == 0
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-4


def test_draws_of_different_purposes_are_independent():
    n = 4000
    position = jnp.arange(n, dtype=jnp.int32)
    seed = jnp.full(n, 3, jnp.uint32)
    series = [
        uniform(seed, position, Purpose.ACCEPT, jnp.full(n, rank)) for rank in (0, 1)
    ] + [gumbel(seed[:1], position[None], purpose, 2)[0, :, token]
         for purpose in (Purpose.TARGET, Purpose.DRAFT, Purpose.RESIDUAL) for token in (0, 1)
    ]  # fmt: skip
    correlation = np.corrcoef(np.asarray(series)) - np.eye(len(series))
    # Of n independent pairs, the coefficient has deviation n ** -0.5.
    assert np.abs(correlation).max() < 4.5 / n**0.5
    assert stats.kstest(np.asarray(series[0]), "uniform").pvalue > 1e-4
    assert stats.kstest(np.asarray(series[2]), "gumbel_r").pvalue > 1e-4


# ---- parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_p", 0.0), ("top_p", 1.01), ("top_p", float("nan")), ("top_k", -2), ("min_p", -0.1),
        ("min_p", 1.5), ("min_p", float("nan")), ("seed", -1), ("seed", 2**32),
    ],
)  # fmt: skip
def test_impossible_values_raise(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*expected"):
        SamplingParams(**{name: value})


def test_values_at_the_limits_are_fine():
    SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, min_p=1.0, seed=2**32 - 1)
    stacked = Sampling.stack([SamplingParams(top_k=-1, seed=2**32 - 1)])
    assert stacked.top_k.tolist() == [0] and stacked.seed.tolist() == [2**32 - 1]
