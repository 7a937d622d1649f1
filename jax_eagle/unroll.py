"""Passes of a draft over its own states along whole texts: training-time test (EAGLE-3; HASS).

When decoding, the draft sees true features up to the last accepted token and its own states from
there on. Pass j does this for every position of a text at once: row i takes token i and the state
of row i-1 of pass j-1, so the last j tokens before it were drafted from states. Its ancestors are
row i-1 of pass j-1, row i-2 of pass j-2 and so on, then the rows up to i-j of pass 0, which took
true features. All passes are nodes of one tree, and earlier passes are scratch, just as in
`Draft.expand`: training, evaluation and decoding run the same forward.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .attention import View
from .cache import KV
from .draft import Draft
from .llama import Target


class Text(NamedTuple):
    """Packed rows: segments side by side, none of which sees another."""

    tokens: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    """From 1; 0 is padding."""
    position: Int[Array, "B T"]
    """From 0 in each segment."""


class Pass(NamedTuple):
    """One pass along a text."""

    state: Float[Array, "B T D"]
    """Row i is what the head turns into the law of token i+1."""
    valid: Bool[Array, "B T"]
    """Rows with as many tokens before them in their segment as the pass needs."""


def unroll(
    draft: Draft,
    target: Target,
    text: Text,
    features_BTF: Float[Array, "B T F"],
    num_passes: int,
    *,
    remat: bool = False,
) -> list[Pass]:
    """Runs `num_passes` passes; the first takes the target's features.

    Args:
      features_BTF: the target's feature of each token of `text`.
      remat: compute the passes again in the backward pass instead of keeping what is inside them.
    """

    def forward(draft, features_BTF, mask_BTX, scratch: KV | None):
        view = View(text.position, mask_BTX, scratch=scratch)
        return draft(target, text.tokens, features_BTF, view)

    if remat:
        forward = jax.checkpoint(forward)
    passes, scratch, before_BTF = [], None, features_BTF
    for j in range(num_passes):
        valid_BT = (text.segment > 0) & (text.position > j)
        before_BTF = jnp.pad(before_BTF[:, :-1], ((0, 0), (1, 0), (0, 0)))
        before_BTF = jnp.where(valid_BT[:, :, None], before_BTF, jnp.zeros_like(before_BTF))
        state_BTD, new_kv = forward(draft, before_BTF, ancestors(text, j), scratch)
        scratch = new_kv if scratch is None else scratch.append(new_kv)
        passes.append(Pass(state_BTD, valid_BT))
        before_BTF = state_BTD
    return passes


def ancestors(text: Text, last_pass: int) -> Bool[Array, "B T X"]:
    """What the rows of a pass see: X rows, those of all passes so far side by side."""
    T = text.tokens.shape[1]
    row = jnp.arange(T)
    distance_TT = row[:, None] - row[None, :]
    same_BTT = (text.segment[:, :, None] == text.segment[:, None, :]) & (
        text.position[:, None, :] > 0  # a segment's first token has no feature before it
    )
    parts = [same_BTT & (distance_TT >= last_pass)[None]]
    parts += [same_BTT & (distance_TT == last_pass - j)[None] for j in range(1, last_pass + 1)]
    parts[-1] = parts[-1] | jnp.eye(T, dtype=bool)[None]  # each row sees itself at least
    return jnp.concatenate(parts, axis=2)
