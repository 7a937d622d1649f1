"""The paged cache: `commit` against plain numpy, and what the rounds leave in the pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jax_eagle import SamplingParams
from jax_eagle.attention import View
from jax_eagle.cache import KV, PagedCache, commit, gather
from jax_eagle.generate import decode
from jax_eagle.prefill import start
from jax_eagle.tree import chain_tree

pytestmark = pytest.mark.usefixtures("quick_compiler")

L, B, K, H, C, R, M, A = 2, 3, 2, 4, 4, 3, 5, 3
PAGES = 1 + B * R


# ---- commit ------------------------------------------------------------------------------------


def committed(pages, table, length, new, path, count):
    """`commit` by loops, the trash page aside."""
    pages = pages.copy()
    for layer in range(L):
        for b in range(B):
            for a in range(count[b]):
                page, slot = divmod(length[b] + a, C)
                pages[layer * PAGES + table[b, page], :, slot] = new[layer, b, path[b, a]]
    return pages


@given(data=st.data(), seed=st.integers(0, 2**16))
def test_commit_writes_the_path_and_nothing_else(data, seed):
    rng = np.random.default_rng(seed)
    table = 1 + rng.permutation(B * R).reshape(B, R)
    length = np.array(data.draw(st.lists(st.integers(0, R * C - A), min_size=B, max_size=B)))
    count = np.array(data.draw(st.lists(st.integers(0, A), min_size=B, max_size=B)))
    path = rng.integers(0, M, (B, A))
    pools = [rng.standard_normal((L * PAGES, K, C, H)).astype(np.float32) for _ in "kv"]
    new = [rng.standard_normal((L, B, M, K, H)).astype(np.float32) for _ in "kv"]
    ints = [jnp.asarray(x, jnp.int32) for x in (table, length, path, count)]
    cache = PagedCache(*map(jnp.asarray, pools), ints[0], ints[1], L)
    after = jax.jit(commit)(cache, KV(*map(jnp.asarray, new)), ints[2], ints[3])
    np.testing.assert_array_equal(after.length, length + count)
    trash = np.arange(L) * PAGES
    for before, rows, got in zip(pools, new, (after.k_pages, after.v_pages), strict=True):
        expected = committed(before, table, length, rows, path, count)
        np.testing.assert_array_equal(
            np.delete(got, trash, axis=0), np.delete(expected, trash, axis=0)
        )
    dense = gather(after).k
    for b in range(B):
        pages = np.asarray(after.k_pages).reshape(L, PAGES, K, C, H)[:, table[b]]
        rows = pages.transpose(0, 1, 3, 2, 4).reshape(L, R * C, K, H)
        np.testing.assert_array_equal(dense[:, b], rows)


# ---- what rounds leave behind ------------------------------------------------------------------

TREES = ["chain:3", "paths:[[0],[1],[0,0],[0,1],[1,0],[0,0,0]]", "dynamic:depth=3,width=2,nodes=6"]
TOKENS = 11
examples = settings(max_examples=10)


@pytest.fixture(scope="module")
def target(make_target):
    return make_target()


def state_of(target, draft, prompts, tree, temperature=0.0, **options):
    sampling = SamplingParams(temperature=temperature, seed=3)
    return start(
        target, draft, prompts, max_new_tokens=TOKENS, sampling=sampling, tree=tree,
        stop_token_ids=[], **options,
    )  # fmt: skip


@functools.partial(jax.jit, donate_argnums=0)
def poisoned(cache: PagedCache) -> PagedCache:
    """NaN in the trash page, in pages nobody holds and behind the length."""
    table_BR = cache.page_table
    start_BR = jnp.arange(table_BR.shape[1])[None] * cache.page_size
    slot_BRC = start_BR[:, :, None] + jnp.arange(cache.page_size)[None, None]
    valid_BRC = (slot_BRC < cache.length[:, None, None]) & (table_BR > 0)[:, :, None]
    valid_PC = jnp.zeros((cache.pages_per_layer, cache.page_size), bool)
    valid_PC = valid_PC.at[table_BR].max(valid_BRC).at[0].set(False)
    valid = jnp.tile(valid_PC, (cache.num_layers, 1))[:, None, :, None]
    return cache.replace(
        k_pages=jnp.where(valid, cache.k_pages, jnp.nan),
        v_pages=jnp.where(valid, cache.v_pages, jnp.nan),
    )


def tokens_of(state):
    return [
        row[:n].tolist()
        for row, n in zip(np.asarray(state.tokens), np.asarray(state.num_tokens), strict=True)
    ]


def run_rounds(target, draft, plan, state, *, poison: bool):
    head = draft.bind_head(target)
    while not np.asarray(state.done).all():
        if poison:
            caches = poisoned(state.cache), poisoned(state.draft_cache)
            state = state.replace(cache=caches[0], draft_cache=caches[1])
        state = decode(target, draft, head, plan, state, np.int32(1))
    return state


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(
    "tree, drafting, sync",
    [(TREES[0], "greedy", "all"), (TREES[1], "sampled", "last"), (TREES[2], "greedy", "all"),
     pytest.param(TREES[1], "greedy", "last", marks=pytest.mark.slow),
     pytest.param("dynamic:depth=3,width=2,nodes=11", "sampled", "last", marks=pytest.mark.slow)],
)  # fmt: skip
@given(seed=st.integers(0, 2**16), temperature=st.sampled_from([0.0, 1.0]))
@examples
def test_poison_in_unread_slots_changes_nothing(
    target, make_draft, ragged_prompts, tree, drafting, sync, seed, temperature
):
    """Random drafts, so random accept and reject patterns, and random trees where they are
    dynamic; poisoned before every round."""
    prompts, draft = ragged_prompts(4, seed), make_draft(seed)
    results = []
    for poison in (False, True):
        plan, state = state_of(
            target, draft, prompts, tree, temperature, drafting=drafting, draft_sync=sync
        )
        state = run_rounds(target, draft, plan, state, poison=poison)
        results.append((tokens_of(state), np.asarray(state.rounds).tolist()))
    assert results[0] == results[1]
    assert [len(tokens) for tokens in results[0][0]] == [TOKENS] * 4


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(
    "tree", [TREES[0], pytest.param(TREES[1], marks=pytest.mark.slow), TREES[2]]
)
@given(seed=st.integers(0, 2**16))
@example(seed=1457)  # rounds most of all that were seen
@examples
def test_pages_after_rounds_are_those_of_plain_decoding(
    target, make_draft, ragged_prompts, tree, seed
):
    """Target pages, and with sync "all" the draft's: every pair has the target's true feature."""
    prompts, draft = ragged_prompts(4, seed), make_draft(seed)
    plan, state = state_of(target, draft, prompts, tree)
    state = run_rounds(target, draft, plan, state, poison=False)
    length_B, draft_length_B = map(np.asarray, (state.cache.length, state.draft_cache.length))
    texts = [prompt + new for prompt, new in zip(prompts, tokens_of(state), strict=True)]
    plain_plan, plain = start(target, None, prompts, max_new_tokens=TOKENS, stop_token_ids=[])
    plain = decode(target, None, None, plain_plan, plain, np.int32(2**30))
    assert [p + t for p, t in zip(prompts, tokens_of(plain), strict=True)] == texts

    expected = true_draft_pages(target, draft, texts)
    for b in range(4):
        n = min(length_B[b], np.asarray(plain.cache.length)[b])
        assert n >= len(prompts[b]) + TOKENS - 1 - plan.path_length
        for got, want in zip(
            vars(gather(state.cache)).values(), vars(gather(plain.cache)).values(), strict=True
        ):
            assert_close(got[:, b, :n], want[:, b, :n])
        n = min(draft_length_B[b], len(texts[b]))
        assert n >= len(prompts[b])
        for got, want in zip(
            vars(gather(state.draft_cache)).values(), vars(expected).values(), strict=True
        ):
            assert_close(got[:, b, 1:n], want[:, b, 1:n])


def assert_close(got, want):
    """Within what rounds when sums have another order: 6e-6 of the largest number was seen."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def true_draft_pages(target, draft, texts):
    """Draft keys and values of whole texts from one full forward of the target."""
    width = 24
    tokens = np.zeros((len(texts), width), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return _true_draft_pages(target, draft, jnp.asarray(tokens))


@jax.jit
def _true_draft_pages(target, draft, tokens_BT):
    count, T = tokens_BT.shape
    features = target(tokens_BT, chain_tree(count, T), cache=None).features
    before = jnp.concatenate([jnp.zeros_like(features[:, :1]), features[:, :-1]], axis=1)
    position = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (count, T))
    mask = jnp.tril(jnp.ones((T, T), bool))[None] & (position > 0)[:, None, :]
    mask = mask | jnp.eye(T, dtype=bool)[None]
    _, kv = draft(target, tokens_BT, before, View(position=position, mask=mask))
    return kv
