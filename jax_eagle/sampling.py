"""Sampling: per-request parameters, the processed law at a node, counter-based random draws.

Speculation is lossless with respect to the *processed* law: temperature, then top-k, top-p (mass of
what top-k left) and min-p (relative to the largest probability), in Hugging Face's order. All three
filters keep the tokens at or above a threshold, so ties at the threshold stay in.

Keys depend on (seed of the request, absolute position, purpose) alone: neither batch row nor round
enters, so a seeded text does not depend on the batch mix, the tree (greedy drafting) or a mesh.
"""

import dataclasses
import enum
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH = 64, 8
"""Of one request; the device keeps a table of this size for each sequence."""


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
) -> Float[Array, "B M V"]:
    """Logits of the processed law: softmax of the result is what tokens are drawn from.

    At temperature 0 the law is a point mass on the (first) argmax. Tokens outside the law are
    -inf; a row without any token, or with NaN or +inf, comes back all -inf (see `is_defined`).
    """
    logits_BMV = restrict(logits_BMV, allowed_bits)
    broken_BMV = jnp.isnan(logits_BMV) | (logits_BMV == jnp.inf)
    broken_BM1 = jnp.any(broken_BMV, axis=-1, keepdims=True)
    greedy_B11 = (sampling.temperature == 0)[:, None, None]
    # Scores count from the best one: a tiny temperature makes the others -inf, not all of them inf.
    top_BM1 = jnp.max(logits_BMV, axis=-1, keepdims=True)
    scores_BMV = logits_BMV - jnp.where(jnp.isfinite(top_BM1), top_BM1, 0.0)
    scores_BMV = scores_BMV / jnp.where(greedy_B11, 1.0, sampling.temperature[:, None, None])
    filtered = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0))
    scores_BMV = jax.lax.cond(filtered, _filter, lambda scores, _: scores, scores_BMV, sampling)
    best_BM1 = jnp.argmax(logits_BMV, axis=-1, keepdims=True)
    token_11V = jnp.arange(logits_BMV.shape[-1])[None, None]
    point_BMV = jnp.where((token_11V == best_BM1) & (logits_BMV > -jnp.inf), 0.0, -jnp.inf)
    scores_BMV = jnp.where(greedy_B11, point_BMV, scores_BMV)
    return jnp.where(broken_BM1, -jnp.inf, scores_BMV)


def is_defined(scores_BMV: Float[Array, "B M V"]) -> Bool[Array, "B M"]:
    """Whether a processed law holds any token."""
    return jnp.any(scores_BMV > -jnp.inf, axis=-1)


def _filter(scores_BMV, sampling: Sampling):
    """Keeps the tokens that pass top-k, top-p and min-p of their row; the rest become -inf."""
    V = scores_BMV.shape[-1]
    top_BM1 = jnp.max(scores_BMV, axis=-1, keepdims=True)
    probs_BMV = jnp.where(scores_BMV > -jnp.inf, jnp.exp(scores_BMV - top_BM1), 0.0)
    order_BMV = _ordered_bits(scores_BMV)

    def column(x_B):
        return x_B[:, None, None]

    k_B11 = jnp.where(column(sampling.top_k) > 0, column(sampling.top_k), V)
    count = lambda keep: jnp.sum(keep, axis=-1, keepdims=True)  # noqa: E731
    keep_BMV = order_BMV >= _largest(order_BMV, lambda keep: count(keep) >= k_B11)

    probs_BMV = jnp.where(keep_BMV, probs_BMV, 0.0)
    mass = lambda keep: jnp.sum(jnp.where(keep, probs_BMV, 0.0), axis=-1, keepdims=True)  # noqa: E731
    wanted_BM1 = column(sampling.top_p) * mass(keep_BMV)
    nucleus_BMV = order_BMV >= _largest(order_BMV, lambda keep: mass(keep) >= wanted_BM1)
    keep_BMV &= nucleus_BMV | (column(sampling.top_p) >= 1)
    keep_BMV &= probs_BMV >= column(sampling.min_p)  # the largest probability is scaled to 1
    return jnp.where(keep_BMV | (scores_BMV == top_BM1), scores_BMV, -jnp.inf)


def _ordered_bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order of the floats, so that a threshold can be found bit by bit."""
    x = jnp.where(x == 0, 0.0, x)  # -0 and 0 tie
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _largest(order_BMV, enough):
    """The largest threshold t, [B, M, 1], for which enough(order >= t) holds; exact.

    Bisection over the 32 bits costs 32 passes over the vocabulary and no sort, which is several
    times cheaper than sorting on a CPU and parallel on a GPU.
    """
    lowest, highest = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
    shape = (*order_BMV.shape[:-1], 1)

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1) + ((low ^ high) & 1)
        fits = enough(order_BMV >= middle)
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

    bounds = jnp.full(shape, lowest, jnp.int32), jnp.full(shape, highest, jnp.int32)
    return jax.lax.fori_loop(0, 32, halve, bounds)[0]


def draw(
    logits_BMV: Float[Array, "B M V"],
    sampling: Sampling,
    position_BM: Int[Array, "B M"],
    allowed_bits: UInt32[Array, "B M V/32"] | None = None,
) -> Int[Array, "B M"]:
    """One token a node from its processed law, by the Gumbel-max trick; -1 where it is undefined.

    `position_BM` is the position that the drawn token takes. Nodes of one depth share the noise:
    only one of them can lie on the path. A batch without sampling pays for one argmax alone.
    """

    def greedy(logits_BMV):
        return _best(restrict(logits_BMV, allowed_bits))

    def sampled(logits_BMV):
        scores_BMV = processed_scores(logits_BMV, sampling, allowed_bits)
        noise = gumbel(sampling.seed, position_BM, Purpose.TARGET, scores_BMV.shape[-1])
        return _best(scores_BMV + noise)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), sampled, greedy, logits_BMV)


def _best(scores_BMV) -> Int[Array, "B M"]:
    """Argmax; -1 where the best score is NaN (which argmax prefers) or infinite."""
    token_BM = jnp.argmax(scores_BMV, axis=-1).astype(jnp.int32)
    top_BM = jnp.take_along_axis(scores_BMV, token_BM[..., None], axis=-1)[..., 0]
    return jnp.where(jnp.isfinite(top_BM), token_BM, -1)
