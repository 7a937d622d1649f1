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
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.compat import order_after

from .cache import PagedCache, commit
from .controls import shape_logits
from .draft import Draft, Proposal, Sync
from .llama import Target, TargetOutput
from .packing import COMPILER_OPTIONS
from .prefill import start
from .sampling import SamplingParams
from .sharding import on_host, over_data
from .state import FINISH_REASONS, DecodeState, Plan, emit
from .tree import chain_tree
from .verify import Verdict, verify


def round_step(target: Target, draft: Draft | None, head, plan: Plan, state: DecodeState):
    """One round: draft, verify, commit, advance. `head` is `draft.bind_head(target)`."""
    with jax.named_scope("draft"):
        draft_cache, proposal = propose(target, draft, head, plan, state)
        tree, tree_tokens = proposal.tree, proposal.tokens
    with jax.named_scope("target"):
        live = jnp.broadcast_to(~state.done[:, None], tree_tokens.shape)
        out = target(tree_tokens, tree, state.cache, draft.config.taps if draft else (), live)
        logits = target.head(out.x)
    with jax.named_scope("verify"):
        shaped = shape_logits(
            state.controls, logits, tree, tree_tokens,
            state.tokens, state.num_tokens, state.stop_ids,
        )  # fmt: skip
        verdict = verify(
            tree, tree_tokens, proposal.law, shaped, state.cache.length, state.sampling,
            max_depth=plan.shape.max_depth, max_children=plan.shape.max_children,
            backend=target.backend,
        )  # fmt: skip
        count = order_after(out.x, jnp.where(state.done, 0, verdict.num_accepted + 1))
    with jax.named_scope("commit"):
        cache = commit(state.cache, out.new_kv, verdict.path, count)
        if draft_cache is not None and not plan.sync_all:
            draft_cache = keep_scratch(draft_cache, proposal, verdict, state.done)
    state = state.replace(cache=cache, draft_cache=draft_cache)
    return advance(plan, state, proposal, out, verdict, logits)


def propose(target, draft: Draft | None, head, plan: Plan, state: DecodeState):
    """The draft's tree, or the root alone in plain decoding; and the draft's cache."""
    if draft is None or plan.plain:
        root_B1 = state.root[:, None]
        tree, none = chain_tree(root_B1.shape[0], 1), jnp.zeros_like(root_B1)
        return state.draft_cache, Proposal(tree, root_B1, none, law=None, scratch=None)
    assert state.draft_cache is not None and state.sync is not None
    sampling = state.sampling if plan.sampled_drafting else None
    sync = state.sync.first(plan.sync_length)
    return draft.expand(target, head, plan.shape, state.draft_cache, sync, sampling)


def keep_scratch(cache: PagedCache, proposal: Proposal, verdict: Verdict, done_B) -> PagedCache:
    """The cheap sync: accepted tokens keep the draft KV computed from estimated features.

    Unlike in the paper the last accepted node is left to the sync pass: a leaf was never expanded.
    """
    if proposal.scratch is None:
        return cache
    inner_BA = verdict.path[:, 1:-1]
    scratch_BA = jnp.maximum(jnp.take_along_axis(proposal.expanded, inner_BA, axis=1) - 1, 0)
    count_B = jnp.where(done_B, 0, jnp.maximum(verdict.num_accepted - 1, 0))
    return commit(cache, proposal.scratch, scratch_BA, count_B)


def advance(
    plan: Plan,
    state: DecodeState,
    proposal: Proposal,
    out: TargetOutput,
    verdict: Verdict,
    logits_BMV: Float[Array, "B M V"],
) -> DecodeState:
    """Gives out the new tokens, cuts at stop tokens and limits, prepares the next root and sync."""
    step_1A = jnp.arange(plan.path_length, dtype=jnp.int32)[None]
    accepted_B1 = verdict.num_accepted[:, None]
    path_tokens_BA = jnp.take_along_axis(proposal.tokens, verdict.path, axis=1)
    new_BA = jnp.where(
        step_1A < accepted_B1, jnp.roll(path_tokens_BA, -1, axis=1), verdict.bonus[:, None]
    )
    count_B = verdict.num_accepted + jnp.where(verdict.error, 0, 1)
    running_B, sync, logprobs = ~state.done, state.sync, state.logprobs
    state = emit(state, new_BA, count_B, verdict.error)
    path_ranks_BA = jnp.take_along_axis(proposal.tree.rank, verdict.path, axis=1)
    return state.replace(
        root=jnp.where(running_B & ~verdict.error, verdict.bonus, state.root),
        sync=sync and _next_sync(plan, sync, new_BA, out, verdict, running_B),
        rounds=state.rounds + running_B.astype(jnp.int32),
        num_accepted=jnp.where(running_B, verdict.num_accepted, 0),
        path_ranks=jax.lax.dynamic_update_slice(state.path_ranks, path_ranks_BA, (0, 0)),
        logprobs=logprobs and logprobs.of(logits_BMV, verdict.path, new_BA),
    )


def _next_sync(
    plan: Plan, before: Sync, new_BA, out: TargetOutput, verdict: Verdict, running_B
) -> Sync:
    """Accepted tokens and the bonus, each with the target's feature of the token before it.

    Plain decoding does not run the draft: its tokens join those that wait already.
    """
    if plan.plain:
        return before.append(jnp.maximum(new_BA[:, 0], 0), out.features[:, 0], running_B)
    skipped_B = 0 * verdict.num_accepted
    if not plan.sync_all:
        skipped_B = jnp.maximum(verdict.num_accepted - 1, 0)
    row_BA = skipped_B[:, None] + jnp.arange(plan.sync_length, dtype=jnp.int32)[None]
    row_BA = jnp.minimum(row_BA, verdict.num_accepted[:, None])
    node_BA = jnp.take_along_axis(verdict.path, row_BA, axis=1)
    return before.restart(
        tokens=jnp.maximum(jnp.take_along_axis(new_BA, row_BA, axis=1), 0),
        features=jnp.take_along_axis(out.features, node_BA[:, :, None], axis=1),
        count=jnp.where(running_B, verdict.num_accepted + 1 - skipped_B, 0),
    )


@functools.partial(
    jax.jit,
    static_argnames=("plan",),
    donate_argnames=("state",),
    compiler_options=COMPILER_OPTIONS,
)
def decode(
    target: Target,
    draft: Draft | None,
    head: Callable | None,
    plan: Plan,
    state: DecodeState,
    max_rounds: Int[Array, ""],
) -> DecodeState:
    """Rounds until every row is finished, `max_rounds` at most. The state is donated.

    `head` is `draft.bind_head(target)`, None without a draft. On a mesh with a data axis each rank
    stops when its own rows are finished.
    """
    rounds = over_data(functools.partial(_rounds, plan), target.backend.mesh)
    return rounds((target, draft, head, max_rounds), state)


def _rounds(plan: Plan, shared, state: DecodeState) -> DecodeState:
    target, draft, head, max_rounds = shared

    def unfinished(carry):
        state, rounds = carry
        return (rounds < max_rounds) & ~jnp.all(state.done)

    def step(carry):
        state, rounds = carry
        return round_step(target, draft, head, plan, state), rounds + 1

    return jax.lax.while_loop(unfinished, step, (state, jnp.int32(0)))[0]


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
        "last" only those of the last accepted one and of the bonus token. (The paper re-computes
        the bonus token's alone; but an accepted leaf was never expanded, so it has none to keep.)

    Raises:
      ValueError: an empty prompt, one longer than the context, token ids outside the vocabulary,
        an unknown tree, or options that do not go together.
    """
    plan, state = start(
        target, draft, prompts, max_new_tokens=max_new_tokens, sampling=sampling, tree=tree,
        stop_token_ids=stop_token_ids, drafting=drafting, draft_sync=draft_sync,
    )  # fmt: skip
    head = draft.bind_head(target) if draft is not None else None
    state = decode(target.replace(tokenizer=None), draft, head, plan, state, np.int32(2**30))
    count = len(prompts)
    num_tokens, rounds, finish, tokens = map(
        on_host, (state.num_tokens, state.rounds, state.finish, state.tokens)
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
        target, draft, prompts, max_new_tokens=max_new_tokens, sampling=sampling, tree=tree,
        stop_token_ids=stop_token_ids, drafting=drafting, draft_sync=draft_sync,
    )  # fmt: skip
    target = target.replace(tokenizer=None)
    head = draft.bind_head(target) if draft is not None else None
    count, seen = len(prompts), np.zeros(len(prompts), int)
    while True:
        num_tokens, accepted, finish, tokens, ranks = map(
            on_host,
            (state.num_tokens, state.num_accepted, state.finish, state.tokens, state.path_ranks),
        )
        new = [tokens[b, seen[b] : num_tokens[b]].tolist() for b in range(count)]
        kept = [min(int(accepted[b]), len(new[b])) for b in range(count)]
        yield RoundEvent(
            new_tokens=new,
            num_accepted=kept,
            ranks=[ranks[b, 1 : kept[b] + 1].tolist() for b in range(count)],
            finish_reasons=[FINISH_REASONS[code] for code in finish[:count]],
        )
        if finish[:count].all():
            return
        seen = num_tokens[:count].copy()
        state = decode(target, draft, head, plan, state, np.int32(1))
