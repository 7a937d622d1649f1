"""EAGLE-3 drafts, and passes over the draft's own states, against decoding step by step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_eagle import SamplingParams, generate
from jax_eagle.attention import View
from jax_eagle.cache import init_cache
from jax_eagle.checkpoint.mapping import CheckpointError
from jax_eagle.config import ConfigError, DraftConfig, default_taps
from jax_eagle.draft import Draft, Sync
from jax_eagle.eagle import init_draft_params
from jax_eagle.load import check_fit
from jax_eagle.tree import chain_tree
from jax_eagle.unroll import Text, unroll
from tests.conftest import TOY, random_params

pytestmark = pytest.mark.usefixtures("quick_compiler")

DEEP = dataclasses.replace(TOY, num_layers=4)
TAPS = 1, 2, 3
T, PASSES = 12, 4
OPTIONS = {
    "plain": {},
    "normed output, joint norm": {"output_norm": True, "feature_norm": "joint"},
    "normed residual, two layers": {"norm_before_residual": True, "num_layers": 2},
    "target's head, each norm": {"own_head": False, "feature_norm": "each"},
    "own embedding, bias": {"own_embedding": True, "fc_bias": True},
    "own width": {"own_embedding": True, "width": 16},
}


def make_draft3(case: str, seed: int = 3, vocab=(5, 1, 2, 4)) -> Draft:
    """A random EAGLE-3 draft that knows four of the six tokens."""
    options = dict(OPTIONS[case])
    width = options.pop("width", None)
    config = DraftConfig.eagle3_for_target(DEEP, taps=TAPS, draft_vocab_size=len(vocab), **options)
    if width is not None:
        layer = dataclasses.replace(config.layer, hidden_size=width)
        config = dataclasses.replace(config, layer=layer)
    params = random_params(init_draft_params, config, seed)
    return Draft(params, jnp.asarray(vocab, jnp.int32), config)


@pytest.fixture(scope="module")
def target(make_target):
    return make_target(num_layers=4)


@pytest.fixture(scope="module")
def prompts(ragged_prompts):
    return ragged_prompts(6)


@pytest.mark.parametrize("case", ["plain", "own width"])
def test_equal_text(target, prompts, case):
    draft = make_draft3(case, seed=4)
    sampling = [SamplingParams(temperature=i % 2 * 0.8, seed=i) for i in range(len(prompts))]
    options = {"max_new_tokens": 8, "stop_token_ids": [], "sampling": sampling}
    plain = generate(target, None, prompts, **options)
    drafted = generate(target, draft, prompts, tree="paths:[[0],[1],[0,0],[0,1]]", **options)
    assert drafted.tokens == plain.tokens
    assert sum(drafted.rounds) < sum(plain.rounds)


@pytest.mark.parametrize("case", OPTIONS)
def test_unrolled_passes_are_decoding(target, make_draft, case):
    """Row a + j of pass j is the j-th step of a chain that begins at token a."""
    check_unrolled(target, make_draft3(case), seed=0, anchor=5)


@settings(max_examples=6)
@given(seed=st.integers(0, 99), anchor=st.integers(1, T - PASSES))
def test_unrolled_passes_of_eagle_are_decoding(target, make_draft, seed, anchor):
    draft = make_draft(layers=2, num_layers=4)
    check_unrolled(target, draft, seed=seed, anchor=anchor)


def check_unrolled(target, draft: Draft, *, seed: int, anchor: int) -> None:
    """Two segments in a row; the second is compared with decoding it alone."""
    rng = np.random.default_rng(seed)
    first = 3
    tokens = jnp.asarray(rng.integers(0, 6, (1, first + T)), jnp.int32)
    position = jnp.concatenate([jnp.arange(first), jnp.arange(T)])[None].astype(jnp.int32)
    segment = jnp.asarray([[1] * first + [2] * T], jnp.int32)
    width = draft.config.feature_width
    noise = jnp.asarray(rng.standard_normal((1, first, width)), jnp.float32)
    text = Text(tokens, segment, position)
    passes, chain = _both_ways(draft, target, text, noise, jnp.int32(anchor))
    for j, expected in enumerate(chain):
        row = first + anchor + j
        assert passes[j].valid[0, row]
        np.testing.assert_allclose(passes[j].state[0, row], expected, rtol=2e-4, atol=2e-5)
        assert not passes[j].valid[0, first + j]


@jax.jit
def _both_ways(draft: Draft, target, text: Text, noise_1TF, anchor):
    """All passes along the row, and the states of a chain in the segment behind the `noise`."""
    alone = text.tokens[:, noise_1TF.shape[1] :]
    features = target(alone, chain_tree(1, T), None, draft.config.taps).features
    both = jnp.concatenate([noise_1TF, features], axis=1)
    passes = unroll(draft, target, text, both, PASSES)
    return passes, [*_chain(draft, target, alone, features, anchor)]


def _chain(draft: Draft, target, tokens_1T, features_1TF, anchor):
    """States of a chain of drafted tokens, with a paged cache: as `Draft.expand` goes about it."""
    before = jnp.pad(features_1TF[:, :-1], ((0, 0), (1, 0), (0, 0)))
    table = jnp.asarray([[1, 2]], jnp.int32)
    cache = init_cache(draft.config.layer, table, num_pages=3, page_size=8)
    count = jnp.reshape(anchor + 1, (1,))  # the rows behind it are padding
    cache, out = draft.extend(target, cache, Sync(tokens_1T, before, count))
    state, scratch = jax.lax.dynamic_slice_in_dim(out, anchor, 1, axis=1), None
    yield state[0, 0]
    for j in range(1, PASSES):
        position = jnp.reshape(anchor + j, (1, 1))
        mask = jnp.ones((1, 1, j), bool)
        view = View(position, mask, cache, jnp.ones_like(position), scratch)
        token = jax.lax.dynamic_slice_in_dim(tokens_1T, anchor + j, 1, axis=1)
        state, kv = draft(target, token, state, view)
        scratch = kv if scratch is None else scratch.append(kv)
        yield state[0, 0]


def test_default_taps():
    """Those of the official code for Llama 3.1 8B, 3.3 70B and Llama 4."""
    assert default_taps(32) == (2, 16, 29)
    assert default_taps(80) == (2, 40, 77)
    assert default_taps(48) == (2, 24, 45)
    with pytest.raises(ConfigError, match="5 layers: name the taps"):
        default_taps(5)


def test_taps_of_another_target(target, make_target):
    check_fit(make_draft3("plain"), target, "here")
    with pytest.raises(CheckpointError, match=r"taps layers \(1, 2, 3\), this target has 2"):
        check_fit(make_draft3("plain"), make_target(), "here")
    for taps in ((2, 1, 3), (1, 1, 3), (-1, 1, 3)):
        draft = make_draft3("plain")
        wrong = draft.replace(config=dataclasses.replace(draft.config, taps=taps))
        with pytest.raises(CheckpointError, match="distinct ones, low to high, from 0"):
            check_fit(wrong, target, "here")
    with pytest.raises(CheckpointError, match="feature width is 96"):
        check_fit(make_draft3("plain"), make_target(num_layers=4, hidden_size=40), "here")


def test_config_round_trip():
    for case in OPTIONS:
        config = make_draft3(case).config
        assert DraftConfig.from_dict(config.to_dict()) == config
