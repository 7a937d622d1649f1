"""The draft: its parameters, its passes over a cache, and the growing of the draft tree.

The networks are in `eagle`. Slot i of the draft's cache holds the pair (token i, feature of token
i-1) at RoPE position i. Slot 0 has no feature and is never attended. So draft and target share
positions, masks and page table.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.compat import order_after

from .attention import View
from .cache import KV, PagedCache, commit
from .config import DraftConfig
from .eagle import EagleDraft, abstract_draft_params, smallest_call
from .llama import Target
from .packing import matmul, pack_params, quantized_matmul, useful_blocks
from .placement import Placement
from .sampling import Purpose, Sampling, best, gumbel, processed_scores
from .sharding import Backend, named_sharding
from .tree import Tree, TreeShape, ancestor_mask
from .verify import DraftLaw


class CutHead(struct.PyTreeNode):
    """The target's head for the tokens of the draft vocabulary alone."""

    kernel: Num[Array, "stored U"]
    blocks: Array | None
    """See `packing`."""
    backend: Backend = struct.field(pytree_node=False)
    scale: Float[Array, "S U"] | None = None
    """Of a kernel that is stored in fewer bits."""

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... U"]:
        if self.scale is None:
            return self.backend.by_vocab(matmul(x, self.kernel, self.blocks, jnp.float32))
        axes = "embed", "vocab"
        logits = quantized_matmul(x, self.kernel, self.scale, axes, self.backend, jnp.float32)
        return self.backend.by_vocab(logits)


class Proposal(struct.PyTreeNode):
    """The draft tree of one round."""

    tree: Tree
    tokens: Int[Array, "B M"]
    expanded: Int[Array, "B M"]
    """Which expanded node each node is, 0 = the root; 0 too for nodes that proposed nothing."""
    law: DraftLaw | None
    """What the tokens were drawn from; None when drafting greedily."""
    scratch: KV | None
    """Draft keys and values of the expanded nodes, root excluded; None if only the root was."""


class Sync(struct.PyTreeNode):
    """Pairs whose draft keys and values are still to be computed from true features."""

    tokens: Int[Array, "B A"]
    """Accepted tokens, then the new root."""
    features: Float[Array, "B A F"]
    """The target's features of the tokens just before them."""
    count: Int[Array, "B"]
    """Valid rows; 0 for a finished sequence."""

    def first(self, rows: int) -> "Sync":
        """Without the columns behind the first `rows`, which must be unused."""
        return Sync(self.tokens[:, :rows], self.features[:, :rows], self.count)

    def restart(self, tokens, features, count) -> "Sync":
        """With these pairs instead, [B, up to A]; what lies behind them is unused."""
        features = features.astype(self.features.dtype)
        return Sync(
            tokens=jax.lax.dynamic_update_slice(self.tokens, tokens, (0, 0)),
            features=jax.lax.dynamic_update_slice(self.features, features, (0, 0, 0)),
            count=count,
        )

    def append(self, token_B, feature_BF, where_B) -> "Sync":
        """With one pair more for the sequences of `where`; there must be room for it."""
        row_B, A = jnp.arange(token_B.shape[0]), self.tokens.shape[1]
        column_B = jnp.where(where_B, self.count, A)
        return Sync(
            tokens=self.tokens.at[row_B, column_B].set(token_B, mode="drop"),
            features=self.features.at[row_B, column_B].set(
                feature_BF.astype(self.features.dtype), mode="drop"
            ),
            count=self.count + where_B.astype(jnp.int32),
        )


def draft_placement(config: DraftConfig, backend: Backend) -> Placement:
    """Where the parameters of a draft lie; ConfigError if they do not divide over the mesh."""
    num_tokens = config.draft_vocab_size or config.layer.vocab_size
    layer = dataclasses.replace(config.layer, vocab_size=num_tokens)
    return Placement.of(layer, functools.partial(abstract_draft_params, config), backend)


class Draft(struct.PyTreeNode):
    """Parameters of an EAGLE draft plus its static config: a pytree, like `Target`."""

    params: Any
    draft_to_target: Int[Array, "U"] | None
    """Target token of each draft token; None: the vocabularies are the same."""
    config: DraftConfig = struct.field(pytree_node=False)

    def __call__(
        self, target: Target, tokens_BM, features_BMF, view: View
    ) -> tuple[Float[Array, "B M D"], KV]:
        """One pass over pairs (token, feature before it): (estimated features, new KV)."""
        if self.config.own_embedding:
            embeds_BMD = self._apply(target, tokens_BM, method="embed_tokens")
        else:
            embeds_BMD = target.embed(tokens_BM)
        return self._apply(target, embeds_BMD, features_BMF, view)

    def _apply(self, target: Target, *args, method: str | None = None) -> Any:
        module = EagleDraft(self.config, target.backend)
        return module.apply({"params": self.params}, *args, method=method)

    def pack(self) -> "Draft":
        """On a CPU, the draft with its weights in blocks as well; see `Target.pack`."""
        module, call = EagleDraft(self.config), smallest_call(self.config)
        return self.replace(params=pack_params(module, self.params, *call, method="initialise"))

    def spread(self, mesh: Mesh) -> "Draft":
        """The draft with its parameters spread over `mesh`, like its target's.

        Raises:
          ConfigError: heads, FFN or vocabulary do not divide evenly.
        """
        placement = draft_placement(self.config, Backend(mesh=mesh))
        return self.replace(
            params=placement.spread(self.params),
            draft_to_target=jax.device_put(self.draft_to_target, named_sharding(mesh)),
            config=dataclasses.replace(self.config, layer=placement.fitted(self.config.layer)),
        )

    def bind_head(self, target: Target) -> Callable[[jax.Array], jax.Array]:
        """From states [..., D] to float32 logits [..., U] over the draft vocabulary.

        That is the draft's own head or the target's, cut to the draft vocabulary. The result is a
        pytree, so it can be bound once and given to compiled programs.
        """
        if self.config.own_head:
            return Partial(_own_head, self, target.replace(params=None))
        head = self.cut_head(target)
        if self.config.output_norm or not self.config.is_eagle3:
            return head
        return Partial(_head_behind_norm, self, target.replace(params=None), head)

    def cut_head(self, target: Target) -> Callable[[jax.Array], jax.Array]:
        """The target's head for the draft vocabulary alone: states [..., D] -> logits [..., U]."""
        if self.draft_to_target is None:
            return Partial(Target.head, target)
        kernel, scale = target.head_columns(self.draft_to_target)
        kernel = target.backend.shard(kernel, None, "vocab")
        if scale is not None:
            scale = target.backend.shard(scale, None, "vocab")
        blocks = useful_blocks(kernel) if target.packed and scale is None else None
        return CutHead(kernel, blocks, target.backend, scale)

    def to_target(self, tokens: Int[Array, "..."]) -> Int[Array, "..."]:
        """Target tokens of draft tokens."""
        return tokens if self.draft_to_target is None else jnp.take(self.draft_to_target, tokens)

    def extend(
        self, target: Target, cache: PagedCache, sync: Sync
    ) -> tuple[PagedCache, Float[Array, "B A D"]]:
        """Commits a chain of pairs: a prompt chunk, or the tokens accepted in the last round.

        Returns the cache and the draft's output at each row.
        """
        B, A = sync.tokens.shape
        row_BA = jnp.broadcast_to(jnp.arange(A, dtype=jnp.int32)[None], (B, A))
        position_BA = cache.length[:, None] + row_BA
        # Slot 0 holds no pair. `first` hides it in the prefix, the mask while it is a new row.
        mask_BAA = jnp.tril(jnp.ones((A, A), bool))[None] & (position_BA > 0)[:, None, :]
        mask_BAA = mask_BAA | jnp.eye(A, dtype=bool)[None]
        view = View(position_BA, mask_BAA, cache, jnp.ones_like(row_BA))
        x_BAD, new_kv = self(target, sync.tokens, sync.features, view)
        return commit(cache, new_kv, row_BA, order_after(x_BAD, sync.count)), x_BAD

    def expand(
        self,
        target: Target,
        head,
        shape: TreeShape,
        cache: PagedCache,
        sync: Sync,
        sampling: Sampling | None,
    ) -> tuple[PagedCache, Proposal]:
        """Grows the draft tree under the new root: the sync pass, then one pass a depth.

        Args:
          head: what `bind_head` returned.
          cache: the draft's cache; the sync rows are committed to it at once.
          sync: accepted tokens with true features; the last valid row is the root.
          sampling: None: each node proposes the draft's favourites. Otherwise children are drawn
            from the draft's own processed law, without replacement.
        """
        cache, x_BAD = self.extend(target, cache, sync)
        last_B1 = jnp.maximum(sync.count - 1, 0)[:, None]
        root_B1 = jnp.take_along_axis(sync.tokens, last_B1, axis=1)
        x_BWD = jnp.take_along_axis(x_BAD, last_B1[:, :, None], axis=1)
        frontier = _Frontier(  # the root: it has no scratch row, its KV is committed
            pool=jnp.zeros_like(root_B1),
            scores=jnp.zeros(root_B1.shape),
            mask=jnp.zeros((*root_B1.shape, 0), bool),
        )
        pool, expanded, laws = _Pool.of_root(root_B1), [frontier.pool], []
        scratch, first_node = None, 0
        for depth, level in enumerate(shape.levels):
            position_B = cache.length + depth  # of the children; the root is in the cache
            tokens_BWk, scores_BWk, law_BWU = _propose(
                head(x_BWD), level.width, position_B, sampling, first_node, target.backend
            )
            first_node += x_BWD.shape[1]
            laws.append(law_BWU)
            row, rank = np.array(level.frontier_row), np.array(level.rank)
            tokens_BX = self.to_target(tokens_BWk[:, row, rank])
            scores_BX = frontier.scores[:, row] + scores_BWk[:, row, rank]
            start = pool.size
            pool = pool.append(tokens_BX, scores_BX, frontier.pool[:, row], rank, depth + 1)
            if depth + 1 == shape.max_depth:
                break
            chosen_BW = shape.next_frontier(depth, scores_BX)
            row_BW = jnp.take(jnp.asarray(row), chosen_BW)
            frontier = frontier.descend(chosen_BW + start, _take(scores_BX, chosen_BW), row_BW)
            position_BW = jnp.broadcast_to(position_B[:, None], chosen_BW.shape)
            view = View(position_BW, frontier.mask, cache, jnp.ones_like(chosen_BW), scratch)
            x_BWD, new_kv = self(target, _take(tokens_BX, chosen_BW), _take(x_BWD, row_BW), view)
            scratch = new_kv if scratch is None else scratch.append(new_kv)
            expanded.append(frontier.pool)
        tree, tokens_BM, expanded_BM = pool.finish(shape, jnp.concatenate(expanded, axis=1))
        law = None
        if sampling is not None and laws:
            law = DraftLaw(
                jnp.concatenate(laws, axis=1), expanded_BM, self.draft_to_target, target.backend
            )
        return cache, Proposal(tree, tokens_BM, expanded_BM, law, scratch)


def _own_head(draft: Draft, target: Target, x: jax.Array) -> jax.Array:
    """`target` is only its backend."""
    return target.backend.by_vocab(draft._apply(target, x, method="head"))


def _head_behind_norm(draft: Draft, target: Target, head, x: jax.Array) -> jax.Array:
    """`target` is only its backend."""
    return head(draft._apply(target, x, method="before_head"))


def _take(x, index_BW):
    """Rows of x [B, X, ...] at index [B, W]."""
    return jnp.take_along_axis(x, jnp.expand_dims(index_BW, range(2, x.ndim)), axis=1)


def _propose(
    logits_BWU, width: int, position_B, sampling: Sampling | None, first_node: int, backend: Backend
):
    """Children of each frontier row: (draft tokens, log-probabilities, law), [B, W, width].

    Sampled children come in the order of the Gumbel-top-k trick, which is the order of sequential
    draws without replacement. `first_node` numbers the expanded nodes for their random keys.
    """
    if sampling is None:
        if width == 1:
            tokens_BWk, top_BWk = (x[..., None] for x in best(logits_BWU))
        else:
            top_BWk, tokens_BWk = backend.top_k(logits_BWU, width)
        largest_BW1 = top_BWk[:, :, :1]
        total_BW1 = jnp.sum(jnp.exp(logits_BWU - largest_BW1), axis=2, keepdims=True)
        return tokens_BWk.astype(jnp.int32), top_BWk - largest_BW1 - jnp.log(total_BW1), None
    B, W, U = logits_BWU.shape
    scores_BWU = processed_scores(logits_BWU, sampling, backend=backend)
    node_BW = jnp.broadcast_to(jnp.arange(W, dtype=jnp.int32)[None] + first_node, (B, W))
    position_BW = jnp.broadcast_to(position_B[:, None], (B, W))
    noise_BWU = gumbel(sampling.seed, position_BW, Purpose.DRAFT, U, node_BW)
    tokens_BWk = backend.top_k(scores_BWU + noise_BWU, width)[1].astype(jnp.int32)
    mass_BWU = jnp.exp(scores_BWU)  # the largest is 1
    total_BW1 = jnp.sum(mass_BWU, axis=2, keepdims=True)
    chosen_BWk = backend.columns(scores_BWU, tokens_BWk)
    return tokens_BWk, chosen_BWk - jnp.log(total_BW1), mass_BWU / total_BW1


class _Frontier(struct.PyTreeNode):
    """The nodes that propose next."""

    pool: Int[Array, "B W"]
    """Pool index."""
    scores: Float[Array, "B W"]
    """Cumulative log-probability."""
    mask: Bool[Array, "B W X"]
    """Ancestor-or-self among the scratch rows, the frontier's own included."""

    def descend(self, pool_BW, scores_BW, row_BW) -> "_Frontier":
        """The frontier of chosen children; `row_BW` is each one's parent row in this frontier."""
        B, W = pool_BW.shape
        own_BWW = jnp.broadcast_to(jnp.eye(W, dtype=bool)[None], (B, W, W))
        mask_BWX = jnp.concatenate([_take(self.mask, row_BW), own_BWW], axis=2)
        return _Frontier(pool=pool_BW, scores=scores_BW, mask=mask_BWX)


class _Pool(struct.PyTreeNode):
    """All nodes proposed so far, in order of creation; index 0 is the root."""

    tokens: Int[Array, "B X"]
    scores: Float[Array, "B X"]
    parent: Int[Array, "B X"]
    rank: Int[Array, "B X"]
    depth: Int[Array, "B X"]

    @classmethod
    def of_root(cls, root_B1) -> "_Pool":
        zeros = jnp.zeros_like(root_B1)
        # Scores of the root beat all others: a selection always keeps it.
        return cls(root_B1, jnp.full(root_B1.shape, jnp.inf), zeros, zeros, zeros)

    @property
    def size(self) -> int:
        return self.tokens.shape[1]

    def append(self, tokens_BX, scores_BX, parent_BX, rank, depth: int) -> "_Pool":
        new = _Pool(
            tokens_BX,
            scores_BX,
            parent_BX,
            jnp.broadcast_to(jnp.asarray(rank, jnp.int32)[None], tokens_BX.shape),
            jnp.full_like(tokens_BX, depth),
        )
        return jax.tree.map(lambda old, x: jnp.concatenate([old, x], axis=1), self, new)

    def finish(self, shape: TreeShape, expanded_BE):
        """The tree that `shape` selects: (tree, tokens, expanded), with node for pool indices."""
        chosen_BM = shape.select(self.scores)
        parent_BM = _take(self._inverse(chosen_BM), _take(self.parent, chosen_BM))
        tree = Tree(
            parent=parent_BM,
            depth=_take(self.depth, chosen_BM),
            rank=_take(self.rank, chosen_BM),
            mask=ancestor_mask(parent_BM, shape.max_depth),
        )
        expanded_BM = _take(self._inverse(expanded_BE), chosen_BM)
        return tree, _take(self.tokens, chosen_BM), expanded_BM

    def _inverse(self, index_BM) -> Int[Array, "B X"]:
        """Where each pool node stands in `index_BM`; 0 if nowhere."""
        B, M = index_BM.shape
        place_BM = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32)[None], (B, M))
        return jnp.zeros_like(self.tokens).at[jnp.arange(B)[:, None], index_BM].set(place_BM)
