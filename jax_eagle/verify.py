"""Verification: which drafted nodes the target accepts, and its own next token. Lossless.

Greedy drafting proposes the draft's favourites, a point mass. Accepting child x with probability
p(x) and zeroing it on rejection has the same law as drawing y ~ p once per node and walking to the
child that equals y. So all nodes draw in parallel, and the walk compares integers.

Sampled drafting draws the children of a node from the draft's law without replacement. Each is
accepted with probability min(1, p(x) / q(x)); a rejection leaves the residual max(p - q, 0), and
x leaves q (multi-round speculative sampling, arXiv 2508.08192; SpecInfer, EAGLE).

Both walks are one: at the current node find a child that passes, or stop and emit a bonus token.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from .sampling import Purpose, Sampling, draw, gumbel, is_defined, processed_scores, uniform
from .sharding import ONE_DEVICE, Backend
from .tree import Tree


class Verdict(struct.PyTreeNode):
    """Outcome of one round."""

    path: Int[Array, "B A"]
    """Nodes from the root to the last accepted one, padded with it."""
    num_accepted: Int[Array, "B"]
    """Accepted draft nodes, root excluded: 0..A-1."""
    bonus: Int[Array, "B"]
    """The target's own token behind the path; -1 where its law is undefined."""
    error: Bool[Array, "B"]
    """The law behind the path is undefined: NaN logits, or no token is left to draw from."""


class DraftLaw(struct.PyTreeNode):
    """What sampled drafting drew from: needed to verify it."""

    probs: Float[Array, "B E U"]
    """The draft's law at each expanded node."""
    expanded: Int[Array, "B M"]
    """Which of the E expanded nodes a node is; anything for a leaf."""
    draft_to_target: Int[Array, "U"] | None
    """Target token of each draft token; None: the vocabularies are the same."""
    backend: Backend = struct.field(pytree_node=False, default=ONE_DEVICE)

    def at(self, node_B: Int[Array, "B"], vocab_size: int) -> Float[Array, "B V"]:
        """The law at one node a sequence, over target tokens."""
        probs_BU = _at(self.probs, _at(self.expanded, node_B))
        if self.draft_to_target is None:
            return probs_BU
        return self.backend.spread_columns(probs_BU, self.draft_to_target, vocab_size)


def verify(
    tree: Tree,
    tokens_BM: Int[Array, "B M"],
    draft_law: DraftLaw | None,
    logits_BMV: Float[Array, "B M V"],
    length_B: Int[Array, "B"],
    sampling: Sampling,
    *,
    max_depth: int,
    max_children: int,
    allowed_bits: UInt32[Array, "B M V/32"] | None = None,
    backend: Backend = ONE_DEVICE,
) -> Verdict:
    """Accepts the longest path that the target's processed law supports.

    Args:
      tree: the nodes that the target has just seen; `tokens_BM` their tokens.
      draft_law: None when the drafting was greedy.
      logits_BMV: the target's logits at each node.
      length_B: committed tokens; the child of a node of depth d takes position length + d + 1.
      sampling: the requests' parameters.
      max_depth, max_children: static bounds of the tree.
      allowed_bits: tokens that may follow each node (guided decoding; see `sampling.restrict`)
      backend: how the logits are cut.
    """
    position_BM = length_B[:, None] + tree.depth + 1
    if draft_law is None:
        drawn_BM = draw(logits_BMV, sampling, position_BM, allowed_bits, backend)
        step = functools.partial(_matching_child, tree, tokens_BM, drawn_BM)
        path_BA, num_accepted_B = _walk(step, length_B, max_depth)
        bonus_B = _at(drawn_BM, path_BA[:, -1])
        return Verdict(path_BA, num_accepted_B, bonus_B, error=bonus_B < 0)
    scores_BMV = processed_scores(logits_BMV, sampling, allowed_bits, backend)
    return _verify_sampled(
        tree, tokens_BM, draft_law, scores_BMV, position_BM, sampling, max_depth, max_children,
        backend,
    )  # fmt: skip


def _at(x_BM, node_B):
    """x_BM at one node a sequence."""
    index = jnp.reshape(node_B, (-1, 1) + (1,) * (x_BM.ndim - 2))
    return jnp.squeeze(jnp.take_along_axis(x_BM, index, axis=1), axis=1)


def _walk(step, length_B, max_depth: int):
    """Follows `step(node_B) -> (child_B, found_B)` from the root until nothing is found."""
    node_B = jnp.zeros_like(length_B)
    going_B = jnp.ones(length_B.shape, bool)
    num_accepted_B = jnp.zeros_like(length_B)
    path = [node_B]
    for _ in range(max_depth):
        child_B, found_B = step(node_B)
        going_B = going_B & found_B
        node_B = jnp.where(going_B, child_B, node_B)
        num_accepted_B = num_accepted_B + going_B.astype(jnp.int32)
        path.append(node_B)
    return jnp.stack(path, axis=1), num_accepted_B


def _children(tree: Tree, node_B) -> Bool[Array, "B M"]:
    return (tree.parent == node_B[:, None]) & (tree.depth > 0)


def _matching_child(tree: Tree, tokens_BM, drawn_BM, node_B):
    """The child of `node_B` whose token is the one that was drawn there."""
    match_BM = _children(tree, node_B) & (tokens_BM == _at(drawn_BM, node_B)[:, None])
    return jnp.argmax(match_BM, axis=1).astype(jnp.int32), jnp.any(match_BM, axis=1)


class _Trial(struct.PyTreeNode):
    """State of the residual loop at one node: laws that shrink with each rejected child."""

    target_probs: Float[Array, "B V"]
    draft_probs: Float[Array, "B V"]
    child: Int[Array, "B"]
    found: Bool[Array, "B"]


def _verify_sampled(
    tree, tokens_BM, law: DraftLaw, scores_BMV, position_BM, sampling, max_depth, max_children,
    backend: Backend,
) -> Verdict:  # fmt: skip
    B, _, V = scores_BMV.shape

    def step(carry, _):
        node_B, going_B, residual_BV = carry
        trial = _Trial(
            target_probs=_softmax(_at(scores_BMV, node_B)),
            draft_probs=law.at(node_B, V),
            child=node_B,
            found=jnp.zeros(B, bool),
        )
        position_B = _at(position_BM, node_B)
        body = functools.partial(
            _try_child, tree, tokens_BM, node_B, position_B, sampling, backend=backend
        )
        trial = jax.lax.fori_loop(0, max_children, body, trial)
        found_B = going_B & trial.found
        residual_BV = jnp.where(going_B[:, None], trial.target_probs, residual_BV)
        node_B = jnp.where(found_B, trial.child, node_B)
        return (node_B, found_B, residual_BV), (node_B, found_B)

    root_B = jnp.zeros(B, jnp.int32)
    start = (root_B, jnp.ones(B, bool), jnp.zeros((B, V)))
    (node_B, going_B, residual_BV), (path_AB, found_AB) = jax.lax.scan(
        step, start, length=max_depth
    )
    # A path that reached the last depth has no rejections behind it: the bonus has the full law.
    final_BV = jnp.where(going_B[:, None], _softmax(_at(scores_BMV, node_B)), residual_BV)
    noise_BV = gumbel(
        sampling.seed, _at(position_BM, node_B)[:, None], Purpose.RESIDUAL, V
    )[:, 0]  # fmt: skip
    bonus_B = jnp.argmax(jnp.log(final_BV) + noise_BV, axis=-1).astype(jnp.int32)
    defined_B = _at(is_defined(scores_BMV), node_B)
    return Verdict(
        path=jnp.concatenate([root_B[:, None], path_AB.T], axis=1),
        num_accepted=jnp.sum(found_AB, axis=0, dtype=jnp.int32),
        bonus=jnp.where(defined_B, bonus_B, -1),
        error=~defined_B,
    )


def _try_child(
    tree: Tree, tokens_BM, node_B, position_B, sampling, rank, trial: _Trial, *,
    backend: Backend = ONE_DEVICE,
) -> _Trial:  # fmt: skip
    """Tries the child of `rank`; on rejection moves on to the residual laws."""
    is_child_BM = _children(tree, node_B) & (tree.rank == rank)
    child_B = jnp.argmax(is_child_BM, axis=1).astype(jnp.int32)
    token_B = _at(tokens_BM, child_B)
    target_prob_B = backend.columns(trial.target_probs, token_B[:, None])[:, 0]
    draft_prob_B = backend.columns(trial.draft_probs, token_B[:, None])[:, 0]
    # Fewer tokens in the draft's law than children: the surplus children were never drawn.
    tried_B = jnp.any(is_child_BM, axis=1) & (draft_prob_B > 0) & ~trial.found

    rank_B = jnp.full_like(node_B, rank)
    chance_B = uniform(sampling.seed, position_B, Purpose.ACCEPT, rank_B)
    accepted_B = tried_B & (chance_B * draft_prob_B < target_prob_B)
    rejected_B1 = (tried_B & ~accepted_B)[:, None]
    residual_BV = _normalise(
        jnp.maximum(trial.target_probs - trial.draft_probs, 0.0), trial.target_probs
    )
    token_1V = jnp.arange(residual_BV.shape[1])[None]
    rest_BV = jnp.where(token_1V == token_B[:, None], 0.0, trial.draft_probs)
    return _Trial(
        target_probs=jnp.where(rejected_B1, residual_BV, trial.target_probs),
        draft_probs=jnp.where(rejected_B1, _normalise(rest_BV, rest_BV), trial.draft_probs),
        child=jnp.where(accepted_B, child_B, trial.child),
        found=trial.found | accepted_B,
    )


def _normalise(mass_BV, otherwise_BV):
    """mass / sum(mass), or `otherwise` where there is no mass (equal laws, up to rounding)."""
    total_B1 = jnp.sum(mass_BV, axis=1, keepdims=True)
    return jnp.where(total_B1 > 0, mass_BV / jnp.where(total_B1 > 0, total_B1, 1.0), otherwise_BV)


def _softmax(scores_BV):
    """Softmax of scores whose largest is 0; zeros, not NaN, where the law is undefined."""
    mass_BV = jnp.exp(scores_BV)
    return _normalise(mass_BV, mass_BV)
