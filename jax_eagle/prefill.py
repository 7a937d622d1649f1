"""From prompts to the state of the first round: checks, pages, chunked prefill, first token.

Everything that `generate` does on the host before its loop. Batch size, pages a row and lengths are
rounded up to few sizes, so that programs are reused. On a mesh with a data axis each rank has
as many rows, and counts its pages and the rows of its tables from 0.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.compat import order_after

from .cache import PagedCache, commit, init_cache
from .controls import Controls, shape_logits, stack_controls
from .draft import Draft, Sync
from .llama import Target
from .packing import COMPILER_OPTIONS
from .sampling import Sampling, SamplingParams, draw
from .sharding import data_size, over_data, rows_per_rank
from .state import DecodeState, Plan, emit, init_state
from .tree import StaticTree, chain_tree, parse_tree

PAGE_SIZE = 64
_PREFILL_CHUNK = 256
_STOP_IDS = 8


class Prefill(NamedTuple):
    """What prefill carries from chunk to chunk."""

    cache: PagedCache
    draft_cache: PagedCache | None
    last_x: Array
    """[B, D], the head's input at the last prompt token seen so far."""
    last_feature: Array
    """[B, F], the feature of that token."""


def extend_prompt(target: Target, draft: Draft | None, carry: Prefill, tokens_BT, count_B):
    """Adds count_B tokens of a chunk [B, T] to the caches (the rest of the row is padding).

    Returns the carry and the features of the chunk, [B, T, F].
    """
    B, T = tokens_BT.shape
    row_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    taps, live_BT = draft.config.taps if draft else (), row_BT < count_B[:, None]
    out = target(tokens_BT, chain_tree(B, T), carry.cache, taps, live_BT)
    cache = commit(carry.cache, out.new_kv, row_BT, order_after(out.x, count_B))
    draft_cache = carry.draft_cache
    if draft is not None and draft_cache is not None:
        before_BTF = jnp.concatenate([carry.last_feature[:, None], out.features[:, :-1]], axis=1)
        draft_cache, _ = draft.extend(target, draft_cache, Sync(tokens_BT, before_BTF, count_B))

    def last(x_BTD, before_BD):
        index_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
        return jnp.where(
            (count_B > 0)[:, None], jnp.take_along_axis(x_BTD, index_B11, axis=1)[:, 0], before_BD
        )

    carry = Prefill(
        cache, draft_cache, last(out.x, carry.last_x), last(out.features, carry.last_feature)
    )
    return carry, out.features


@functools.partial(jax.jit, donate_argnames=("carry",), compiler_options=COMPILER_OPTIONS)
def prefill_chunk(target: Target, draft: Draft | None, carry: Prefill, tokens_BT, count_B):
    """`extend_prompt` as a program."""

    def extend(models, rows):
        return extend_prompt(*models, *rows)[0]

    return over_data(extend, target.backend.mesh)((target, draft), (carry, tokens_BT, count_B))


def first_token(
    target: Target,
    state: DecodeState,
    last_x_BD: Float[Array, "B D"],
    last_feature_BF: Float[Array, "B F"],
    ready_B: Bool[Array, "B"],
    forced_B: Int[Array, "B"] | None = None,
) -> DecodeState:
    """Draws and gives out the token behind the prompt where a row is `ready`.

    `forced` tokens (-1: none) are given out in its place: a sequence that goes on where it was
    interrupted.
    """
    logits_B1V = target.head(last_x_BD)[:, None]
    B = ready_B.shape[0]
    zero_B1 = jnp.zeros((B, 1), jnp.int32)
    shaped = shape_logits(
        state.controls, logits_B1V, chain_tree(B, 1), zero_B1,
        state.tokens, state.num_tokens, state.stop_ids,
    )  # fmt: skip
    token_B1 = draw(shaped, state.sampling, state.cache.length[:, None], backend=target.backend)
    if forced_B is not None:
        token_B1 = jnp.where(forced_B[:, None] >= 0, forced_B[:, None], token_B1)
    error_B = ready_B & (token_B1[:, 0] < 0)
    root_B = jnp.maximum(token_B1[:, 0], 0)
    sync, logprobs = state.sync, state.logprobs
    if sync is not None:
        restarted = sync.restart(root_B[:, None], last_feature_BF[:, None], jnp.ones_like(root_B))
        sync = jax.tree.map(functools.partial(_where_row, ready_B), restarted, sync)
    state = emit(state, token_B1, jnp.where(ready_B & ~error_B, 1, 0), error_B)
    return state.replace(
        root=jnp.where(ready_B, root_B, state.root),
        sync=sync,
        logprobs=logprobs and logprobs.of(logits_B1V, zero_B1, token_B1),
    )


def _where_row(where_B, new, old):
    return jnp.where(jnp.reshape(where_B, (-1,) + (1,) * (new.ndim - 1)), new, old)


def first_round(
    target: Target,
    plan: Plan,
    carry: Prefill,
    sampling: Sampling,
    controls: Controls | None,
    stop_ids_BE,
    max_tokens_B,
    *,
    width: int,
) -> DecodeState:
    """The state of the first round, from what prefill left; there is room for `width` tokens."""
    lengths = plan.path_length, plan.sync_length, width  # not the plan: trees of one depth share it
    requests = sampling, controls, stop_ids_BE, max_tokens_B
    return _first_round(target, lengths, carry[:2], carry[2:], requests)


@functools.partial(jax.jit, static_argnames=("lengths",), donate_argnames=("caches",))
def _first_round(target, lengths, caches, last, requests):
    path_length, sync_length, width = lengths

    def begin(target, rows):
        (cache, draft_cache), (last_x_BD, last_feature_BF), requests = rows
        sampling, controls, stop_ids_BE, max_tokens_B = requests
        state = init_state(
            cache, draft_cache, sampling, controls, stop_ids_BE, max_tokens_B, width=width,
            path_length=path_length, sync_length=sync_length, feature_BF=last_feature_BF,
        )  # fmt: skip
        ready_B = jnp.ones(max_tokens_B.shape, bool)
        return first_token(target, state, last_x_BD, last_feature_BF, ready_B)

    return over_data(begin, target.backend.mesh)(target, (caches, last, requests))


def start(
    target: Target,
    draft: Draft | None,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    tree: str = "auto",
    stop_token_ids: Sequence[int] | None = None,
    drafting: str = "greedy",
    draft_sync: str = "all",
) -> tuple[Plan, DecodeState]:
    """Checks the request, reserves pages, prefills the prompts and draws their first tokens.

    Arguments and errors are those of `generate`.
    """
    ids = _check_prompts(target, prompts)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    max_new_tokens = min(max_new_tokens, target.config.max_position)
    params = [sampling] * len(ids) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(params) != len(ids):
        raise ValueError(f"{len(params)} sampling parameters for {len(ids)} prompts")
    for own in params:
        own.check_tokens(target.config.vocab_size)
    mesh = target.backend.mesh
    rows = rows_per_rank(len(ids), mesh)
    plan = _make_plan(draft, rows, tree, drafting, draft_sync)
    if plan.plain:
        draft = None

    rows = _bucket(rows, halves=False)
    B = rows * data_size(mesh)
    pad = B - len(ids)
    prompt_length = np.array([len(row) for row in ids] + [0] * pad, np.int32)
    limit = np.minimum(max_new_tokens, target.config.max_position - prompt_length)
    limit[len(ids) :] = 0
    reserved = int((prompt_length + limit).max()) + plan.path_length
    pages_per_row = _bucket(-(-reserved // PAGE_SIZE))
    carry = empty_prefill(target, draft, B, len(ids), pages_per_row)
    controls = stack_controls(params, target.config.vocab_size, ids, B, target.backend)
    model = target.replace(tokenizer=None)
    chunk = min(_PREFILL_CHUNK, max(16, _bucket(int(prompt_length.max()), halves=False)))
    for begin in range(0, int(prompt_length.max()), chunk):
        block = np.zeros((B, chunk), np.int32)
        for b, row in enumerate(ids):
            piece = row[begin : begin + chunk]
            block[b, : len(piece)] = piece
        count = np.clip(prompt_length - begin, 0, chunk)
        carry = prefill_chunk(model, draft, carry, block, count)
    return plan, first_round(
        model,
        plan,
        carry,
        Sampling.stack(params + [SamplingParams()] * pad),
        controls and controls.replace(slot=controls.slot % rows),  # each rank has its own tables
        _stop_ids(target, stop_token_ids, B),
        limit,
        width=_bucket(max_new_tokens),
    )


def _check_prompts(target: Target, prompts) -> list[list[int]]:
    if isinstance(prompts, str):
        raise ValueError("prompts is one text, expected a list of texts or of token ids")
    if not len(prompts):
        raise ValueError("no prompts given")
    context, vocab = target.config.max_position, target.config.vocab_size
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            prompt = target.require_tokenizer().encode(prompt)
        row = [int(token) for token in prompt]
        if not row:
            raise ValueError(f"prompt {i} is empty")
        if len(row) >= context:
            raise ValueError(f"prompt {i} has {len(row)} tokens, the context holds {context}")
        if min(row) < 0 or max(row) >= vocab:
            raise ValueError(f"prompt {i} holds token ids outside 0..{vocab - 1}")
        rows.append(row)
    return rows


def _make_plan(draft: Draft | None, batch: int, tree: str, drafting: str, draft_sync: str) -> Plan:
    platform = jax.default_backend()
    if drafting not in ("greedy", "sampled"):
        raise ValueError(f"drafting is {drafting!r}, expected 'greedy' or 'sampled'")
    if draft_sync not in ("all", "last"):
        raise ValueError(f"draft_sync is {draft_sync!r}, expected 'all' or 'last'")
    shape = parse_tree(tree, batch=batch, platform=platform)
    if draft is None or not shape.max_depth:
        return Plan(StaticTree(()))
    if drafting == "sampled" and not shape.keeps_all:
        raise ValueError(
            "sampled drafting is lossless only if no drawn node is dropped: give the dynamic tree "
            f"nodes={shape.pool_size} for its depth and width, or use greedy drafting"
        )
    limit = draft.config.draft_vocab_size or draft.config.layer.vocab_size
    if shape.max_children > limit:
        raise ValueError(f"tree {tree!r} is wider than the draft vocabulary of {limit} tokens")
    return Plan(shape, drafting == "sampled", draft_sync == "all")


def empty_prefill(
    target: Target, draft: Draft | None, B: int, rows: int, pages_per_row: int
) -> Prefill:
    """Caches of B rows in which each of the first `rows` has its own pages; page 0 is trash.

    Each rank of the data axis has page ids and a trash page of its own.
    """
    mesh = target.backend.mesh
    per_rank = rows_per_rank(B, mesh)
    table = 1 + np.arange(per_rank * pages_per_row, dtype=np.int32).reshape(per_rank, -1)
    table = np.tile(table, (data_size(mesh), 1))
    table[rows:] = 0
    make_cache = functools.partial(
        init_cache, num_pages=1 + per_rank * pages_per_row, page_size=PAGE_SIZE, mesh=mesh
    )
    dtype, width = target.config.dtype, target.config.hidden_size
    return Prefill(
        cache=make_cache(target.config, jnp.array(table)),
        draft_cache=make_cache(draft.config.layer, jnp.array(table)) if draft else None,
        last_x=jnp.zeros((B, width), dtype),
        last_feature=jnp.zeros((B, draft.config.feature_width if draft else width), dtype),
    )


def _stop_ids(target: Target, stop_token_ids: Sequence[int] | None, B: int) -> np.ndarray:
    ids = list(target.config.stop_token_ids if stop_token_ids is None else stop_token_ids)
    width = max(_STOP_IDS, _bucket(max(len(ids), 1)))
    return np.tile(np.array(ids + [-1] * (width - len(ids)), np.int32), (B, 1))


def _bucket(n: int, *, halves: bool = True) -> int:
    """The next power of two, or with `halves` one and a half times one, so few shapes compile."""
    size = 1
    while size < n:
        size *= 2
    return size * 3 // 4 if halves and size >= 4 and n <= size * 3 // 4 else size
