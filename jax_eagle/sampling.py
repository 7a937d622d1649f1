"""Sampling: per-request parameters, the processed law at a node, counter-based random draws.

Speculation is lossless with respect to the *processed* law: temperature, then top-k, top-p (mass of
what top-k left) and min-p (relative to the largest probability), in Hugging Face's order. All three
filters keep the tokens at or above a threshold, so ties at the threshold stay in.

Keys depend on (seed of the request, absolute position, purpose) alone: neither batch row nor round
enters, so a seeded text does not depend on the batch mix, the tree (greedy drafting) or a mesh.

On a mesh each device has the scores of its own tokens, and makes their noise. What is exchanged is
a maximum or a sum of each row: thresholds are found by counting, not by sorting.
"""

import dataclasses
import enum
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from .sharding import ONE_DEVICE, Backend

MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH = 64, 8
"""Of one request; the device keeps a table of this size for each sequence."""

_CUT_BITS = 4
"""Bits of a threshold that are found at a time where the vocabulary is cut."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen. Values outside their range raise ValueError.

    The second half shapes the logits before the law is made of them: see `controls`.
    """

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """In (0, 1]; 1: off."""
    top_k: int = 0
    """0 or -1: off."""
    min_p: float = 0.0
    """In [0, 1]; 0: off."""
    seed: int = 0
    """Any unsigned integer of 32 bits."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that was given out already; from -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken once for every time that the token was given out; from -2 to 2."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or output are divided by it (multiplied where negative)."""
    min_tokens: int = 0
    """No stop token before so many new tokens."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these tokens; None: all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not appear in the output."""

    def __post_init__(self):
        finite = all(math.isfinite(bias) for _, bias in self.logit_bias)
        words = self.bad_words
        checks = {
            "temperature": (0.0 <= self.temperature < float("inf"), "0 or more"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "top_k": (self.top_k >= -1, "-1 or 0 (off), or at least 1"),
            "min_p": (0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            "seed": (0 <= self.seed < 2**32, "an unsigned integer of 32 bits"),
            "presence_penalty": (-2.0 <= self.presence_penalty <= 2.0, "from -2 to 2"),
            "frequency_penalty": (-2.0 <= self.frequency_penalty <= 2.0, "from -2 to 2"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100.0, "from 0.01 to 100"),
            "min_tokens": (self.min_tokens >= 0, "0 or more"),
            "logit_bias": (finite, "finite numbers"),
            "allowed_token_ids": (self.allowed_token_ids != (), "at least one token"),
            "bad_words": (
                all(words) and len(words) <= MAX_BAD_WORDS
                and max(map(len, words), default=0) <= MAX_BAD_WORD_LENGTH,
                f"at most {MAX_BAD_WORDS} words of 1 to {MAX_BAD_WORD_LENGTH} tokens",
            ),
        }  # fmt: skip
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")

    def check_tokens(self, vocab_size: int) -> None:
        """Raises ValueError if a token that the parameters name is not in the vocabulary."""
        named = {
            "logit_bias": [token for token, _ in self.logit_bias],
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": [token for word in self.bad_words for token in word],
        }
        for name, tokens in named.items():
            for token in (min(tokens), max(tokens)) if tokens else ():
                if not 0 <= token < vocab_size:
                    raise ValueError(f"{name} names token {token}, outside 0..{vocab_size - 1}")


class Sampling(struct.PyTreeNode):
    """`SamplingParams` of a batch, on the device."""

    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]
    top_k: Int[Array, "B"]
    min_p: Float[Array, "B"]
    seed: UInt32[Array, "B"]

    @classmethod
    def stack(cls, params: list[SamplingParams]) -> "Sampling":
        """One row a request."""

        def column(name, dtype) -> Any:
            return np.array([getattr(p, name) for p in params], dtype)

        return cls(
            temperature=column("temperature", np.float32),
            top_p=column("top_p", np.float32),
            top_k=np.maximum(column("top_k", np.int32), 0),
            min_p=column("min_p", np.float32),
            seed=column("seed", np.uint32),
        )


class Purpose(enum.IntEnum):
    """What a random draw is for; kept apart so that draws at one position are independent."""

    TARGET = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


def draw_key(seed, position, purpose: Purpose, index=0) -> jax.Array:
    """Key of one draw: scalars (seed, absolute position of the token, purpose, index).

    `index` tells apart several draws of one purpose at one position: the drafting node, or the
    sibling rank of an acceptance test.
    """
    key = jax.random.key(seed, impl="threefry2x32")
    for data in (position, jnp.uint32(purpose), index):
        key = jax.random.fold_in(key, data)
    return key


def gumbel(
    seed_B: UInt32[Array, "B"],
    position_BM: Int[Array, "B M"],
    purpose: Purpose,
    size: int,
    index_BM: Int[Array, "B M"] | None = None,
) -> Float[Array, "B M V"]:
    """Gumbel noise [B, M, size], one key for each (row, node)."""
    if index_BM is None:
        index_BM = jnp.zeros_like(position_BM)

    def one(seed, position, index):
        return jax.random.gumbel(draw_key(seed, position, purpose, index), (size,))

    return jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)))(seed_B, position_BM, index_BM)


def uniform(seed_B, position_B, purpose: Purpose, index_B) -> Float[Array, "B"]:
    """One uniform number a sequence, in [0, 1)."""

    def one(seed, position, index):
        return jax.random.uniform(draw_key(seed, position, purpose, index))

    return jax.vmap(one)(seed_B, position_B, index_B)


def restrict(
    logits_BMV: Float[Array, "B M V"], allowed_bits: UInt32[Array, "B M V/32"] | None
) -> Float[Array, "B M V"]:
    """-inf for tokens that are not allowed: token v is bit v % 32 of word v // 32; None: all are.

    The layout is that of llguidance's masks; V/32 is rounded up.
    """
    if allowed_bits is None:
        return logits_BMV
    bit_32 = jnp.arange(32, dtype=jnp.uint32)[None, None, None]
    bits = (allowed_bits[..., None] >> bit_32) & jnp.uint32(1)
    allowed_BMV = jnp.reshape(bits, (*allowed_bits.shape[:2], -1))[:, :, : logits_BMV.shape[-1]]
    return jnp.where(allowed_BMV > 0, logits_BMV, -jnp.inf)


def processed_scores(
    logits_BMV: Float[Array, "B M V"],
    sampling: Sampling,
    allowed_bits: UInt32[Array, "B M V/32"] | None = None,
    backend: Backend = ONE_DEVICE,
) -> Float[Array, "B M V"]:
    """Logits of the processed law: softmax of the result is what tokens are drawn from.

    The best token of a law has score 0. At temperature 0 the law is a point mass on the (first)
    argmax. Tokens outside the law are -inf; a row without any token, or with NaN or +inf, comes
    back all -inf (see `is_defined`).
    """
    logits_BMV = restrict(logits_BMV, allowed_bits)
    return _scores(logits_BMV, *best(logits_BMV), sampling, backend)


def _scores(logits_BMV, best_BM, top_BM, sampling: Sampling, backend: Backend):
    """`processed_scores` of logits whose best token and its logit are known."""
    best_BM1, top_BM1 = best_BM[..., None], top_BM[..., None]
    greedy_B11 = (sampling.temperature == 0)[:, None, None]
    # Scores count from the best one: a tiny temperature makes the others -inf, not all of them inf.
    scores_BMV = logits_BMV - jnp.where(jnp.isfinite(top_BM1), top_BM1, 0.0)
    scores_BMV = scores_BMV / jnp.where(greedy_B11, 1.0, sampling.temperature[:, None, None])
    filtered = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0))
    keep = functools.partial(_filter, bits=_CUT_BITS if backend.cuts_vocab else 1)
    scores_BMV = jax.lax.cond(filtered, keep, lambda scores, _: scores, scores_BMV, sampling)
    token_11V = jnp.arange(logits_BMV.shape[-1])[None, None]
    point_BMV = jnp.where((token_11V == best_BM1) & (logits_BMV > -jnp.inf), 0.0, -jnp.inf)
    scores_BMV = jnp.where(greedy_B11, point_BMV, scores_BMV)
    broken_BM1 = jnp.isnan(top_BM1) | (top_BM1 == jnp.inf)
    return jnp.where(broken_BM1, -jnp.inf, scores_BMV)


def is_defined(scores_BMV: Float[Array, "B M V"]) -> Bool[Array, "B M"]:
    """Whether a processed law holds any token."""
    return jnp.any(scores_BMV > -jnp.inf, axis=-1)


def _filter(scores_BMV, sampling: Sampling, bits: int):
    """Keeps the tokens that pass top-k, top-p and min-p of their row; the rest become -inf."""
    V = scores_BMV.shape[-1]
    probs_BMV = jnp.where(scores_BMV > -jnp.inf, jnp.exp(scores_BMV), 0.0)
    order_BMV = _ordered_bits(scores_BMV)

    def column(x_B):
        return x_B[:, None, None]

    def count(keep_BMTV):
        return jnp.sum(keep_BMTV, axis=-1)

    k_B11 = jnp.where(column(sampling.top_k) > 0, column(sampling.top_k), V)
    keep_BMV = order_BMV >= _largest(
        order_BMV, lambda keep: count(keep) >= k_B11, bits, jnp.any(sampling.top_k > 0)
    )

    probs_BMV = jnp.where(keep_BMV, probs_BMV, 0.0)

    def mass(keep_BMTV):
        return jnp.sum(jnp.where(keep_BMTV, probs_BMV[:, :, None], 0.0), axis=-1)

    wanted_BM1 = column(sampling.top_p) * mass(keep_BMV[:, :, None])
    nucleus_BMV = order_BMV >= _largest(
        order_BMV, lambda keep: mass(keep) >= wanted_BM1, bits, jnp.any(sampling.top_p < 1)
    )
    keep_BMV &= nucleus_BMV | (column(sampling.top_p) >= 1)
    keep_BMV &= probs_BMV >= column(sampling.min_p)  # the largest probability is scaled to 1
    return jnp.where(keep_BMV | (scores_BMV == 0), scores_BMV, -jnp.inf)


def _ordered_bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order of the floats, so that a threshold can be found bit by bit."""
    x = jnp.where(x == 0, 0.0, x)  # -0 and 0 tie
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _largest(order_BMV, enough, bits: int, wanted: Bool[Array, ""]):
    """The largest threshold t, [B, M, 1], for which enough(order >= t) holds; exact.

    Where no row asks for one, none is `wanted`: the lowest, which all tokens reach.

    `enough` takes the tokens that reach each of T thresholds, [B, M, T, V], and is true for the
    first ones. A search bit by bit costs 32 passes over the vocabulary and no sort, which is
    several times cheaper than sorting on a CPU and parallel on a GPU. Several `bits` a step compare
    more and reduce less often, which is an all-reduce where the vocabulary is cut.
    """
    digit_11T = jnp.arange(1, 1 << bits, dtype=jnp.int32)[None, None]

    def refine(step, low_BM1):
        # Counted from the lowest integer, in arithmetic that wraps around.
        shift = 32 - bits * (step + 1)
        tried_BMT = low_BM1 + (digit_11T << shift)
        fits_BMT = enough(order_BMV[:, :, None] >= tried_BMT[..., None])
        return low_BM1 + (jnp.sum(fits_BMT, axis=-1, keepdims=True, dtype=jnp.int32) << shift)

    lowest_BM1 = jnp.full((*order_BMV.shape[:-1], 1), jnp.iinfo(jnp.int32).min, jnp.int32)
    return jax.lax.fori_loop(0, jnp.where(wanted, 32 // bits, 0), refine, lowest_BM1)


def draw(
    logits_BMV: Float[Array, "B M V"],
    sampling: Sampling,
    position_BM: Int[Array, "B M"],
    allowed_bits: UInt32[Array, "B M V/32"] | None = None,
    backend: Backend = ONE_DEVICE,
) -> Int[Array, "B M"]:
    """One token a node from its processed law, by the Gumbel-max trick; -1 where it is undefined.

    `position_BM` is the position that the drawn token takes. Nodes of one depth share the noise:
    only one of them can lie on the path. A batch without sampling pays for one argmax alone.
    """

    logits_BMV = restrict(logits_BMV, allowed_bits)
    best_BM, top_BM = best(logits_BMV)

    def greedy(_):
        return best_BM, top_BM

    def sampled(logits_BMV):
        scores_BMV = _scores(logits_BMV, best_BM, top_BM, sampling, backend)
        noise = gumbel(sampling.seed, position_BM, Purpose.TARGET, scores_BMV.shape[-1])
        # Not `best`: a CPU would make the noise once for each of its results.
        scores_BMV = scores_BMV + noise
        token_BM = jnp.argmax(scores_BMV, axis=-1).astype(jnp.int32)
        return token_BM, backend.columns(scores_BMV, token_BM[..., None])[..., 0]

    token_BM, top_BM = jax.lax.cond(jnp.any(sampling.temperature > 0), sampled, greedy, logits_BMV)
    return jnp.where(jnp.isfinite(top_BM), token_BM, -1)


def best(scores: Float[Array, "... V"]) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """(argmax, max) along the last axis, in one pass: the first of equals; NaN is above all."""

    def better(x, y):
        (x_token, x_score), (y_token, y_score) = x, y
        above = (x_score > y_score) | (x_score != x_score)
        first = above | ((x_score == y_score) & (x_token < y_token))
        return jnp.where(first, x_token, y_token), jnp.where(above, x_score, y_score)

    token = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    identity = jnp.int32(0), jnp.asarray(-jnp.inf, scores.dtype)
    return jax.lax.reduce((token, scores), identity, better, (scores.ndim - 1,))
