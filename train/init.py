"""How a draft starts: closed-form FC, or the parameters of another draft.

The closed form (seconds) is worth as much as the first minutes of training. With `g` the final
norm's weight, `fc` is the ridge regression of feature_i / g on (embedding of token i, feature
i-1); the output norm starts at g, and the layers start almost silent.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_eagle import Target
from jax_eagle.config import DraftConfig
from jax_eagle.draft import init_draft_params

from .step import Batch, TrainState

RIDGE = 1e-3
"""Relative to the mean of the regression's diagonal."""
LAYER_OUTPUT = 0.1
"""Size of the layers' output kernels relative to the normal start."""


def input_scale(target: Target) -> jax.Array:
    """What the inputs of `fc` are multiplied with, [D + F]: 1 / std(embedding), 1 / g."""
    table = np.asarray(target.params["embed"]["embedding"], np.float32)
    embed_D = np.full(table.shape[1], 1.0 / table.std(), np.float32)
    return jnp.asarray(np.concatenate([embed_D, 1.0 / _norm_weight(target)]))


def _norm_weight(target: Target) -> np.ndarray:
    """The final norm's weight in float32, kept away from zero."""
    g = np.asarray(target.params["norm"]["scale"], np.float32)
    return np.where(np.abs(g) < 1e-2 * np.abs(g).mean(), np.abs(g).mean(), g)


def random_params(config: DraftConfig, key: jax.Array) -> Any:
    """Random float32 parameters whose layers start almost silent."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), init_draft_params(config, key))
    for i in range(config.layer.num_layers):
        layer = params[f"layers_{i}"]
        for module in (layer["attention"]["o"], layer["mlp"]["down"]):
            module["kernel"] = module["kernel"] * LAYER_OUTPUT
    return params


def ridge_params(
    config: DraftConfig, target: Target, batches: Iterable[Batch], key: jax.Array
) -> Any:
    """Parameters with the closed-form FC, fitted on batches that carry their features.

    Layers keep their random start; `fc` is for inputs times `input_scale`.
    """
    scale, g = input_scale(target), jnp.asarray(_norm_weight(target))
    gram = moment = 0.0
    for batch in batches:
        one_gram, one_moment = _moments(target, batch, scale, g)
        gram = gram + np.asarray(one_gram, np.float64)
        moment = moment + np.asarray(one_moment, np.float64)
    gram = np.asarray(gram)
    diagonal = RIDGE * np.trace(gram) / len(gram)
    kernel = np.linalg.solve(gram + diagonal * np.eye(len(gram)), moment)
    params = random_params(config, key)
    params["fc"]["kernel"] = jnp.asarray(kernel, jnp.float32)
    if config.output_norm:
        params["norm"]["scale"] = jnp.array(target.params["norm"]["scale"], jnp.float32, copy=True)
    return params


@jax.jit
def _moments(target: Target, batch: Batch, scale, g):
    """Weighted X^T X and X^T Y of one batch."""
    assert batch.features is not None
    features_BTF = batch.features.astype(jnp.float32)
    before_BTF = jnp.pad(features_BTF[:, :-1], ((0, 0), (1, 0), (0, 0)))
    embeds_BTD = target.embed(batch.tokens).astype(jnp.float32)
    x_BTX = jnp.concatenate([embeds_BTD, before_BTF], axis=-1) * scale[None, None]
    y_BTD = features_BTF / g[None, None]
    weighted_BTX = x_BTX * batch.weight[:, :, None]
    return (
        jnp.einsum("btx,bty->xy", weighted_BTX, x_BTX),
        jnp.einsum("btx,btd->xd", weighted_BTX, y_BTD),
    )


def scaled_params(params: Any, scale: jax.Array) -> Any:
    """Copied float32 parameters of a draft, with `fc` for scaled inputs."""
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
    params["fc"]["kernel"] = params["fc"]["kernel"] / scale[:, None]
    return params


def make_state(
    config: DraftConfig,
    params: Any,
    scale: jax.Array,
    draft_to_target: jax.Array | None,
    optimizer: optax.GradientTransformation,
    *,
    with_average: bool,
) -> TrainState:
    """The state of step 0."""
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer.init(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        average=jax.tree.map(jnp.copy, params) if with_average else None,
        opt_state=opt_state,
        input_scale=scale,
        draft_to_target=draft_to_target,
        config=config,
    )
