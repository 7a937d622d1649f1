"""The compiled decode loop updates the page pools in place: aliased, and never copied."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eagle import Draft, Target
from jax_eagle.config import DraftConfig, LlamaConfig
from jax_eagle.eagle import init_draft_params
from jax_eagle.generate import decode
from jax_eagle.llama import init_params
from jax_eagle.prefill import start

CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=2,
    head_dim=64, max_position=4096,
)  # fmt: skip


@functools.cache
def compiled(tree: str | None, sync: str, new_tokens: int, *, donate: bool = True):
    """(compiled decode loop, its page pools)."""
    target = Target(init_params(CONFIG, jax.random.key(0)), CONFIG)
    draft = None
    if tree is not None:
        draft_config = DraftConfig.for_target(CONFIG, draft_vocab_size=16)
        params = init_draft_params(draft_config, jax.random.key(1))
        draft = Draft(params, jnp.arange(16, dtype=jnp.int32) * 2, draft_config)
    options = {"tree": tree or "auto", "stop_token_ids": [], "draft_sync": sync}
    plan, state = start(target, draft, [[1, 2]] * 3, max_new_tokens=new_tokens, **options)
    pools = [state.cache.k_pages, state.cache.v_pages]
    if state.draft_cache is not None:
        pools += [state.draft_cache.k_pages, state.draft_cache.v_pages]
    head = draft.bind_head(target) if draft is not None else None
    loop = decode if donate else jax.jit(decode.__wrapped__, static_argnames="plan")
    return loop.lower(target, draft, head, plan, state, np.int32(1)).compile(), pools


def copies(program, pools) -> list[str]:
    """The lines of the compiled program that copy a whole pool."""
    shapes = {f"= f32[{','.join(map(str, pool.shape))}]" for pool in pools}
    lines = program.as_text().splitlines()
    return [line for line in lines if " copy(" in line and any(shape in line for shape in shapes)]


@pytest.mark.parametrize(
    "tree, sync",
    [(None, "all"), pytest.param("chain:3", "all", marks=pytest.mark.slow), ("static:8", "last"),
     ("dynamic:depth=3,width=3,nodes=8", "all")],
)  # fmt: skip
def test_pools_are_updated_in_place(tree, sync):
    program, pools = compiled(tree, sync, 500)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(pool.nbytes for pool in pools)
    assert not copies(program, pools)


def test_the_search_finds_the_copies_of_a_loop_that_owns_nothing():
    program, pools = compiled(None, "all", 500, donate=False)
    assert program.memory_analysis().alias_size_in_bytes == 0
    assert len(copies(program, pools)) >= len(pools)


def test_temporaries_do_not_grow_with_the_pool():
    small, few = compiled(None, "all", 500)
    large, many = compiled(None, "all", 1000)
    pool_growth = sum(p.nbytes for p in many) - sum(p.nbytes for p in few)
    growth = large.memory_analysis().temp_size_in_bytes - small.memory_analysis().temp_size_in_bytes
    # What grows is what the attention of one layer gathers, not that of all layers.
    assert pool_growth > 0 and growth < 1.1 * pool_growth / CONFIG.num_layers
