"""Acceptance by decoding, along given text, and its intervals, each against a slower way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eagle import generate, generate_stream
from jax_eagle.acceptance import (
    NUM_RANKS,
    Depths,
    bootstrap,
    decode_acceptance,
    forced_acceptance,
    greedy_answers,
)
from jax_eagle.config import DraftConfig
from jax_eagle.draft import Draft
from jax_eagle.eagle import init_draft_params
from jax_eagle.tree import chain_tree
from jax_eagle.unroll import Text, unroll

from .conftest import random_params

pytestmark = pytest.mark.usefixtures("quick_compiler")

NEW_TOKENS, DEPTH = 9, 3
WIDE = "paths:[[0],[1],[2],[0,0],[0,1],[0,2],[0,0,0],[0,0,1],[0,0,2]]"
"""A chain whose every node has two siblings."""


@pytest.fixture(scope="module")
def target(make_target):
    return make_target(max_position=64)


@pytest.fixture(scope="module")
def draft_of(make_draft, target):
    """draft_of(kind) -> a random draft of that kind."""

    def make(kind: str) -> Draft:
        if kind == "eagle":
            return make_draft(max_position=64)
        if kind == "cut vocabulary":
            return make_draft(seed=20, vocab=(5, 1, 2, 4), layers=2, max_position=64)
        ids = jnp.asarray((5, 1, 2, 4), jnp.int32)
        config = DraftConfig.eagle3_for_target(target.config, taps=(0, 1), draft_vocab_size=4)
        return Draft(random_params(init_draft_params, config, 3), ids, config)

    return make


@pytest.fixture(scope="module")
def prompts(ragged_prompts):
    return ragged_prompts(16)


@pytest.fixture(scope="module")
def answers(target, prompts):
    return greedy_answers(target, prompts, max_new_tokens=NEW_TOKENS)


def test_answers_are_the_targets_own_in_the_order_of_the_prompts(target, prompts, answers):
    for i in 0, 8:
        some = generate(target, None, prompts[i : i + 8], max_new_tokens=NEW_TOKENS)
        assert answers[i : i + 8] == some.tokens


def test_decoding_counts_the_rounds_of_generate(target, draft_of, prompts):
    draft, tree = draft_of("eagle"), "chain:3"
    counted = decode_acceptance(
        target, draft, prompts, trees=[tree, WIDE], max_new_tokens=NEW_TOKENS
    )
    assert list(counted) == [tree, WIDE]
    for name, decoded in counted.items():
        first = decoded.take(range(8))
        result = generate(target, draft, prompts[:8], max_new_tokens=NEW_TOKENS, tree=name)
        assert first.gained.tolist() == [len(tokens) - 1 for tokens in result.tokens]
        assert first.rounds.tolist() == result.rounds
        length = first.acceptance_length()
        assert length.value == pytest.approx(result.acceptance_length)
        assert length.low < length.value < length.high
        depths = decoded.depths
        assert (depths.ranked.sum(axis=2) == depths.accepted).all()
        # A round gains a bonus token as well, unless it was cut; each prompt's last one can be.
        bonus = decoded.gained - depths.accepted.sum(axis=1)
        assert ((decoded.rounds - bonus >= 0) & (decoded.rounds - bonus <= 1)).all()
        assert (depths.reached[:, 0] <= decoded.rounds).all()
        assert (depths.reached[:, 1:] <= depths.accepted[:, :-1]).all()
    assert counted[WIDE].acceptance_length().value > counted[tree].acceptance_length().value


def test_a_perfect_draft_fills_every_uncut_round(target, make_oracle, prompts):
    options = {"trees": ["chain:4"], "max_new_tokens": NEW_TOKENS}
    counted = decode_acceptance(target, make_oracle(), prompts, **options)["chain:4"]
    # Eight tokens behind the first one: a whole round, and one that the limit cuts at depth 3.
    assert set(counted.gained) == {8} and set(counted.rounds) == {2}
    assert (counted.depths.reached == counted.depths.accepted).all()
    assert counted.depths.reached.tolist() == [[2, 2, 2, 1]] * len(prompts)
    assert counted.depths.chain_length(4) == (5, 5, 5)
    nothing = decode_acceptance(target, make_oracle(-1.0), prompts, **options)["chain:4"]
    assert nothing.acceptance_length() == (1, 1, 1) and nothing.depths.joint(1).value == 0


@pytest.mark.parametrize(
    "kind", ["eagle", pytest.param("cut vocabulary", marks=pytest.mark.slow), "eagle3"]
)
def test_forced_chains_are_first_rounds_from_every_token(target, draft_of, prompts, answers, kind):
    """Each token of an answer in turn is made the root, by a prompt that ends just before it."""
    draft = draft_of(kind)
    forced = forced_acceptance(target, draft, prompts, answers, depth=DEPTH)
    for i in range(0, len(prompts), 3):
        starts = [prompts[i] + answers[i][:k] for k in range(NEW_TOKENS - 1)]
        stream = generate_stream(target, draft, starts, tree=WIDE, max_new_tokens=NEW_TOKENS)
        assert next(stream).new_tokens == [[token] for token in answers[i][:-1]]
        reached, ranked = np.zeros(DEPTH, int), np.zeros((DEPTH, NUM_RANKS), int)
        for k, ranks in enumerate(next(stream).ranks):
            for d in range(min(DEPTH, NEW_TOKENS - 1 - k)):
                reached[d] += 1
                if d < len(ranks):
                    ranked[d, ranks[d]] += 1
                if d >= len(ranks) or ranks[d] > 0:
                    break
        depths = forced.depths
        assert depths.reached[i].tolist() == reached.tolist()
        assert depths.ranked[i, :, :3].tolist() == ranked[:, :3].tolist()
        assert depths.accepted[i].tolist() == ranked[:, 0].tolist()
    assert forced.depths.accepted.sum(axis=0).all()  # every depth was put to the test


@pytest.mark.parametrize("kind", ["eagle", "cut vocabulary"])
def test_overlap_is_the_common_mass_of_the_two_laws(target, draft_of, prompts, answers, kind):
    draft, i = draft_of(kind), 3
    forced = forced_acceptance(target, draft, [prompts[i]], [answers[i]], depth=1)
    tokens_1T = jnp.asarray([prompts[i] + answers[i]], jnp.int32)
    position_1T = jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None]
    features = target(tokens_1T, chain_tree(*tokens_1T.shape), None).features
    text = Text(tokens_1T, jnp.ones_like(tokens_1T), position_1T)
    logits_TU = draft.bind_head(target)(unroll(draft, target, text, features, 1)[0].state)[0]
    target_probs_TV = np.asarray(jax.nn.softmax(target.logits(tokens_1T)[0]), float)
    draft_probs_TV = np.zeros_like(target_probs_TV)
    ids = np.asarray(draft.to_target(jnp.arange(logits_TU.shape[1], dtype=jnp.int32)))
    draft_probs_TV[:, ids] = jax.nn.softmax(logits_TU)
    common_T = np.minimum(target_probs_TV, draft_probs_TV).sum(axis=1)
    roots = slice(len(prompts[i]), len(prompts[i]) + NEW_TOKENS - 1)
    assert forced.overlap[0] == pytest.approx(common_T[roots].sum(), rel=1e-4)
    assert forced.expected_acceptance().value == pytest.approx(common_T[roots].mean(), rel=1e-4)


def test_rounds_on_paper_are_those_of_decoding(target, draft_of, prompts, answers):
    draft = draft_of("eagle")
    forced = forced_acceptance(target, draft, prompts, answers, depth=DEPTH)
    decoded = decode_acceptance(
        target, draft, prompts, trees=["chain:3"], max_new_tokens=NEW_TOKENS
    )["chain:3"]
    assert forced.rounds[:, 2].tolist() == decoded.rounds.tolist()
    assert forced.acceptance_length(3) == decoded.acceptance_length()
    assert (forced.rounds[:, 0] >= forced.rounds[:, 1]).all()
    # Every token counts alike in the joint acceptances, so this holds within the noise alone.
    length, estimate = decoded.acceptance_length(), forced.depths.chain_length(3)
    assert length.low <= estimate.value and estimate.low <= length.value
    assert decoded.depths.chain_length(3).value >= length.value > 1.1


def test_a_broken_draft_is_never_right(target, draft_of, prompts, answers):
    draft = draft_of("eagle")
    broken = draft.replace(params=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), draft.params))
    depths = forced_acceptance(target, broken, prompts, answers, depth=2).depths
    assert not depths.ranked.any() and depths.reached[:, 0].sum() == 16 * (NEW_TOKENS - 1)
    assert depths.chain_length(2) == (1, 1, 1)


# ---- statistics ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 5))
def test_joint_acceptance_of_whole_rounds_is_their_share(accepted, num_prompts):
    """Rounds of a chain of four that accepted so many tokens, dealt out to the prompts."""
    at_least = np.array(accepted)[:, None] >= np.arange(1, 5)[None]
    reached = np.concatenate([np.ones((len(accepted), 1), bool), at_least[:, :-1]], axis=1)
    dealt = [slice(i, None, num_prompts) for i in range(min(num_prompts, len(accepted)))]
    tried = np.array([reached[rows].sum(axis=0) for rows in dealt])
    kept = np.array([at_least[rows].sum(axis=0) for rows in dealt])
    depths = Depths(tried, kept, kept[:, :, None])
    for depth in range(1, 5):
        assert depths.joint(depth).value == pytest.approx(at_least[:, depth - 1].mean())
    assert depths.chain_length(4).value == pytest.approx(1 + np.mean(accepted))
    for estimate in depths.conditional(1), depths.joint(2), depths.chain_length(4):
        assert estimate.low <= estimate.high
    if len(dealt) == 1:  # one prompt can only be drawn as it is
        assert depths.chain_length(4).low == pytest.approx(depths.chain_length(4).high)


def test_the_interval_is_over_prompts_and_holds_the_truth():
    def share(part, whole):
        return part / whole

    rng, hits = np.random.default_rng(0), 0
    for _ in range(100):
        rate = rng.beta(4, 4, 24)  # prompts differ; their mean is 1/2
        estimate = bootstrap(share, rng.binomial(60, rate), np.full(24, 60), samples=300)
        hits += estimate.low <= 0.5 <= estimate.high
    assert 87 <= hits <= 99
    again = bootstrap(share, np.arange(1, 9), np.full(8, 9))
    assert again == bootstrap(share, np.arange(1, 9), np.full(8, 9))
    assert again != bootstrap(share, np.arange(1, 9), np.full(8, 9), seed=1)
    # The same 60 tokens as one prompt's or as 60 prompts': alike ones are not many.
    alike = bootstrap(share, np.array([60, 0] * 4), np.full(8, 60))
    apart = bootstrap(share, np.array([1, 0] * 240), np.ones(480))
    assert alike.high - alike.low > 5 * (apart.high - apart.low)
