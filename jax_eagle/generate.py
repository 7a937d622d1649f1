"""Speculative generation: the paper's decode loop, top to bottom (arXiv 2508.08192, inference).

`round_step` is one round: the draft grows a tree under the last committed token, the target sees
all its nodes in one forward, verification keeps the longest supported path and adds a bonus token,
and the path's keys and values are committed. `generate` prefills the prompts in chunks and runs
rounds in one jitted while_loop. Plain decoding is the same round with a tree of one node.

Invariants. Between rounds the root (the last token given out) is not in the target's cache. The
draft's cache lacks the tokens of `sync`. Finished rows stay in the batch and write to the trash
page only. Nothing reads a host value inside the loop.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from pallas_kernels.compat import order_after

from .cache import PagedCache, commit, init_cache
from .draft import Draft, Proposal, Sync
from .llama import Target, TargetOutput
from .sampling import Sampling, SamplingParams, draw
from .tree import StaticTree, TreeShape, chain_tree, parse_tree
from .verify import Verdict, verify

FINISH_REASONS = ("", "stop", "length", "error")
_RUNNING, _STOP, _LENGTH, _ERROR = range(4)

PAGE_SIZE = 64
_PREFILL_CHUNK = 256
_STOP_IDS = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled into a decode program; static and hashable."""

    shape: TreeShape
    sampled_drafting: bool = False
    sync_all: bool = True
    """Re-synchronise the draft with all accepted tokens, or with the last ones only (the paper)."""

    @property
    def path_length(self) -> int:
        """A: nodes of the longest path, root included."""
        return self.shape.max_depth + 1

    @property
    def sync_length(self) -> int:
        """Rows of the sync pass."""
        return self.path_length if self.sync_all else min(self.path_length, 2)


class DecodeState(struct.PyTreeNode):
    """Everything a batch of sequences carries from round to round."""

    cache: PagedCache
    draft_cache: PagedCache | None
    """Same page table as `cache`; None for plain decoding."""
    root: Int[Array, "B"]
    """Last token given out; its keys and values are not cached yet."""
    sync: Sync | None
    """What the draft's cache lacks, the root last; None for plain decoding."""
    sampling: Sampling
    stop_ids: Int[Array, "B E"]
    """Tokens that end a sequence, padded with -1."""
    max_tokens: Int[Array, "B"]
    tokens: Int[Array, "B O"]
    """Tokens given out so far."""
    num_tokens: Int[Array, "B"]
    finish: Int[Array, "B"]
    """Index into FINISH_REASONS; 0 while running."""
    rounds: Int[Array, "B"]
    """Target calls after prefill."""
    num_accepted: Int[Array, "B"]
    """Draft nodes accepted in the last round, before any cut at a stop token or the limit."""
    path_ranks: Int[Array, "B A"]
    """Sibling ranks along the last round's path, root first; for acceptance statistics."""

    @property
    def done(self) -> Bool[Array, "B"]:
        """Finished rows."""
        return self.finish != _RUNNING


def round_step(target: Target, draft: Draft | None, head, plan: Plan, state: DecodeState):
    """One round: draft, verify, commit, advance. `head` is `draft.bind_head(target)`."""
    with jax.named_scope("draft"):
        draft_cache, proposal = propose(target, draft, head, plan, state)
        tree, tree_tokens = proposal.tree, proposal.tokens
    with jax.named_scope("target"):
        out = target(tree_tokens, tree, state.cache)
        logits = target.head(out.x)
    with jax.named_scope("verify"):
        verdict = verify(
            tree, tree_tokens, proposal.law, logits, state.cache.length, state.sampling,
            max_depth=plan.shape.max_depth, max_children=max_children(plan.shape),
        )  # fmt: skip
        count = order_after(out.x, jnp.where(state.done, 0, verdict.num_accepted + 1))
    with jax.named_scope("commit"):
        cache = commit(state.cache, out.new_kv, verdict.path, count)
        if draft_cache is not None and not plan.sync_all:
            draft_cache = keep_scratch(draft_cache, proposal, verdict, state.done)
    state = state.replace(cache=cache, draft_cache=draft_cache)
    return advance(plan, state, proposal, out, verdict)


def propose(target, draft: Draft | None, head, plan: Plan, state: DecodeState):
    """The draft's tree, or the root alone without a draft."""
    if draft is None:
        root_B1 = state.root[:, None]
        tree = chain_tree(root_B1.shape[0], 1)
        return None, Proposal(tree, root_B1, jnp.zeros_like(root_B1), law=None, scratch=None)
    sampling = state.sampling if plan.sampled_drafting else None
    return draft.expand(target, head, plan.shape, state.draft_cache, state.sync, sampling)


def max_children(shape: TreeShape) -> int:
    """The most children that any node of the tree can have."""
    return max((level.width for level in shape.levels), default=0)


def keep_scratch(cache: PagedCache, proposal: Proposal, verdict: Verdict, done_B) -> PagedCache:
    """The paper's cheap sync: accepted tokens keep the draft KV computed from estimated features.

    The last accepted node is left to the sync pass: as a leaf it may never have been expanded.
    """
    if proposal.scratch is None:
        return cache
    inner_BA = verdict.path[:, 1:-1]
    scratch_BA = jnp.maximum(jnp.take_along_axis(proposal.expanded, inner_BA, axis=1) - 1, 0)
    count_B = jnp.where(done_B, 0, jnp.maximum(verdict.num_accepted - 1, 0))
    return commit(cache, proposal.scratch, scratch_BA, count_B)


def advance(
    plan: Plan, state: DecodeState, proposal: Proposal, out: TargetOutput, verdict: Verdict
) -> DecodeState:
    """Gives out the new tokens, cuts at stop tokens and limits, prepares the next root and sync."""
    step_1A = jnp.arange(plan.path_length, dtype=jnp.int32)[None]
    accepted_B1 = verdict.num_accepted[:, None]
    path_tokens_BA = jnp.take_along_axis(proposal.tokens, verdict.path, axis=1)
    new_BA = jnp.where(
        step_1A < accepted_B1, jnp.roll(path_tokens_BA, -1, axis=1), verdict.bonus[:, None]
    )
    count_B = verdict.num_accepted + jnp.where(verdict.error, 0, 1)
    running_B = ~state.done
    state = emit(state, new_BA, count_B, verdict.error)
    path_ranks_BA = jnp.take_along_axis(proposal.tree.rank, verdict.path, axis=1)
    return state.replace(
        root=jnp.where(running_B & ~verdict.error, verdict.bonus, state.root),
        sync=None if state.sync is None else _next_sync(plan, new_BA, out, verdict, state.done),
        rounds=state.rounds + running_B.astype(jnp.int32),
        num_accepted=jnp.where(running_B, verdict.num_accepted, 0),
        path_ranks=path_ranks_BA,
    )


def _next_sync(plan: Plan, new_BA, out: TargetOutput, verdict: Verdict, done_B) -> Sync:
    """Accepted tokens and the bonus, each with the target's feature of the token before it."""
    skipped_B = 0 * verdict.num_accepted
    if not plan.sync_all:
        skipped_B = jnp.maximum(verdict.num_accepted - 1, 0)
    row_BA = skipped_B[:, None] + jnp.arange(plan.sync_length, dtype=jnp.int32)[None]
    row_BA = jnp.minimum(row_BA, verdict.num_accepted[:, None])
    node_BA = jnp.take_along_axis(verdict.path, row_BA, axis=1)
    return Sync(
        tokens=jnp.maximum(jnp.take_along_axis(new_BA, row_BA, axis=1), 0),
        features=jnp.take_along_axis(out.features, node_BA[:, :, None], axis=1),
        count=jnp.where(done_B, 0, verdict.num_accepted + 1 - skipped_B),
    )


def emit(state: DecodeState, new_BA, count_B, error_B) -> DecodeState:
    """Appends new_BA[:count] to the running rows, up to the first stop token and the limit."""
    B, A = new_BA.shape
    step_1A = jnp.arange(A, dtype=jnp.int32)[None]
    stop_BA = jnp.any(new_BA[:, :, None] == state.stop_ids[:, None, :], axis=2)
    stop_BA &= step_1A < count_B[:, None]
    until_stop_B = jnp.where(jnp.any(stop_BA, axis=1), jnp.argmax(stop_BA, axis=1) + 1, A + 1)
    room_B = state.max_tokens - state.num_tokens
    kept_B = jnp.minimum(jnp.minimum(count_B, room_B), until_stop_B.astype(jnp.int32))
    kept_B = jnp.where(state.done, 0, kept_B)

    width = state.tokens.shape[1]
    column_BA = jnp.where(step_1A < kept_B[:, None], state.num_tokens[:, None] + step_1A, width)
    tokens_BO = state.tokens.at[jnp.arange(B)[:, None], column_BA].set(new_BA, mode="drop")
    finish_B = jnp.where(kept_B == room_B, _LENGTH, jnp.where(error_B, _ERROR, _RUNNING))
    finish_B = jnp.where(kept_B == until_stop_B, _STOP, finish_B).astype(jnp.int32)
    return state.replace(
        tokens=tokens_BO,
        num_tokens=state.num_tokens + kept_B,
        finish=jnp.where(state.done, state.finish, finish_B),
    )


@functools.partial(jax.jit, static_argnames=("plan",), donate_argnames=("state",))
def decode(
    target: Target, draft: Draft | None, plan: Plan, state: DecodeState, max_rounds: Int[Array, ""]
) -> DecodeState:
    """Rounds until every row is finished, `max_rounds` at most. The state is donated."""
    head = draft.bind_head(target) if draft is not None else None

    def unfinished(carry):
        state, rounds = carry
        return (rounds < max_rounds) & ~jnp.all(state.done)

    def step(carry):
        state, rounds = carry
        return round_step(target, draft, head, plan, state), rounds + 1

    return jax.lax.while_loop(unfinished, step, (state, jnp.int32(0)))[0]


class Prefill(NamedTuple):
    """What prefill carries from chunk to chunk."""

    cache: PagedCache
    draft_cache: PagedCache | None
    last_x: Array
    """[B, D], the head's input at the last prompt token seen so far."""
    last_feature: Array
    """[B, F], the feature of that token."""


@functools.partial(jax.jit, donate_argnames=("carry",))
def prefill_chunk(target: Target, draft: Draft | None, carry: Prefill, tokens_BT, count_B):
    """Adds count_B tokens of a chunk [B, T] to the caches (the rest of the row is padding)."""
    B, T = tokens_BT.shape
    out = target(tokens_BT, chain_tree(B, T), carry.cache)
    row_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    cache = commit(carry.cache, out.new_kv, row_BT, order_after(out.x, count_B))
    draft_cache = carry.draft_cache
    if draft is not None:
        before_BTF = jnp.concatenate([carry.last_feature[:, None], out.features[:, :-1]], axis=1)
        draft_cache, _ = draft.extend(target, draft_cache, Sync(tokens_BT, before_BTF, count_B))

    def last(x_BTD, before_BD):
        index_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
        return jnp.where(
            (count_B > 0)[:, None], jnp.take_along_axis(x_BTD, index_B11, axis=1)[:, 0], before_BD
        )

    return Prefill(
        cache, draft_cache, last(out.x, carry.last_x), last(out.features, carry.last_feature)
    )


def first_token(
    target: Target, plan: Plan, carry: Prefill, sampling: Sampling, stop_ids_BE, max_tokens_B, width
) -> DecodeState:
    """Samples the first token at the end of prefill and builds the state of the rounds."""
    caches, last = carry[:2], carry[2:]
    return _first_token(
        target, plan, caches, last, sampling, stop_ids_BE, max_tokens_B, width=width
    )


@functools.partial(jax.jit, static_argnames=("plan", "width"), donate_argnames=("caches",))
def _first_token(target, plan: Plan, caches, last, sampling, stop_ids_BE, max_tokens_B, *, width):
    carry = Prefill(*caches, *last)
    B = max_tokens_B.shape[0]
    token_B1 = draw(target.head(carry.last_x)[:, None], sampling, carry.cache.length[:, None])
    zeros_B = jnp.zeros(B, jnp.int32)
    sync = None
    if carry.draft_cache is not None:
        A = plan.sync_length
        sync = Sync(
            tokens=jnp.broadcast_to(jnp.maximum(token_B1, 0), (B, A)),
            features=jnp.broadcast_to(
                carry.last_feature[:, None], (B, A, carry.last_feature.shape[1])
            ),
            count=jnp.ones(B, jnp.int32),
        )
    state = DecodeState(
        cache=carry.cache, draft_cache=carry.draft_cache, root=jnp.maximum(token_B1[:, 0], 0), sync=sync,
        sampling=sampling, stop_ids=stop_ids_BE, max_tokens=max_tokens_B,
        tokens=jnp.zeros((B, width), jnp.int32), num_tokens=zeros_B, rounds=zeros_B, finish=
        jnp.where(max_tokens_B > 0, _RUNNING, _LENGTH).astype(jnp.int32), num_accepted=zeros_B,
        path_ranks=jnp.zeros((B, plan.path_length), jnp.int32),
    )  # fmt: skip
    error_B = token_B1[:, 0] < 0
    return emit(state, token_B1, jnp.where(error_B, 0, 1), error_B)


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """What `generate` returns, one entry a prompt."""

    tokens: list[list[int]]
    """New tokens; a stop token is kept as the last one."""
    texts: list[str]
    rounds: list[int]
    """Target calls after prefill."""
    finish_reasons: list[str]
    """stop | length | error (NaN logits, or a law without any token)."""

    @property
    def acceptance_length(self) -> float:
        """Tokens per target call, bonus included; the first token comes from prefill."""
        gained = sum(max(len(tokens) - 1, 0) for tokens in self.tokens)
        return gained / sum(self.rounds) if sum(self.rounds) else 1.0


@dataclasses.dataclass(frozen=True)
class RoundEvent:
    """One round of `generate_stream`: prefill's first token, or what a round gave out."""

    new_tokens: list[list[int]]
    num_accepted: list[int]
    """How many of the new tokens came from the draft; the one behind them is the bonus token."""
    ranks: list[list[int]]
    """Sibling rank of each accepted node, by depth from 1."""
    finish_reasons: list[str]
    """Empty string while running."""


def generate(
    target: Target,
    draft: Draft | None,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    tree: str = "auto",
    stop_token_ids: Sequence[int] | None = None,
    drafting: str = "greedy",
    draft_sync: str = "all",
) -> GenerateResult:
    """Continues each prompt, speculating with `draft` (None: plain decoding).

    The result does not depend on the draft or the tree: at temperature 0 the tokens are those of
    plain decoding, above it their law is. Programs are compiled per bucket of batch size and
    length and reused.

    Args:
      prompts: texts (encoded as they are, without a chat template) or token ids.
      max_new_tokens: limit a prompt, cut further where the model's context ends.
      sampling: for all prompts, or one each.
      tree: see `parse_tree`; "auto" takes the tree for this batch size.
      stop_token_ids: None: the model's own; an empty list: none.
      drafting: "greedy" proposes the draft's favourites, "sampled" draws from its law.
      draft_sync: "all" recomputes the draft's KV of every accepted token from true features,
        "last" only those of the last two (the paper's).

    Raises:
      ValueError: an empty prompt, one longer than the context, token ids outside the vocabulary,
        an unknown tree, or options that do not go together.
    """
    plan, state = start(
        target, draft, prompts, max_new_tokens, sampling, tree, stop_token_ids, drafting, draft_sync
    )
    state = decode(target.replace(tokenizer=None), draft, plan, state, np.int32(2**30))
    count = len(prompts)
    num_tokens, rounds, finish, tokens = map(
        np.asarray, (state.num_tokens, state.rounds, state.finish, state.tokens)
    )
    out = [tokens[b, : num_tokens[b]].tolist() for b in range(count)]
    return GenerateResult(
        tokens=out,
        texts=[target.tokenizer.decode(ids) if target.tokenizer else "" for ids in out],
        rounds=rounds[:count].tolist(),
        finish_reasons=[FINISH_REASONS[code] for code in finish[:count]],
    )


def generate_stream(
    target: Target,
    draft: Draft | None,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    tree: str = "auto",
    stop_token_ids: Sequence[int] | None = None,
    drafting: str = "greedy",
    draft_sync: str = "all",
) -> Iterator[RoundEvent]:
    """`generate`, round by round: the same programs and tokens, with the host looking on."""
    plan, state = start(
        target, draft, prompts, max_new_tokens, sampling, tree, stop_token_ids, drafting, draft_sync
    )
    target = target.replace(tokenizer=None)
    count, seen = len(prompts), np.zeros(len(prompts), int)
    while True:
        num_tokens, accepted, finish, tokens, ranks = map(
            np.asarray,
            (state.num_tokens, state.num_accepted, state.finish, state.tokens, state.path_ranks),
        )
        new = [tokens[b, seen[b] : num_tokens[b]].tolist() for b in range(count)]
        yield RoundEvent(
            new_tokens=new,
            num_accepted=[min(int(accepted[b]), len(new[b])) for b in range(count)],
            ranks=[ranks[b, 1 : accepted[b] + 1].tolist() for b in range(count)],
            finish_reasons=[FINISH_REASONS[code] for code in finish[:count]],
        )
        if finish[:count].all():
            return
        seen = num_tokens[:count].copy()
        state = decode(target, draft, plan, state, np.int32(1))


def start(
    target: Target,
    draft: Draft | None,
    prompts,
    max_new_tokens: int,
    sampling,
    tree: str,
    stop_token_ids,
    drafting: str,
    draft_sync: str,
) -> tuple[Plan, DecodeState]:
    """Checks the request, reserves pages, prefills the prompts and draws their first tokens."""
    ids = _check_prompts(target, prompts)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    params = [sampling] * len(ids) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(params) != len(ids):
        raise ValueError(f"{len(params)} sampling parameters for {len(ids)} prompts")
    plan = _make_plan(draft, len(ids), tree, drafting, draft_sync)

    B = _bucket(len(ids), halves=False)
    pad = B - len(ids)
    prompt_length = np.array([len(row) for row in ids] + [0] * pad, np.int32)
    limit = np.minimum(max_new_tokens, target.config.max_position - prompt_length)
    limit[len(ids) :] = 0
    reserved = int((prompt_length + limit).max()) + plan.path_length
    pages_per_row = _bucket(-(-reserved // PAGE_SIZE))
    carry = _empty_prefill(target, draft, B, len(ids), pages_per_row)
    model = target.replace(tokenizer=None)
    chunk = min(_PREFILL_CHUNK, max(16, _bucket(int(prompt_length.max()), halves=False)))
    for begin in range(0, int(prompt_length.max()), chunk):
        block = np.zeros((B, chunk), np.int32)
        for b, row in enumerate(ids):
            piece = row[begin : begin + chunk]
            block[b, : len(piece)] = piece
        count = np.clip(prompt_length - begin, 0, chunk)
        carry = prefill_chunk(model, draft, carry, block, count)
    return plan, first_token(
        model,
        plan,
        carry,
        Sampling.stack(params + [SamplingParams()] * pad),
        _stop_ids(target, stop_token_ids, B),
        limit,
        width=_bucket(max_new_tokens),
    )


def _check_prompts(target: Target, prompts) -> list[list[int]]:
    if not len(prompts):
        raise ValueError("no prompts given")
    context, vocab = target.config.max_position, target.config.vocab_size
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if target.tokenizer is None:
                raise ValueError("this target has no tokenizer: give prompts as token ids")
            prompt = target.tokenizer.encode(prompt)
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
    if draft is None:
        return Plan(StaticTree(()))
    if drafting == "sampled" and not shape.keeps_all:
        raise ValueError(
            "sampled drafting is lossless only if no drawn node is dropped: give the dynamic tree "
            f"nodes={shape.pool_size} for its depth and width, or use greedy drafting"
        )
    limit = draft.config.draft_vocab_size or draft.config.layer.vocab_size
    if max_children(shape) > limit:
        raise ValueError(f"tree {tree!r} is wider than the draft vocabulary of {limit} tokens")
    return Plan(shape, drafting == "sampled", draft_sync == "all")


def _empty_prefill(target: Target, draft: Draft | None, B: int, rows: int, pages_per_row: int):
    """Caches in which every real row has its own pages; page 0 is trash."""
    table = np.zeros((B, pages_per_row), np.int32)
    table[:rows] = 1 + np.arange(rows * pages_per_row).reshape(rows, pages_per_row)
    size = {"num_pages": 1 + B * pages_per_row, "page_size": PAGE_SIZE}
    dtype, width = target.config.dtype, target.config.hidden_size
    return Prefill(
        cache=init_cache(target.config, jnp.array(table), **size),
        draft_cache=init_cache(draft.config.layer, jnp.array(table), **size) if draft else None,
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
