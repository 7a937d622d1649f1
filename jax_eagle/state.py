"""What a batch of sequences carries from round to round, and what is compiled around it."""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from .cache import PagedCache
from .controls import Controls
from .draft import Sync
from .logprobs import Logprobs
from .sampling import Sampling
from .tree import TreeShape

FINISH_REASONS = ("", "stop", "length", "error")
_RUNNING, _STOP, _LENGTH, _ERROR = range(4)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled into a decode program; static and hashable."""

    shape: TreeShape
    sampled_drafting: bool = False
    sync_all: bool = True
    """Re-synchronise the draft with all accepted tokens, or with the last and the bonus only."""

    @property
    def path_length(self) -> int:
        """A: nodes of the longest path, root included."""
        return self.shape.max_depth + 1

    @property
    def plain(self) -> bool:
        """Whether the tree is the root alone."""
        return self.shape.max_depth == 0

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
    controls: Controls | None
    """Penalties, bias and the like; None where no request uses any."""
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
    logprobs: Logprobs | None = None
    """Of the last round's tokens; None: not computed."""

    @property
    def done(self) -> Bool[Array, "B"]:
        """Finished rows."""
        return self.finish != _RUNNING


def init_state(
    cache: PagedCache,
    draft_cache: PagedCache | None,
    sampling: Sampling,
    controls: Controls | None,
    stop_ids_BE: Int[Array, "B E"],
    max_tokens_B: Int[Array, "B"],
    *,
    width: int,
    path_length: int,
    sync_length: int,
    feature_BF: Float[Array, "B F"],
) -> DecodeState:
    """The state before the first token: nothing given out, `width` tokens of room.

    `feature_BF` gives width and dtype of the features that the draft takes.
    """
    B = max_tokens_B.shape[0]
    zeros_B = jnp.zeros(B, jnp.int32)
    sync = None
    if draft_cache is not None:
        tokens_BA = jnp.zeros((B, sync_length), jnp.int32)
        features_BAF = jnp.broadcast_to(feature_BF[:, None], (B, sync_length, feature_BF.shape[1]))
        sync = Sync(tokens_BA, features_BAF, zeros_B)
    return DecodeState(
        cache=cache,
        draft_cache=draft_cache,
        root=zeros_B,
        sync=sync,
        sampling=sampling,
        controls=controls,
        stop_ids=stop_ids_BE,
        max_tokens=max_tokens_B,
        tokens=jnp.zeros((B, width), jnp.int32),
        num_tokens=zeros_B,
        finish=zeros_B,
        rounds=zeros_B,
        num_accepted=zeros_B,
        path_ranks=jnp.zeros((B, path_length), jnp.int32),
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
    controls = state.controls
    return state.replace(
        controls=None if controls is None else controls.count(new_BA, kept_B),
        tokens=tokens_BO,
        num_tokens=state.num_tokens + kept_B,
        finish=jnp.where(state.done, state.finish, finish_B),
    )
