"""Sequences that come and go: what a serving engine keeps on the device, and its programs.

A fixed number of slots, each with room for one sequence, share the page pools. Programs work on a
few slots at a time: they take the rows that a call names out of the tables, run the very functions
of `generate` on them, and put the rows back. The last slot is idle: calls of fewer sequences than
their bucket are filled up with it.

Pages belong to the host: every call gets the page tables of its rows. Programs run in the order in
which they are enqueued, so the host may give the pages of a finished sequence to another one while
a call that still names the old sequence is under way.

On a mesh pages are cut by heads, and tables over tokens along the vocabulary. All else is whole on
every device, and so is what a call gives out: the host reads it from any of them. Each program
leaves the slots cut in this one way, or the next one would be compiled again.

Boundary features. Draft slot i needs the target's feature of token i - 1. A sequence that finds its
first pages in the prefix cache continues behind them, so the feature of the last token of each full
page is kept beside the page (`Slots.boundary`), written by whoever fills it. No block is lost.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from .cache import PagedCache, init_cache
from .controls import Controls, Row
from .draft import Draft
from .generate import round_step
from .llama import Target
from .logprobs import MAX_TOP, Logprobs
from .packing import COMPILER_OPTIONS
from .prefill import Prefill, extend_prompt, first_token
from .sampling import Sampling, SamplingParams
from .sharding import Backend, page_sharding
from .state import DecodeState, Plan, init_state


class Slots(struct.PyTreeNode):
    """All slots; the page tables inside have no columns, calls bring their own."""

    state: DecodeState
    last_feature: Float[Array, "S F"]
    """Feature of the last prefilled token."""
    boundary: Float[Array, "P F"]
    """Feature of the last token of each full page."""


class Admission(struct.PyTreeNode):
    """What a sequence brings into its slot; host arrays of one row."""

    sampling: Sampling
    controls: Row | None
    """None: those of the slot's last sequence are only switched off."""
    wants_logprobs: np.ndarray
    stop_ids: np.ndarray
    max_tokens: np.int32
    tokens: np.ndarray
    """[O]: what the sequence has given out before (after a preemption)."""
    num_tokens: np.int32
    length: np.int32
    """Tokens whose pages were found in the prefix cache."""
    boundary_page: np.int32
    """The last of these pages; 0: there are none."""


class Outputs(struct.PyTreeNode):
    """What one call gave out, for its rows."""

    tokens: Int[Array, "B A"]
    count: Int[Array, "B"]
    """New tokens."""
    finish: Int[Array, "B"]
    """Index into FINISH_REASONS."""
    num_accepted: Int[Array, "B"]
    path_ranks: Int[Array, "B A"]
    length: Int[Array, "B"]
    """Tokens in the target's cache."""
    draft_length: Int[Array, "B"]
    """Tokens in the draft's cache."""
    logprobs: Logprobs


@functools.partial(
    jax.jit,
    static_argnames=(
        "num_slots", "num_pages", "page_size", "max_tokens", "path_length", "sync_length",
        "num_stop_ids",
    ),
)  # fmt: skip
def init_slots(
    target: Target,
    draft: Draft | None,
    *,
    num_slots: int,
    num_pages: int,
    page_size: int,
    max_tokens: int,
    path_length: int,
    sync_length: int,
    num_stop_ids: int,
) -> Slots:
    """Empty slots.

    Args:
      num_slots: without the idle one.
      num_pages: trash page included.
      max_tokens: room for new tokens of one sequence.
      path_length: A of the deepest tree.
      sync_length: pairs that may wait for the draft.
      num_stop_ids: stop tokens a sequence may have.
    """
    S, V = num_slots + 1, target.config.vocab_size
    table = jnp.zeros((S, 0), jnp.int32)
    make_cache = functools.partial(
        init_cache, num_pages=num_pages, page_size=page_size, mesh=target.backend.mesh
    )
    width = draft.config.feature_width if draft else 1
    feature_SF = jnp.zeros((S, width), target.config.dtype)
    idle = [SamplingParams()] * S
    state = init_state(
        make_cache(target.config, table),
        make_cache(draft.config.layer, table) if draft else None,
        jax.tree.map(jnp.asarray, Sampling.stack(idle)),
        _no_controls(S, V, target.backend),
        jnp.full((S, num_stop_ids), -1, jnp.int32),
        jnp.ones(S, jnp.int32),
        width=max_tokens, path_length=path_length, sync_length=sync_length, feature_BF=feature_SF,
    )  # fmt: skip
    state = state.replace(
        finish=jnp.ones(S, jnp.int32),  # nobody runs
        logprobs=Logprobs.empty(S, path_length, min(MAX_TOP, V), target.backend),
    )
    boundary_PF = jnp.zeros((num_pages, width), target.config.dtype)
    return _placed(target, Slots(state, feature_SF, boundary_PF))


def _no_controls(S: int, V: int, backend: Backend) -> Controls:
    row = jax.tree.map(jnp.asarray, Row.of(SamplingParams(), V))
    tables: Any = {name: jnp.repeat(x[None], S, axis=0) for name, x in vars(row).items()}
    return Controls(slot=jnp.arange(S, dtype=jnp.int32), **tables, backend=backend)


@functools.partial(jax.jit, donate_argnames=("slots",))
def admit(slots: Slots, slot: Int[Array, ""], new: Admission) -> Slots:
    """Puts a sequence into a slot; its prompt is prefilled next."""
    state = slots.state
    controls, logprobs = state.controls, state.logprobs
    assert controls is not None and logprobs is not None

    def put(table, row):
        return jax.tree.map(lambda x, y: x.at[slot].set(y), table, row)

    def put_length(cache: PagedCache) -> PagedCache:
        return cache.replace(length=put(cache.length, new.length))

    zero = jnp.int32(0)
    if new.controls is None:
        controls = controls.replace(active=put(controls.active, False))
    else:
        rows = {name: put(getattr(controls, name), row) for name, row in vars(new.controls).items()}
        controls = controls.replace(**rows)
    state = state.replace(
        cache=put_length(state.cache),
        draft_cache=state.draft_cache and put_length(state.draft_cache),
        sampling=put(state.sampling, new.sampling),
        controls=controls,
        stop_ids=put(state.stop_ids, new.stop_ids),
        max_tokens=put(state.max_tokens, new.max_tokens),
        tokens=put(state.tokens, new.tokens),
        num_tokens=put(state.num_tokens, new.num_tokens),
        finish=put(state.finish, zero),
        rounds=put(state.rounds, zero),
        num_accepted=put(state.num_accepted, zero),
        logprobs=logprobs.replace(wanted=put(logprobs.wanted, new.wants_logprobs)),
    )
    # The trash page's feature may be anything; a sequence from the beginning needs none.
    feature_F = jnp.where(new.boundary_page > 0, slots.boundary[new.boundary_page], 0)
    return slots.replace(state=state, last_feature=put(slots.last_feature, feature_F))


@functools.partial(jax.jit, donate_argnames=("slots",), compiler_options=COMPILER_OPTIONS)
def prefill(
    target: Target,
    draft: Draft | None,
    slots: Slots,
    slot_B: Int[Array, "B"],
    page_table_BR: Int[Array, "B R"],
    tokens_BT: Int[Array, "B T"],
    count_B: Int[Array, "B"],
    ready_B: Bool[Array, "B"],
    forced_B: Int[Array, "B"],
) -> tuple[Slots, Outputs]:
    """Adds a chunk to the prompts of a few slots; rows that are `ready` get their first token.

    Arguments and meaning: `extend_prompt` and `first_token`.
    """
    state = _take(slots.state, slot_B, page_table_BR)
    before = state
    feature_BF = slots.last_feature[slot_B]
    last_x_BD = jnp.zeros((slot_B.shape[0], target.config.hidden_size), target.config.dtype)
    carry = Prefill(state.cache, state.draft_cache, last_x_BD, feature_BF)
    carry, features_BTF = extend_prompt(target, draft, carry, tokens_BT, count_B)
    state = state.replace(cache=carry.cache, draft_cache=carry.draft_cache)
    state = first_token(target, state, carry.last_x, carry.last_feature, ready_B, forced_B)
    if draft is not None:
        boundary = _keep_boundaries(slots.boundary, before.cache, features_BTF, count_B)
        last = slots.last_feature.at[slot_B].set(carry.last_feature)
        slots = slots.replace(boundary=boundary, last_feature=last)
    slots = slots.replace(state=_put(slots.state, slot_B, state))
    return _placed(target, slots), _placed(target, _outputs(before, state))


@functools.partial(
    jax.jit,
    static_argnames=("plan",),
    donate_argnames=("slots",),
    compiler_options=COMPILER_OPTIONS,
)
def decode(
    target: Target,
    draft: Draft | None,
    head: Callable | None,
    plan: Plan,
    slots: Slots,
    slot_B: Int[Array, "B"],
    page_table_BR: Int[Array, "B R"],
) -> tuple[Slots, Outputs]:
    """One round of a few slots: the `round_step` of `generate`.

    In plain decoding the draft does not run; its cache falls behind by one pair a round, which
    wait in `state.sync` for `catch_up`.
    """
    before = _take(slots.state, slot_B, page_table_BR)
    state = round_step(target, draft, head, plan, before)
    if state.sync is not None:
        features_BAF = state.sync.features[:, : plan.path_length]
        if plan.plain:
            last_B11 = jnp.maximum(state.sync.count - 1, 0)[:, None, None]
            features_BAF = jnp.take_along_axis(state.sync.features, last_B11, axis=1)
        count_B = state.cache.length - before.cache.length
        boundary = _keep_boundaries(slots.boundary, before.cache, features_BAF, count_B)
        slots = slots.replace(boundary=boundary)
    slots = slots.replace(state=_put(slots.state, slot_B, state))
    return _placed(target, slots), _placed(target, _outputs(before, state))


@functools.partial(jax.jit, donate_argnames=("slots",), compiler_options=COMPILER_OPTIONS)
def catch_up(
    target: Target,
    draft: Draft,
    slots: Slots,
    slot_B: Int[Array, "B"],
    page_table_BR: Int[Array, "B R"],
) -> Slots:
    """Brings the draft's cache up to date in one pass; only the root's pair still waits then.

    The root is needed once more by the sync pass of the next speculative round.
    """
    state = _take(slots.state, slot_B, page_table_BR)
    sync, cache = state.sync, state.draft_cache
    assert sync is not None and cache is not None
    last_B1 = jnp.maximum(sync.count - 1, 0)[:, None]
    cache, _ = draft.extend(target, cache, sync.replace(count=last_B1[:, 0]))
    sync = sync.restart(
        tokens=jnp.take_along_axis(sync.tokens, last_B1, axis=1),
        features=jnp.take_along_axis(sync.features, last_B1[:, :, None], axis=1),
        count=jnp.minimum(sync.count, 1),
    )
    state = state.replace(draft_cache=cache, sync=sync)
    return _placed(target, slots.replace(state=_put(slots.state, slot_B, state)))


def _outputs(before: DecodeState, state: DecodeState) -> Outputs:
    """The tokens behind those of `before`."""
    assert state.logprobs is not None
    A, last = state.path_ranks.shape[1], state.tokens.shape[1] - 1
    column_BA = before.num_tokens[:, None] + jnp.arange(A, dtype=jnp.int32)[None]
    cache, draft_cache = state.cache, state.draft_cache
    return Outputs(
        tokens=jnp.take_along_axis(state.tokens, jnp.minimum(column_BA, last), axis=1),
        count=state.num_tokens - before.num_tokens,
        finish=state.finish,
        num_accepted=state.num_accepted,
        path_ranks=state.path_ranks,
        length=cache.length,
        draft_length=cache.length if draft_cache is None else draft_cache.length,
        logprobs=state.logprobs,
    )


def _keep_boundaries(boundary_PF, cache: PagedCache, features_BAF, count_B):
    """Stores the features of new tokens that fill a page; `cache` is that before the tokens."""
    C, A = cache.page_size, features_BAF.shape[1]
    step_1A = jnp.arange(A, dtype=jnp.int32)[None]
    position_BA = cache.length[:, None] + step_1A
    fills_BA = (step_1A < count_B[:, None]) & (position_BA % C == C - 1)
    column_BA = jnp.minimum(position_BA // C, cache.page_table.shape[1] - 1)
    page_BA = jnp.take_along_axis(cache.page_table, column_BA, axis=1)
    page_BA = jnp.where(fills_BA, page_BA, 0)
    return boundary_PF.at[page_BA].set(features_BAF.astype(boundary_PF.dtype))


def _placed(target: Target, tables: Any) -> Any:
    """Slots or outputs where they belong on the target's mesh, whichever program made them."""
    mesh, shard = target.backend.mesh, target.backend.shard
    if mesh is None:
        return tables
    pages = functools.partial(jax.lax.with_sharding_constraint, shardings=page_sharding(mesh))

    def placed(x):
        if isinstance(x, Controls):
            return x.spread()
        if not isinstance(x, PagedCache):
            return shard(x)
        return x.replace(k_pages=pages(x.k_pages), v_pages=pages(x.v_pages), length=shard(x.length))

    return jax.tree.map(placed, tables, is_leaf=lambda x: isinstance(x, PagedCache | Controls))


class _Shared(struct.PyTreeNode):
    """What sequences do not have rows of their own in: it passes through a call whole."""

    pages: tuple
    draft_pages: tuple | None
    controls: Controls | None


def _split(state: DecodeState) -> tuple[_Shared, DecodeState]:
    def pages(cache: PagedCache) -> tuple:
        return cache.k_pages, cache.v_pages, cache.page_table

    def without(cache: PagedCache) -> PagedCache:
        return cache.replace(k_pages=None, v_pages=None, page_table=None)

    draft = state.draft_cache
    shared = _Shared(pages(state.cache), draft and pages(draft), state.controls)
    rows = state.replace(
        cache=without(state.cache), draft_cache=draft and without(draft), controls=None
    )
    return shared, rows


def _join(shared: _Shared, rows: DecodeState, table_BR, slot_B) -> DecodeState:
    def cache(pages: tuple, row: PagedCache) -> PagedCache:
        k_pages, v_pages, _ = pages
        return row.replace(k_pages=k_pages, v_pages=v_pages, page_table=table_BR)

    draft_cache = None
    if shared.draft_pages is not None and rows.draft_cache is not None:
        draft_cache = cache(shared.draft_pages, rows.draft_cache)
    return rows.replace(
        cache=cache(shared.pages, rows.cache),
        draft_cache=draft_cache,
        controls=shared.controls and shared.controls.replace(slot=slot_B),
    )


def _take(state: DecodeState, slot_B, page_table_BR) -> DecodeState:
    """The rows of a few slots, with their page tables; pools and controls are those of all."""
    shared, rows = _split(state)
    return _join(shared, jax.tree.map(lambda x: x[slot_B], rows), page_table_BR, slot_B)


def _put(state: DecodeState, slot_B, new: DecodeState) -> DecodeState:
    """`state` with the rows of `new` in their slots, and its pools and controls."""
    _, old_rows = _split(state)
    shared, new_rows = _split(new)
    rows = jax.tree.map(lambda x, y: x.at[slot_B].set(y), old_rows, new_rows)
    controls = state.controls
    return _join(shared, rows, state.cache.page_table, controls.slot if controls else slot_B)
