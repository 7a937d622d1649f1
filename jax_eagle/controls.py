"""What shapes the logits of a request before the law is made of them, at every node of a tree.

In this order: tokens that are not allowed, bad words and (before `min_tokens`) stop tokens become
-inf; the bias is added; repetition, frequency and presence penalties follow. A node counts what was
given out before the round and its own ancestors in the tree, so each node has the logits that plain
decoding would have there, and verification stays lossless.

The tables have one row a slot and stay on the device; a batch names the rows of its sequences.
A batch in which nobody uses controls pays for one reduction over its rows.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from .sampling import MAX_BAD_WORD_LENGTH, MAX_BAD_WORDS, SamplingParams
from .sharding import ONE_DEVICE, Backend
from .tree import Tree


class Controls(struct.PyTreeNode):
    """Tables of S slots, and which slot each of the B sequences of a batch has."""

    slot: Int[Array, "B"]
    active: Bool[Array, "S"]
    """Whether the slot's request uses any control."""
    bias: Float[Array, "S V"]
    """Added to the logits; -inf for tokens that are not allowed."""
    counts: Int[Array, "S V"]
    """Times each token was given out."""
    in_prompt: Bool[Array, "S V"]
    presence: Float[Array, "S"]
    frequency: Float[Array, "S"]
    repetition: Float[Array, "S"]
    min_tokens: Int[Array, "S"]
    bad_words: Int[Array, "S W L"]
    """Token sequences, filled with -1 in front; rows without a last token are unused."""
    backend: Backend = struct.field(pytree_node=False, default=ONE_DEVICE)
    """On a mesh the tables over tokens are cut like the logits."""

    def spread(self) -> "Controls":
        """On a mesh, the tables over tokens cut along the vocabulary and the others whole."""
        cut = ("bias", "counts", "in_prompt")
        names = [name for name in vars(self) if name != "backend"]
        axes = {name: (None, "vocab") if name in cut else () for name in names}
        shard = self.backend.shard
        return self.replace(**{name: shard(getattr(self, name), *axes[name]) for name in names})

    def count(self, new_BA: Int[Array, "B A"], kept_B: Int[Array, "B"]) -> "Controls":
        """With new_BA[:kept] counted as given out."""
        kept_BA = jnp.arange(new_BA.shape[1], dtype=jnp.int32)[None] < kept_B[:, None]
        token_BA = jnp.where(kept_BA, new_BA, self.counts.shape[1])
        counts = self.counts.at[self.slot[:, None], token_BA].add(1, mode="drop")
        return self.replace(counts=counts).spread()


class Row(struct.PyTreeNode):
    """The controls of one request, as one row of the tables; host arrays."""

    active: np.ndarray
    bias: np.ndarray
    counts: np.ndarray
    in_prompt: np.ndarray
    presence: np.float32
    frequency: np.float32
    repetition: np.float32
    min_tokens: np.int32
    bad_words: np.ndarray

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        vocab_size: int,
        prompt: Sequence[int] = (),
        output: Sequence[int] = (),
    ) -> "Row":
        """The row of a request with this prompt that has given out `output` before."""
        bias = np.zeros(vocab_size, np.float32)
        if params.allowed_token_ids is not None:
            bias[:] = -np.inf
            bias[list(params.allowed_token_ids)] = 0.0
        for token, value in params.logit_bias:
            bias[token] += value
        bad_words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH), -1, np.int32)
        for i, word in enumerate(params.bad_words):
            bad_words[i, -len(word) :] = word
        counts, in_prompt = np.zeros(vocab_size, np.int32), np.zeros(vocab_size, bool)
        np.add.at(counts, np.asarray(output, np.int64), 1)
        in_prompt[np.asarray(prompt, np.int64)] = True
        return cls(
            active=np.asarray(uses_controls(params)),
            bias=bias,
            counts=counts,
            in_prompt=in_prompt,
            presence=np.float32(params.presence_penalty),
            frequency=np.float32(params.frequency_penalty),
            repetition=np.float32(params.repetition_penalty),
            min_tokens=np.int32(params.min_tokens),
            bad_words=bad_words,
        )


def uses_controls(params: SamplingParams) -> bool:
    """Whether a request needs a row in the tables."""
    return (
        params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
        or params.min_tokens > 0
        or bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or bool(params.bad_words)
    )


def stack_controls(
    params: Sequence[SamplingParams],
    vocab_size: int,
    prompts: Sequence[Sequence[int]],
    batch: int,
    backend: Backend = ONE_DEVICE,
) -> Controls | None:
    """Controls of a batch of `batch` sequences, the last of them idle; None if nobody has any."""
    if not any(map(uses_controls, params)):
        return None
    idle = [SamplingParams()] * (batch - len(params))
    rows = [
        Row.of(p, vocab_size, prompt)
        for p, prompt in zip([*params, *idle], [*prompts, *[()] * len(idle)], strict=True)
    ]
    tables = {name: np.stack([getattr(row, name) for row in rows]) for name in vars(rows[0])}
    slot = np.arange(batch, dtype=np.int32)
    return Controls(slot=slot, **tables, backend=backend)  # pyright: ignore


def shape_logits(
    controls: Controls | None,
    logits_BMV: Float[Array, "B M V"],
    tree: Tree,
    tree_tokens_BM: Int[Array, "B M"],
    tokens_BO: Int[Array, "B O"],
    num_tokens_B: Int[Array, "B"],
    stop_ids_BE: Int[Array, "B E"],
) -> Float[Array, "B M V"]:
    """The logits of each node under the controls of its sequence.

    Args:
      tree_tokens_BM: tokens of the nodes. The root is the last token given out, or, at the end of
        prefill, the last one of the prompt.
      tokens_BO, num_tokens_B: what was given out so far, the root included.
      stop_ids_BE: tokens that end a sequence, padded with -1.
    """
    if controls is None:
        return logits_BMV
    slot_B = controls.slot
    active_B = controls.active[slot_B]
    by_vocab = controls.backend.by_vocab  # a branch that does not say so would gather them

    def shaped(plain_BMV):
        logits_BMV = plain_BMV
        given_BM = num_tokens_B[:, None] + tree.depth
        early_BM = given_BM < controls.min_tokens[slot_B][:, None]
        logits_BMV = _forbid(logits_BMV, stop_ids_BE[:, None, :], early_BM[:, :, None])
        words_BWL = controls.bad_words[slot_B]
        written_BMW = _written(words_BWL, tree, tree_tokens_BM, tokens_BO, given_BM)
        logits_BMV = _forbid(logits_BMV, words_BWL[:, None, :, -1], written_BMW)
        logits_BMV = logits_BMV + controls.bias[slot_B][:, None]
        logits_BMV = _penalise(controls, logits_BMV, _counts(controls, tree, tree_tokens_BM))
        # The table row of a sequence without controls may be that of the slot's last one.
        return by_vocab(jnp.where(active_B[:, None, None], logits_BMV, plain_BMV))

    return by_vocab(jax.lax.cond(jnp.any(active_B), shaped, by_vocab, logits_BMV))


def _forbid(logits_BMV, tokens_BxK, where_BMK):
    """-inf for tokens [B, 1 or M, K] of a node where `where` [B, M, 1 or K] holds; -1 is none."""
    B, M, V = logits_BMV.shape
    token_BMK = jnp.broadcast_to(tokens_BxK, (B, M, tokens_BxK.shape[2]))
    token_BMK = jnp.where(where_BMK & (token_BMK >= 0), token_BMK, V)
    row_B11, node_1M1 = jnp.arange(B)[:, None, None], jnp.arange(M)[None, :, None]
    return logits_BMV.at[row_B11, node_1M1, token_BMK].set(-jnp.inf, mode="drop")


def _written(words_BWL, tree: Tree, tree_tokens_BM, tokens_BO, given_BM):
    """Whether a node and the tokens before it end in all of a bad word but its last token."""
    B, W, L = words_BWL.shape
    matches_BMW = jnp.broadcast_to((words_BWL[:, None, :, -1] >= 0), (B, given_BM.shape[1], W))
    node_BM = jnp.broadcast_to(jnp.arange(given_BM.shape[1], dtype=jnp.int32)[None], given_BM.shape)
    for back in range(L - 1):
        # `back` tokens before the node: an ancestor, or behind the root what was given out earlier.
        index_BM = given_BM - 1 - back
        older_BM = jnp.take_along_axis(tokens_BO, jnp.maximum(index_BM, 0), axis=1)
        own_BM = jnp.take_along_axis(tree_tokens_BM, node_BM, axis=1)
        token_BM = jnp.where(back <= tree.depth, own_BM, older_BM)
        token_BM = jnp.where(index_BM >= 0, token_BM, -2)  # nothing was given out there
        wanted_B1W = words_BWL[:, None, :, L - 2 - back]
        matches_BMW &= (wanted_B1W < 0) | (wanted_B1W == token_BM[:, :, None])
        node_BM = jnp.take_along_axis(tree.parent, node_BM, axis=1)
    return matches_BMW


def _counts(controls: Controls, tree: Tree, tree_tokens_BM):
    """Times each token was given out before the token that is drawn at a node, [B, M, V]."""
    B, M = tree_tokens_BM.shape
    counts_BMV = jnp.repeat(controls.counts[controls.slot][:, None], M, axis=1)
    if M == 1:
        return counts_BMV
    mask_BMM = tree.mask
    if mask_BMM is None:
        mask_BMM = jnp.broadcast_to(jnp.tril(jnp.ones((M, M), bool))[None], (B, M, M))
    drafted_BMM = mask_BMM & (tree.depth > 0)[:, None, :]  # the root is counted already
    row_B11, node_1M1 = jnp.arange(B)[:, None, None], jnp.arange(M)[None, :, None]
    return counts_BMV.at[row_B11, node_1M1, tree_tokens_BM[:, None, :]].add(
        drafted_BMM.astype(jnp.int32)
    )


def _penalise(controls: Controls, logits_BMV, counts_BMV):
    def column(x_S):
        return x_S[controls.slot][:, None, None]

    seen_BMV = (counts_BMV > 0) | controls.in_prompt[controls.slot][:, None]
    factor_B11 = column(controls.repetition)
    scaled_BMV = jnp.where(logits_BMV > 0, logits_BMV / factor_B11, logits_BMV * factor_B11)
    logits_BMV = jnp.where(seen_BMV, scaled_BMV, logits_BMV)
    logits_BMV = logits_BMV - column(controls.frequency) * counts_BMV.astype(jnp.float32)
    return logits_BMV - column(controls.presence) * (counts_BMV > 0).astype(jnp.float32)
