"""Log-probabilities of the tokens that a round gave out, and of the likeliest ones beside them.

They are the target's own, before controls, temperature and filters: comparable between requests,
and the same whatever was sampled.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from .sharding import ONE_DEVICE, Backend

MAX_TOP = 20
"""Alternatives a token."""


class Logprobs(struct.PyTreeNode):
    """Of the last round's tokens; zeros for sequences that did not ask."""

    wanted: Bool[Array, "B"]
    chosen: Float[Array, "B A"]
    top_tokens: Int[Array, "B A T"]
    top: Float[Array, "B A T"]
    backend: Backend = struct.field(pytree_node=False, default=ONE_DEVICE)
    """How the logits are cut."""

    @classmethod
    def empty(cls, B: int, A: int, top: int = MAX_TOP, backend: Backend = ONE_DEVICE) -> "Logprobs":
        """Nobody wants any."""
        zeros = jnp.zeros((B, A, top))
        return cls(jnp.zeros(B, bool), zeros[..., 0], zeros.astype(jnp.int32), zeros, backend)

    def of(
        self,
        logits_BMV: Float[Array, "B M V"],
        path_BA: Int[Array, "B A"],
        new_BA: Int[Array, "B A"],
    ) -> "Logprobs":
        """Those of new_BA, each drawn at the node of `path_BA` in the same column."""
        width, top = path_BA.shape[1], self.top.shape[2]

        def compute(logits_BMV):
            logits_BAV = jnp.take_along_axis(logits_BMV, path_BA[:, :, None], axis=1)
            token_BA1 = jnp.maximum(new_BA, 0)[:, :, None]
            chosen_BA1 = self.backend.columns(logits_BAV, token_BA1)
            top_BAT, top_tokens_BAT = self.backend.top_k(logits_BAV, top)
            # The likeliest tokens by their logits: log-probabilities tie where rounding says so.
            largest_BA1 = top_BAT[:, :, :1]
            total_BA1 = jnp.sum(jnp.exp(logits_BAV - largest_BA1), axis=2, keepdims=True)
            chosen_BA1, top_BAT = (
                x - largest_BA1 - jnp.log(total_BA1) for x in (chosen_BA1, top_BAT)
            )
            return chosen_BA1[:, :, 0], top_tokens_BAT.astype(jnp.int32), top_BAT

        def nothing(_):
            return self.chosen[:, :width], self.top_tokens[:, :width], self.top[:, :width]

        new = jax.lax.cond(jnp.any(self.wanted), compute, nothing, logits_BMV)
        old = self.chosen, self.top_tokens, self.top
        both = zip(old, new, strict=True)
        chosen, tokens, log_probs = (x.at[:, :width].set(y) for x, y in both)
        return self.replace(chosen=chosen, top_tokens=tokens, top=log_probs)
