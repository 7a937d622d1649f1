"""Models and states of real shapes without real weights, for compiling and for timing."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_eagle import Draft, SamplingParams, Target
from jax_eagle.config import DraftConfig, LlamaConfig, RopeScaling
from jax_eagle.eagle import abstract_draft_params
from jax_eagle.llama import abstract_params
from jax_eagle.prefill import PAGE_SIZE, Prefill, empty_prefill, first_round
from jax_eagle.sampling import Sampling
from jax_eagle.sharding import Backend, named_sharding, page_sharding, param_shardings
from jax_eagle.state import DecodeState, Plan
from jax_eagle.tree import parse_tree

LLAMA_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, rope_theta=500_000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), max_position=131_072, dtype="bfloat16",
)  # fmt: skip
"""Llama 3.1 8B."""

DRAFT_8B = DraftConfig.for_target(LLAMA_8B, num_layers=1, draft_vocab_size=32_000)
"""A draft of one dense layer with a reduced vocabulary."""


def make_plan(tree: str, batch: int) -> Plan:
    """The plan of rounds with this tree; "root" is plain decoding."""
    shape = parse_tree("paths:[]" if tree == "root" else tree, batch=batch, platform="gpu")
    return Plan(shape)


def make_state(
    target: Target, draft: Draft | None, plan: Plan, *, batch: int, context: int, room: int
) -> DecodeState:
    """A state whose rows have `context` tokens behind them (zeros in the pages) and `room` ahead.

    Under `jax.eval_shape` nothing is allocated.
    """
    pages = -(-(context + room + plan.path_length) // PAGE_SIZE)
    carry = empty_prefill(target, draft, batch, batch, pages)
    caches = [carry.cache, carry.draft_cache]
    carry = Prefill(
        *(c and c.replace(length=jnp.full(batch, context, jnp.int32)) for c in caches), *carry[2:]
    )
    stop_ids = jnp.full((batch, 8), -1, jnp.int32)
    limit = np.full(batch, room, np.int32)
    sampling = Sampling.stack([SamplingParams()] * batch)
    state = first_round(target, plan, carry, sampling, None, stop_ids, limit, width=room)
    # Rows of their own: alike they would all hit the same experts.
    root_B = jnp.arange(batch, dtype=jnp.int32) * 97 % target.config.vocab_size
    state = state.replace(root=root_B)
    if state.sync is None:
        return state
    tokens_BA = jnp.broadcast_to(root_B[:, None], state.sync.tokens.shape)
    return state.replace(sync=state.sync.replace(tokens=tokens_BA))


def abstract_models(
    config: LlamaConfig, draft_config: DraftConfig | None, backend: Backend
) -> tuple[Target, Draft | None]:
    """Target and draft of shapes alone, lying on the backend's mesh."""
    mesh = backend.mesh
    assert mesh is not None
    target = Target(_on_mesh(abstract_params(config), mesh), config, backend=backend)
    if draft_config is None:
        return target, None
    params = _on_mesh(abstract_draft_params(draft_config), mesh)
    U = draft_config.draft_vocab_size
    mapping = None if U is None else _replicated(jax.ShapeDtypeStruct((U,), jnp.int32), mesh)
    return target, Draft(params, mapping, draft_config)


def abstract_round(target: Target, draft: Draft | None, plan: Plan, *, batch: int, context: int):
    """Arguments of `decode` for one program, as shapes that lie on the target's mesh."""
    mesh = target.backend.mesh
    assert mesh is not None
    # Where arrays lie is said below; the constraints inside would want devices that exist.
    local = target.replace(backend=Backend())
    state = jax.eval_shape(
        lambda target, draft: make_state(
            target, draft, plan, batch=batch, context=context, room=128
        ),
        local, draft,
    )  # fmt: skip
    pools = {state.cache.k_pages.shape}
    if state.draft_cache is not None:
        pools.add(state.draft_cache.k_pages.shape)
    state = jax.tree.map(
        lambda x: x.update(
            sharding=page_sharding(mesh) if x.shape in pools else named_sharding(mesh)
        ),
        state,
    )
    head: Any = None
    if draft is not None:
        head = jax.eval_shape(lambda draft, target: draft.bind_head(target), draft, local)
        head = dataclasses.replace(head, backend=target.backend)
        head = jax.tree.map(lambda x: x.update(sharding=named_sharding(mesh, None, "vocab")), head)
    rounds = _replicated(jax.ShapeDtypeStruct((), jnp.int32), mesh)
    return target, draft, head, plan, state, rounds


def _on_mesh(boxed: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x, sharding: x.update(sharding=sharding),
        nn.unbox(boxed),
        param_shardings(boxed, mesh),
    )


def _replicated(x: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return x.update(sharding=named_sharding(mesh))
