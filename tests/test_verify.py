"""Verification without a model: the walk, the residual rule, and the law of what comes out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

import jax_eagle.verify as verify_module
from jax_eagle.sampling import Sampling, SamplingParams
from jax_eagle.tree import Tree, ancestor_mask, parse_tree, tree_arrays
from jax_eagle.verify import DraftLaw, verify

pytestmark = pytest.mark.usefixtures("quick_compiler")

jitted = jax.jit(verify, static_argnames=("max_depth", "max_children"))


def make_tree(parents_BM) -> Tree:
    """A tree from its parent arrays; ranks count siblings in node order."""
    parents_BM = np.asarray(parents_BM, np.int32)
    depth, rank = np.zeros_like(parents_BM), np.zeros_like(parents_BM)
    for b, parents in enumerate(parents_BM):
        for node in range(1, len(parents)):
            depth[b, node] = depth[b, parents[node]] + 1
            rank[b, node] = np.count_nonzero(parents[1:node] == parents[node])
    mask = ancestor_mask(jnp.asarray(parents_BM), parents_BM.shape[1] - 1)
    return Tree(*map(jnp.asarray, (parents_BM, depth, rank)), mask)


def chain(B: int, M: int) -> Tree:
    return make_tree([np.maximum(np.arange(M) - 1, 0)] * B)


def sampling_of(B: int, **options) -> Sampling:
    """One set of parameters for B rows with seeds 0, 1, ..."""
    return Sampling.stack([SamplingParams(**{"seed": b} | options) for b in range(B)])


def run(tree, tokens, law, logits, sampling, *, depth, children=3, **options):
    tokens, logits = jnp.asarray(tokens, jnp.int32), jnp.asarray(logits, jnp.float32)
    length = jnp.arange(tokens.shape[0], dtype=jnp.int32) + 5
    return jitted(
        tree,
        tokens,
        law,
        logits,
        length,
        sampling,
        max_depth=depth,
        max_children=children,
        **options,
    )


# ---- the walk ----------------------------------------------------------------------------------


def walk(parents, tokens, chosen):
    """The path and the bonus token, by plain Python; `chosen[n]` is what the target says at n."""
    path = [0]
    while True:
        children = [n for n in range(1, len(parents)) if parents[n] == path[-1]]
        hits = [n for n in children if tokens[n] == chosen[path[-1]]]
        if not hits:
            return path, chosen[path[-1]]
        path.append(hits[0])


@pytest.mark.parametrize("drafting", ["greedy", "sampled"])
@given(data=st.data())
def test_greedy_walk_follows_the_targets_favourites(drafting, data):
    B, M, V = 3, 8, 4
    # At most one child of each token, as drafts propose them.
    parents, tokens = np.zeros((B, M), int), np.zeros((B, M), int)
    for b in range(B):
        free = [(0, t) for t in range(V)]
        for node in range(1, M):
            parents[b, node], tokens[b, node] = free.pop(data.draw(st.integers(0, len(free) - 1)))
            free += [(node, t) for t in range(V)]
    chosen = data.draw(st.lists(st.integers(0, V - 1), min_size=B * M, max_size=B * M))
    chosen = np.array(chosen).reshape(B, M)
    logits = np.eye(V)[chosen] * 3 + 1
    law = None
    if drafting == "sampled":  # a point mass accepts its own token and leaves no residual
        probs = np.full((B, M, V), 1 / V, np.float32)
        law = DraftLaw(jnp.asarray(probs), jnp.tile(jnp.arange(M)[None], (B, 1)), None)
    verdict = run(make_tree(parents), tokens, law, logits, sampling_of(B), depth=M - 1, children=V)
    for b in range(B):
        path, bonus = walk(parents[b], tokens[b], chosen[b])
        assert verdict.num_accepted[b] == len(path) - 1
        assert verdict.path[b].tolist() == path + path[-1:] * (M - len(path))
        assert verdict.bonus[b] == bonus
    assert not verdict.error.any()


def test_a_chain_of_no_drafts_is_plain_decoding():
    logits = np.random.default_rng(0).standard_normal((4, 1, 5))
    verdict = run(chain(4, 1), np.zeros((4, 1)), None, logits, sampling_of(4), depth=0, children=0)
    np.testing.assert_array_equal(verdict.bonus, logits[:, 0].argmax(-1))
    assert verdict.path.tolist() == [[0]] * 4 and not verdict.num_accepted.any()


# ---- undefined laws and allowed tokens ---------------------------------------------------------


def uniform_law(B, M, V) -> DraftLaw:
    node = jnp.tile(jnp.arange(M, dtype=jnp.int32)[None], (B, 1))
    return DraftLaw(jnp.full((B, M, V), 1 / V), node, None)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("drafting", ["greedy", "sampled"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_undefined_laws_matter_only_on_the_path(temperature, drafting, bad):
    """Row 0: at the root. Row 1: behind an accepted node. Row 2: at a node that is not reached."""
    V = 3
    logits = np.full((3, 3, V), -50.0)
    logits[0, 0] = logits[1, 1] = bad
    logits[1, 0, 1] = 0.0  # accepts the chain's first token
    logits[2, 0, 2] = 0.0  # rejects it
    logits[2, 1] = bad
    law = uniform_law(3, 3, V) if drafting == "sampled" else None
    verdict = run(
        chain(3, 3),
        np.full((3, 3), 1),
        law,
        logits,
        sampling_of(3, temperature=temperature),
        depth=2,
    )
    assert verdict.error.tolist() == [True, True, False]
    assert verdict.bonus.tolist() == [-1, -1, 2]
    assert verdict.num_accepted.tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("drafting", ["greedy", "sampled"])
def test_allowed_tokens_bind_drafted_and_bonus_tokens(temperature, drafting):
    """The target wants token 1 and so does the chain; rows differ in what is allowed."""
    B, M, V = 4, 3, 4
    logits = np.tile(np.array([0.0, 40.0, 20.0, 0.0]), (B, M, 1))
    allowed = np.full((B, M, 1), 0b1111, np.uint32)
    allowed[1, 1] = 0b1101  # behind the first drafted token: another one
    allowed[2, 0] = 0b1101  # at the root
    allowed[3, 1] = 0  # nothing may follow the first drafted token
    law = uniform_law(B, M, V) if drafting == "sampled" else None
    verdict = run(
        chain(B, M), np.full((B, M), 1), law, logits, sampling_of(B, temperature=temperature),
        depth=2, allowed_bits=jnp.asarray(allowed),
    )  # fmt: skip
    assert verdict.num_accepted.tolist() == [2, 1, 0, 1]
    assert verdict.bonus.tolist() == [1, 2, 2, -1]
    assert verdict.error.tolist() == [False, False, False, True]


# ---- the residual rule, exactly ----------------------------------------------------------------


def draws_without_replacement(probs, count: int):
    """All ordered draws and their probability. Where the law is used up, any token follows."""
    orders = list(itertools.permutations(range(len(probs)), count))
    chances = []
    for order in orders:
        chance, left = 1.0, dict(enumerate(probs))
        for token in order:
            total, choices = sum(left.values()), len(left)
            mass = left.pop(token)
            chance *= mass / total if total > 0 else 1 / choices
        chances.append(chance)
    return np.array(orders), np.array(chances)


@jax.jit
def attempt(tree, tokens_BM, rank, trial, chance_B):
    """`_try_child` at the root with the given numbers for its uniform draws."""
    zeros_B = jnp.zeros_like(tokens_BM[:, 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "uniform", lambda *_: chance_B)
        return verify_module._try_child(
            tree, tokens_BM, zeros_B, zeros_B, sampling_of(len(zeros_B)), rank, trial
        )


weights = st.lists(st.integers(0, 8), min_size=4, max_size=4).filter(any)


@pytest.mark.parametrize("children", [1, 3])
@given(target=weights, draft=weights)
@example(target=[0, 0, 0, 1], draft=[0, 0, 0, 1])  # the law is used up after one draw
def test_residual_rule_gives_exactly_the_targets_law(children, target, draft):
    """Sums the output law of one node over all draws; acceptance tests are integrated by hand."""
    target_probs, draft_probs = (np.array(w) / sum(w) for w in (target, draft))
    orders, weight = draws_without_replacement(draft_probs, children)
    B = len(orders)
    tree = make_tree([[0] * (children + 1)] * B)
    tokens_BM = jnp.asarray(np.pad(orders, ((0, 0), (1, 0))), jnp.int32)
    trial = verify_module._Trial(
        target_probs=jnp.tile(jnp.float32(target_probs)[None], (B, 1)),
        draft_probs=jnp.tile(jnp.float32(draft_probs)[None], (B, 1)),
        child=jnp.zeros(B, jnp.int32),
        found=jnp.zeros(B, bool),
    )
    seen = np.zeros(4)
    for rank in range(children):
        token_B, row, open_B = orders[:, rank], np.arange(B), ~np.asarray(trial.found)
        target_B = np.float64(trial.target_probs)[row, token_B]
        draft_B = np.float64(trial.draft_probs)[row, token_B]
        accept_B = np.minimum(target_B / np.where(draft_B > 0, draft_B, 1), 1) * (draft_B > 0)
        # It accepts just below that chance and rejects just above it (a chance is below 1).
        below = attempt(tree, tokens_BM, rank, trial, jnp.float32(accept_B * (1 - 1e-5)))
        trial = attempt(tree, tokens_BM, rank, trial, jnp.float32(accept_B * (1 + 1e-5)))
        assert np.asarray(below.found)[open_B & (accept_B > 0)].all()
        assert not np.asarray(trial.found)[open_B & (accept_B < 1)].any()
        np.add.at(seen, token_B, weight * accept_B)
        weight = weight * (1 - accept_B)
    seen += weight @ np.float64(trial.target_probs)
    np.testing.assert_allclose(seen, target_probs, atol=2e-6)


# ---- the law of whole trees --------------------------------------------------------------------

V, ROWS, CALLS = 5, 8192, 4
SHAPE = parse_tree("paths:[[0],[1],[0,0],[0,1],[1,0]]")


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def drawn_children(rng, probs, count: int):
    """Ordered draws without replacement, [rows, count]; used-up laws go on with any token."""
    noise = rng.gumbel(size=probs.shape)
    with np.errstate(divide="ignore"):
        keys = np.log(probs) + noise
    keys = np.where(np.isneginf(keys), -1e9 + noise, keys)
    return np.argsort(-keys, axis=-1)[..., :count]


def verdicts(rng, first, second, draft_first, draft_second, *, drafting, options, seed):
    """First two tokens of ROWS outputs; `second[token]` are the logits behind a first token."""
    if drafting == "sampled":
        root = drawn_children(rng, np.tile(draft_first, (ROWS, 1)), 2)
        pairs = drawn_children(rng, draft_second[root], 2)  # children of both nodes
    else:  # the favourites, whether or not a law is handed on
        root = np.tile(np.argsort(-draft_first)[:2], (ROWS, 1))
        pairs = np.argsort(-draft_second, axis=-1)[root, :2]
    nodes = np.stack(
        [0 * root[:, 0], root[:, 0], root[:, 1], pairs[:, 0, 0], pairs[:, 0, 1], pairs[:, 1, 0]], 1
    )
    arrays = tree_arrays(SHAPE)
    tree = make_tree(np.tile(arrays["parent"], (ROWS, 1)))
    logits = np.stack([np.tile(first, (ROWS, 1)), *(second[nodes[:, n]] for n in range(1, 6))], 1)
    law = None
    if drafting != "greedy":
        probs = np.stack(
            [np.tile(draft_first, (ROWS, 1)), *(draft_second[root[:, i]] for i in (0, 1))], 1
        )
        expanded = np.tile([0, 1, 2, 0, 0, 0], (ROWS, 1)).astype(np.int32)
        law = DraftLaw(jnp.float32(probs), jnp.asarray(expanded), None)
    sampling = Sampling.stack([SamplingParams(seed=seed + b, **options) for b in range(ROWS)])
    verdict = run(tree, nodes, law, logits, sampling, depth=2, children=2)
    return nodes, *map(np.asarray, (verdict.path, verdict.num_accepted, verdict.bonus))


def output_pvalue(processed_law, *, drafting, options, draft="random", seed=0) -> float:
    """Chi-square of the first two tokens against the exact law."""
    rng = np.random.default_rng(seed)
    first, second = 1.5 * rng.standard_normal(V), 1.5 * rng.standard_normal((V, V))
    laws = {"first": processed_law(first, **options)}
    laws["second"] = np.stack([processed_law(row, **options) for row in second])
    draft_first, draft_second = softmax(rng.normal(0, 2, V)), softmax(rng.normal(0, 2, (V, V)))
    if draft == "narrow":  # less than it has to draw, and mass on tokens outside the target's law
        draft_first, draft_second = (np.where(x == x.max(-1, keepdims=True), 1.0, 0.0)
                                     for x in (draft_first, draft_second))  # fmt: skip
    if draft == "oracle":
        draft_first, draft_second = laws["first"], laws["second"]
    counts = np.zeros((V, V))
    for call in range(CALLS):
        nodes, path, accepted, bonus = verdicts(
            rng, first, second, draft_first, draft_second, drafting=drafting, options=options,
            seed=call * ROWS,
        )  # fmt: skip
        token = np.where(accepted > 0, nodes[np.arange(ROWS), path[:, 1]], bonus)
        cumulative = np.cumsum(laws["second"][token], axis=1)
        own = np.minimum((rng.random((ROWS, 1)) > cumulative).sum(1), V - 1)
        following = np.where(accepted > 1, nodes[np.arange(ROWS), path[:, 2]], bonus)
        np.add.at(counts, (token, np.where(accepted > 0, following, own)), 1)
    expected = laws["first"][:, None] * laws["second"] * ROWS * CALLS
    if counts[expected < 1e-9].any():
        return 0.0
    seen = expected >= 1e-9
    return stats.chisquare(
        counts[seen], expected[seen] * counts.sum() / expected[seen].sum()
    ).pvalue


OPTIONS = {
    "plain": {"temperature": 1.0},
    "filtered": {"temperature": 0.8, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "drafting, draft",
    [("greedy", "random"), ("sampled", "random"), ("sampled", "narrow"), ("sampled", "oracle")],
)
def test_output_law_of_a_tree(processed_law, drafting, draft, options):
    assert output_pvalue(processed_law, drafting=drafting, draft=draft, options=options) > 1e-4


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_wrong_law_is_noticed(processed_law, options):
    """Favourites verified as if they had been drawn: the error that the rule above excludes."""
    assert output_pvalue(processed_law, drafting="favourites", options=options) < 1e-6


def test_an_oracle_is_always_accepted():
    B, M, V = 256, 4, 6
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((B, M, V))
    law = DraftLaw(jnp.float32(softmax(logits / 0.8)), jnp.tile(jnp.arange(M)[None], (B, 1)), None)
    children = drawn_children(rng, softmax(logits / 0.8), 1)[:, :, 0]
    tokens = np.concatenate([np.zeros((B, 1), int), children[:, :-1]], axis=1)
    verdict = run(chain(B, M), tokens, law, logits, sampling_of(B, temperature=0.8), depth=3)
    assert (np.asarray(verdict.num_accepted) == 3).all()
