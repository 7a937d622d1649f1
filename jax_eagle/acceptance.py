"""Acceptance of a draft: how many of its tokens the target keeps, and how sure that is.

Every number keeps to these words. *Acceptance length*: tokens gained per round, the bonus token
counted. *Conditional* acceptance at a depth: of the rounds whose path reached the depth above, the
share that accepted a token there. *Joint* acceptance: the share of all rounds whose path reaches
the depth, which is the product of the conditional ones down to it. A round that the limit or a stop
token cuts counts as far as it went: the depths behind the cut are neither reached nor missed.

Two ways to count, both at temperature 0. `decode_acceptance` decodes with a tree, as users do.
`forced_acceptance` takes text that the target wrote greedily and hangs a chain of drafted tokens
under every token of it: many more chains from the same text, in a few forwards. That is exact: as
long as all drafted tokens were accepted they are those of the text, so `unroll` along the text runs
each chain as decoding would, and the rounds of any chain can be walked on paper. Every token counts
alike there, while rounds are fewer where a draft is good: 1 + the sum of joint acceptances over all
tokens is larger than the acceptance length.

Intervals are bootstraps over prompts: tokens of one prompt are too much alike to count as many.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from .draft import Draft
from .generate import generate, generate_stream
from .llama import Target
from .sharding import rows_per_rank
from .tree import chain_tree, parse_tree
from .unroll import Text, unroll

CONVENTION = "T = 0; acceptance length counts the bonus token; interval: 95 %, over prompts"
"""Said wherever these numbers are printed."""
NUM_RANKS = 8
"""Choices of the draft, the best one first, that `forced_acceptance` tells apart."""
_ROW = 128
"""Texts are padded to multiples of so many tokens, so that few shapes compile."""

Prompts = Sequence[Sequence[int]]


class Estimate(NamedTuple):
    """A figure over all prompts and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[..., np.ndarray], *counts: np.ndarray, samples: int = 1000, seed: int = 0
) -> Estimate:
    """A statistic of sums over prompts, with the interval from drawing the prompts anew.

    Args:
      statistic: maps the sums of `counts`, [..., *rest], to values [...].
      counts: arrays [prompts, *rest].
      samples: drawn sets of prompts. The same seed draws the same ones.
    """
    num_prompts = len(counts[0])
    even = np.full(num_prompts, 1 / num_prompts)
    times_drawn = np.random.default_rng(seed).multinomial(num_prompts, even, samples)
    draws = statistic(*(np.tensordot(times_drawn, count, 1) for count in counts))
    low, high = np.quantile(draws, [0.025, 0.975])
    value = statistic(*(count.sum(axis=0) for count in counts))
    return Estimate(float(value), float(low), float(high))


class Depths(struct.PyTreeNode):
    """Drafted tokens by prompt and depth; index 0 is depth 1."""

    reached: Int[np.ndarray, "prompts depths"]
    """Rounds whose path reached the depth above, and that were not cut there."""
    accepted: Int[np.ndarray, "prompts depths"]
    ranked: Int[np.ndarray, "prompts depths ranks"]
    """By rank: rounds whose next token was the draft's choice of that rank (0: its favourite)."""

    @property
    def max_depth(self) -> int:
        """The deepest drafted token."""
        return self.reached.shape[1]

    def conditional(self, depth: int) -> Estimate:
        """Conditional acceptance at a depth from 1; 0 where nothing reached it."""
        return bootstrap(_share, self.accepted[:, depth - 1], self.reached[:, depth - 1])

    def joint(self, depth: int) -> Estimate:
        """Joint acceptance at a depth from 1."""
        return bootstrap(lambda a, r: _survival(a, r)[..., -1], *self._upto(depth))

    def chain_length(self, depth: int) -> Estimate:
        """1 + joint acceptances: acceptance length of a chain so deep, had no round been cut."""
        return bootstrap(lambda a, r: 1 + _survival(a, r).sum(axis=-1), *self._upto(depth))

    def by_rank(self, depth: int) -> list[float]:
        """Of the rounds that reached the depth, the share that each rank would have served."""
        ranked, reached = self.ranked.sum(axis=0)[depth - 1], self.reached.sum(axis=0)[depth - 1]
        return _share(ranked, np.broadcast_to(reached, ranked.shape)).tolist()

    def _upto(self, depth: int) -> tuple[np.ndarray, np.ndarray]:
        return self.accepted[:, :depth], self.reached[:, :depth]


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) > 0)


def _survival(accepted: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """Joint acceptance by depth: the product-limit estimate, so that cut rounds do no harm."""
    return np.cumprod(_share(accepted, reached), axis=-1)


class Decoded(struct.PyTreeNode):
    """What real decoding with one tree gave."""

    gained: Int[np.ndarray, "prompts"]
    """New tokens, the first one (prefill's) not counted."""
    rounds: Int[np.ndarray, "prompts"]
    """Target calls after prefill."""
    depths: Depths
    """Of the tree's nodes. Paths may also end where the tree has no children."""

    def acceptance_length(self) -> Estimate:
        """Tokens per target call, the bonus token counted; 1.0 where no prompt needed a round."""
        return _length(self.gained, self.rounds)

    def take(self, prompts: Sequence[int] | np.ndarray) -> "Decoded":
        """The same for some of the prompts."""
        return jax.tree.map(lambda count: count[prompts], self)


def _length(gained: np.ndarray, rounds: np.ndarray) -> Estimate:
    drawn = rounds > 0
    if not drawn.any():
        return Estimate(1.0, 1.0, 1.0)
    return bootstrap(_share, gained[drawn], rounds[drawn])


class Forced(struct.PyTreeNode):
    """What a draft would have chosen along given text."""

    gained: Int[np.ndarray, "prompts"]
    """Tokens of the answer, the first one not counted: as many chains."""
    rounds: Int[np.ndarray, "prompts depths"]
    """Target calls that decoding takes for them with a chain so deep."""
    depths: Depths
    """Of chains: accepted is the draft's favourite alone, other ranks are what siblings would
    have added."""
    overlap: Float[np.ndarray, "prompts"]
    """Sum over the chains' roots of sum(min(target_probs, draft_probs)) at temperature 1."""

    def acceptance_length(self, depth: int) -> Estimate:
        """That of decoding the same answers with `chain:depth`."""
        return _length(self.gained, self.rounds[:, depth - 1])

    def expected_acceptance(self) -> Estimate:
        """Chance that a token drawn from the draft at temperature 1, depth 1, is accepted."""
        return bootstrap(_share, self.overlap, self.depths.reached[:, 0])


def decode_acceptance(
    target: Target,
    draft: Draft,
    prompts: Prompts,
    *,
    trees: Sequence[str],
    max_new_tokens: int,
    batch: int = 8,
    draft_sync: str = "all",
    progress: Callable[[list[np.ndarray]], Iterable[np.ndarray]] = iter,
) -> dict[str, Decoded]:
    """Decodes all prompts with each tree, at temperature 0, and counts what the rounds accepted.

    Args:
      prompts: token ids.
      batch: prompts that are decoded together.
      progress: goes through the batches of each tree; a place for a progress bar.

    Raises:
      ValueError: what `generate` refuses.
    """
    options = {"max_new_tokens": max_new_tokens, "draft_sync": draft_sync}
    batches = batches_by_length(prompts, batch)
    results = {}
    for tree in trees:
        platform = jax.default_backend()
        mesh = target.backend.mesh
        shapes = [
            parse_tree(tree, batch=rows_per_rank(len(rows), mesh), platform=platform)
            for rows in batches
        ]
        N, depth = len(prompts), max(shape.max_depth for shape in shapes)
        ranks = max(shape.max_children for shape in shapes)
        gained, rounds = np.zeros(N, np.int64), np.zeros(N, np.int64)
        depths = _no_depths(N, depth, ranks)
        for rows in progress(batches):
            chosen = [prompts[i] for i in rows]
            stream = generate_stream(target, draft, chosen, tree=tree, **options)
            next(stream)  # prefill's token
            for event in stream:
                for i, tokens, path in zip(rows, event.new_tokens, event.ranks, strict=True):
                    if tokens:
                        gained[i] += len(tokens)
                        rounds[i] += 1
                        _count_path(depths, i, path, cut=len(tokens) == len(path))
        results[tree] = Decoded(gained, rounds, depths)
    return results


def _no_depths(N: int, depth: int, ranks: int) -> Depths:
    zeros = functools.partial(np.zeros, dtype=np.int64)
    return Depths(zeros((N, depth)), zeros((N, depth)), zeros((N, depth, ranks)))


def _count_path(depths: Depths, prompt: int, ranks: list[int], *, cut: bool) -> None:
    """Adds a round that accepted nodes of these ranks. A cut one gave no bonus token."""
    n = len(ranks)
    depths.reached[prompt, : n if cut else n + 1] += 1
    depths.accepted[prompt, :n] += 1
    depths.ranked[prompt, np.arange(n), ranks] += 1


def batches_by_length(prompts: Prompts, batch: int) -> list[np.ndarray]:
    """Indices of prompts of similar length, `batch` at a time."""
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def greedy_answers(
    target: Target, prompts: Prompts, *, max_new_tokens: int, batch: int = 8
) -> list[list[int]]:
    """What the target writes on its own at temperature 0, for `forced_acceptance`."""
    answers: list[list[int]] = [[] for _ in prompts]
    for rows in batches_by_length(prompts, batch):
        chosen = [prompts[i] for i in rows]
        result = generate(target, None, chosen, max_new_tokens=max_new_tokens)
        for i, tokens in zip(rows, result.tokens, strict=True):
            answers[i] = tokens
    return answers


def forced_acceptance(
    target: Target, draft: Draft, prompts: Prompts, answers: Prompts, *, depth: int, batch: int = 8
) -> Forced:
    """Hangs a chain of `depth` drafted tokens under every token of the answers but the last.

    Args:
      prompts, answers: token ids; the answers are the target's own at temperature 0.
    """
    N, A = len(prompts), max(map(len, answers), default=1)
    depths, overlap = _no_depths(N, depth, NUM_RANKS), np.zeros(N)
    gained = np.array([max(len(answer) - 1, 0) for answer in answers])
    rounds = np.zeros((N, depth), np.int64)
    model, head = target.replace(tokenizer=None), draft.bind_head(target)
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    for rows in batches_by_length(texts, batch):
        T = -(-max(len(texts[i]) for i in rows) // _ROW) * _ROW
        tokens_BT, begin_B = np.zeros((batch, T), np.int32), np.zeros(batch, np.int32)
        length_B = np.zeros(batch, np.int32)
        for b, i in enumerate(rows):
            tokens_BT[b, : len(texts[i])] = texts[i]
            begin_B[b], length_B[b] = len(prompts[i]), len(texts[i])
        out = _along_answers(
            model, draft, head, tokens_BT, begin_B, length_B, depth=depth, num_roots=A
        )
        ranks_JBA, overlap_BA = map(np.asarray, out)
        for b, i in enumerate(rows):
            rounds[i] = _count_chains(depths, i, ranks_JBA[:, b, : gained[i]])
            overlap[i] = overlap_BA[b, : gained[i]].sum()
    return Forced(gained, rounds, depths, overlap)


def _count_chains(depths: Depths, prompt: int, ranks_JA: np.ndarray) -> list[int]:
    """Adds the chains under all tokens of an answer; returns the rounds of decoding, by depth."""
    J, A = ranks_JA.shape
    depth_JA, root_JA = np.indices((J, A))
    inside_JA = root_JA + depth_JA < A  # a chain ends with the answer
    ranks_JA = ranks_JA[depth_JA, np.where(inside_JA, root_JA + depth_JA, 0)]
    alive_JA = np.cumprod(inside_JA & (ranks_JA == 0), axis=0, dtype=bool)
    reached_JA = inside_JA & np.concatenate([np.ones((1, A), bool), alive_JA[:-1]])
    depths.reached[prompt] = reached_JA.sum(axis=1)
    depths.accepted[prompt] = alive_JA.sum(axis=1)
    for rank in range(NUM_RANKS):
        depths.ranked[prompt, :, rank] = (reached_JA & (ranks_JA == rank)).sum(axis=1)
    return [_num_rounds(accepted_A) for accepted_A in np.cumsum(alive_JA, axis=0)]


def _num_rounds(accepted_A: np.ndarray) -> int:
    """Rounds until the end of an answer, if the one from each token accepts so many."""
    root, rounds = 0, 0
    while root < len(accepted_A):
        root += accepted_A[root] + 1
        rounds += 1
    return rounds


@functools.partial(jax.jit, static_argnames=("depth", "num_roots"))
def _along_answers(
    target: Target,
    draft: Draft,
    head,
    tokens_BT: Int[Array, "B T"],
    begin_B: Int[Array, "B"],
    length_B: Int[Array, "B"],
    *,
    depth: int,
    num_roots: int,
) -> tuple[Int[Array, "J B A"], Float[Array, "B A"]]:
    """Of the `num_roots` rows from `begin`: the next token's rank in each pass, and the overlap."""
    B, T = tokens_BT.shape
    position_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    segment_BT = (position_BT < length_B[:, None]).astype(jnp.int32)
    out = target(tokens_BT, chain_tree(B, T), None, draft.config.taps)
    text = Text(tokens_BT, segment_BT, position_BT)
    passes = unroll(draft, target, text, out.features, depth)
    row_BA = begin_B[:, None] + jnp.arange(num_roots, dtype=jnp.int32)[None]

    def take(x_BTD):
        return jnp.take_along_axis(x_BTD, jnp.minimum(row_BA, T - 1)[:, :, None], axis=1)

    next_BA = jnp.take_along_axis(tokens_BT, jnp.minimum(row_BA + 1, T - 1), axis=1)

    def along(row):  # one text at a time: more logits [A, V] might not fit
        x_AD, state_JAD, next_A = row
        logits_JAU = [head(state_AD) for state_AD in state_JAD]
        rank_JA = jnp.stack(
            [_ranks(logits_AU, draft.to_target, next_A) for logits_AU in logits_JAU]
        )
        target_probs_AU = jax.nn.softmax(target.head(x_AD))
        if draft.draft_to_target is not None:
            target_probs_AU = jnp.take(target_probs_AU, draft.draft_to_target, axis=1)
        draft_probs_AU = jax.nn.softmax(logits_JAU[0])
        return rank_JA, jnp.sum(jnp.minimum(target_probs_AU, draft_probs_AU), axis=1)

    states_BJAD = jnp.stack([take(each.state) for each in passes], axis=1)
    ranks_BJA, overlap_BA = jax.lax.map(along, (take(out.x), states_BJAD, next_BA))
    return jnp.swapaxes(ranks_BJA, 0, 1), overlap_BA


def _ranks(logits_AU, to_target, next_A) -> Int[Array, "A"]:
    """Rank of the next token among the draft's choices, cut at NUM_RANKS.

    A token that the draft does not know comes last, and so do all if the logits are NaN.
    """
    token_U = jnp.arange(logits_AU.shape[1], dtype=jnp.int32)
    is_next_AU = to_target(token_U)[None, :] == next_A[:, None]
    own_A1 = jnp.max(jnp.where(is_next_AU, logits_AU, -jnp.inf), axis=1, keepdims=True)
    before_AU = token_U[None, :] < jnp.argmax(is_next_AU, axis=1, keepdims=True)
    better_AU = ~(logits_AU <= own_A1) | ((logits_AU == own_A1) & before_AU)
    rank_A = jnp.sum(better_AU, axis=1, dtype=jnp.int32)
    known_A = jnp.isfinite(own_A1[:, 0])
    return jnp.minimum(jnp.where(known_A, rank_A, NUM_RANKS), NUM_RANKS)
