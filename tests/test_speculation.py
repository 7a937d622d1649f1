"""End to end on a tiny target: speculation never changes the tokens, nor their law."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eagle import Draft, SamplingParams, Target, generate, generate_stream
from jax_eagle.config import DraftConfig, LlamaConfig
from jax_eagle.draft import init_draft_params
from jax_eagle.llama import init_params

V = 5
PROMPT = [1, 3]


@pytest.fixture(scope="module")
def target() -> Target:
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=8, tie_embeddings=False, max_position=128,
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    params["lm_head"]["kernel"] *= 2.0
    return Target(params, config)


@pytest.fixture(scope="module")
def draft(target) -> Draft:
    config = DraftConfig.for_target(target.config)
    return Draft(init_draft_params(config, jax.random.key(7)), None, config)


def processed(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The law by sorting, in numpy: temperature, top-k, top-p, min-p."""
    probs = np.exp((logits - logits.max()) / params.temperature)
    probs /= probs.sum()
    order = np.argsort(-probs)
    keep = np.zeros(V, bool)
    keep[order[: params.top_k or V]] = True
    mass = np.cumsum(np.where(keep, probs, 0)[order]) / probs[keep].sum()
    nucleus = np.zeros(V, bool)
    nucleus[order[: int(np.searchsorted(mass, params.top_p - 1e-9)) + 1]] = True
    keep &= nucleus & (probs >= params.min_p * probs.max())
    return np.where(keep, probs, 0) / probs[keep].sum()


def exact_law(target: Target, params: SamplingParams) -> np.ndarray:
    """Probability of each continuation of three tokens, [V, V, V]."""
    law = np.zeros((V, V, V))
    rows = [PROMPT + list(pair) for pair in itertools.product(range(V), repeat=2)]
    logits = np.asarray(target.logits(rows))
    for (a, b), row in zip(itertools.product(range(V), repeat=2), logits, strict=True):
        first, second, third = (processed(row[i], params) for i in (1, 2, 3))
        law[a, b] = first[a] * second[b] * third
    return law


LAWS = {
    "plain": SamplingParams(temperature=1.0),
    "filtered": SamplingParams(temperature=0.8, top_k=4, top_p=0.92, min_p=0.03),
}
CASES = [
    ("chain:3", "greedy"), ("chain:3", "sampled"), ("paths:[[0],[1],[0,0],[0,1],[1,0]]", "greedy"),
    ("paths:[[0],[1],[0,0],[0,1],[1,0]]", "sampled"), ("dynamic:depth=2,width=2,nodes=5", "greedy"),
    ("dynamic:depth=2,width=2,nodes=7", "sampled"),
]  # fmt: skip
BATCH, CALLS = 1024, 12


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("tree, drafting", CASES)
def test_output_law_is_the_targets(target, draft, tree, drafting, law):
    counts = np.zeros((V, V, V))
    for call in range(CALLS):
        seeds = range(call * BATCH, (call + 1) * BATCH)
        params = [
            SamplingParams(**{**vars(LAWS[law]), "seed": seed * 7919 % 2**32}) for seed in seeds
        ]
        result = generate(
            target, draft, [PROMPT] * BATCH, max_new_tokens=3, sampling=params, tree=tree,
            drafting=drafting, stop_token_ids=[],
        )  # fmt: skip
        np.add.at(counts, tuple(np.array(result.tokens).T), 1)
    expected = exact_law(target, LAWS[law]) * BATCH * CALLS
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    freedom = seen.sum() - 1
    # The chi-square law has mean f and variance 2 f: five deviations is far in the tail.
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom), chi_square
    total_variation = np.abs(counts - expected).sum() / 2 / (BATCH * CALLS)
    assert total_variation < 0.8 * np.sqrt(freedom / (BATCH * CALLS)), total_variation


@pytest.mark.parametrize("sync", ["all", "last"])
@pytest.mark.parametrize("tree", ["chain:3", "static:8", "dynamic:depth=3,width=2,nodes=6"])
def test_greedy_tokens_are_those_of_plain_decoding(target, draft, tree, sync):
    prompts = [[1, 2, 3], [4] * 20, [0]]
    plain = generate(target, None, prompts, max_new_tokens=24, stop_token_ids=[])
    result = generate(
        target, draft, prompts, max_new_tokens=24, stop_token_ids=[], tree=tree, draft_sync=sync
    )
    assert result.tokens == plain.tokens
    events = list(
        generate_stream(
            target, draft, prompts, max_new_tokens=24, stop_token_ids=[], tree=tree, draft_sync=sync
        )
    )
    streamed = [sum((e.new_tokens[b] for e in events), []) for b in range(3)]
    assert streamed == plain.tokens


def test_seeded_text_does_not_depend_on_tree_or_batch(target, draft):
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in (11, 12, 13)]
    prompts = [[1, 2], [3], [4, 0, 2]]
    options = {"max_new_tokens": 16, "stop_token_ids": []}
    plain = generate(target, None, prompts, sampling=params, **options)
    for tree in ("chain:2", "static:4"):
        assert generate(target, draft, prompts, sampling=params, tree=tree, **options).tokens == (
            plain.tokens
        )
    alone = generate(target, draft, prompts[2:], sampling=params[2], tree="chain:2", **options)
    assert alone.tokens == plain.tokens[2:]


def test_stop_tokens_and_limits(target, draft):
    free = generate(target, None, [[2, 4]], max_new_tokens=12, stop_token_ids=[])
    stop = free.tokens[0][5]
    cut = free.tokens[0].index(stop) + 1
    for tree in ("chain:3", "static:8"):
        result = generate(
            target, draft, [[2, 4]], max_new_tokens=12, stop_token_ids=[stop], tree=tree
        )
        assert result.tokens == [free.tokens[0][:cut]]
        assert result.finish_reasons == ["stop"]
        exact = generate(target, draft, [[2, 4]], max_new_tokens=7, stop_token_ids=[], tree=tree)
        assert exact.tokens == [free.tokens[0][:7]] and exact.finish_reasons == ["length"]


def test_nan_ends_with_an_error(target, draft):
    broken = jax.tree.map(lambda x: x, target.params)
    broken["norm"] = {"scale": broken["norm"]["scale"] * jnp.nan}
    for head in (None, draft):
        result = generate(target.replace(params=broken), head, [[1], [2, 3]], max_new_tokens=5)
        assert result.finish_reasons == ["error"] * 2
        assert result.tokens == [[], []]
