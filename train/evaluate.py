"""Teacher-forced validation: how often the draft's favourite is the target's, by source.

Unlike the training metrics, `top1` compares with the favourite of the target's whole vocabulary, so
it is the acceptance of the first drafted token at temperature 0 under true features.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_eagle import Draft, Target

from .feed import Feed
from .step import Batch, draft_outputs, target_features

_CHUNK = 128
"""Positions that go through the full head at once."""
FIGURES = ("top1", "kl", "covered")


def evaluate(
    draft: Draft, target: Target, feed: Feed, rows: np.ndarray, names: list[str]
) -> dict[str, dict[str, float]]:
    """Validation figures of each source and of all together.

    Args:
      rows: rows of `feed` to score; whole batches of them are.
      names: of the sources, in order.

    Returns:
      name -> tokens (scored), top1, kl (over the draft vocabulary) and covered (share of the
      target's favourites that are in the draft vocabulary). Sources without tokens are left out.
    """
    sums = np.zeros((len(names), 1 + len(FIGURES)))
    whole = len(rows) // feed.batch_size * feed.batch_size
    for begin in range(0, whole, feed.batch_size):
        numbers = rows[begin : begin + feed.batch_size]
        batch = feed.batch(numbers)
        if batch.features is None:
            features = _features(target, batch).astype(jnp.float16)
            feed.keep(numbers, features)
            batch = dataclasses.replace(batch, features=features)
        source_BT = jnp.asarray(feed.rows.take(numbers).source)
        sums += np.asarray(_sums(draft, target, batch, source_BT, num_sources=len(names)))
    totals = {"all": sums.sum(axis=0)} | dict(zip(names, sums, strict=True))
    return {
        name: {"tokens": int(total[0])}
        | {figure: float(total[i] / total[0]) for i, figure in enumerate(FIGURES, start=1)}
        for name, total in totals.items()
        if total[0] > 0
    }


_features = jax.jit(target_features)


@partial(jax.jit, static_argnames="num_sources")
def _sums(draft: Draft, target: Target, batch: Batch, source_BT, *, num_sources: int):
    """Sums over the scored positions of each source: [sources, 1 + figures]."""
    assert batch.features is not None
    features_BTF = batch.features.astype(target.config.dtype)
    x_BTD = draft_outputs(draft, target, batch, features_BTF)
    head = draft.bind_head(target)

    def of_chunk(part):
        x, features, weight, source = part
        teacher, estimate = jax.nn.log_softmax(head(features)), jax.nn.log_softmax(head(x))
        favourite = jnp.argmax(target.head(features), axis=-1)
        best = draft.to_target(jnp.argmax(teacher, axis=-1))
        kl = jnp.sum(jnp.exp(teacher) * (teacher - estimate), axis=-1)
        agrees = draft.to_target(jnp.argmax(estimate, axis=-1)) == favourite
        figures = jnp.stack(
            [jnp.ones_like(kl), agrees.astype(kl.dtype), kl, (best == favourite).astype(kl.dtype)],
            axis=-1,
        )
        return jax.ops.segment_sum(figures * weight[:, None], source, num_sources)

    arrays = (x_BTD, features_BTF, batch.weight, source_BT)
    size = min(_CHUNK, batch.tokens.size)
    padding = -batch.tokens.size % size

    def chunks(array):
        flat = jnp.reshape(array, (batch.tokens.size, *array.shape[2:]))
        flat = jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1))
        return jnp.reshape(flat, (-1, size, *flat.shape[1:]))

    return jnp.sum(jax.lax.map(of_chunk, jax.tree.map(chunks, arrays)), axis=0)
