"""How a draft starts: closed-form FC, or the parameters of another draft.

The closed form (seconds) is worth as much as the first minutes of training. With `g` the final
norm's weight, `fc` is the ridge regression of x_i / g on its inputs at row i, where x_i is what the
target's head takes at token i: a first guess of it. The norm behind it starts at g, a head of the
draft's own at the target's rows, and the layers start almost silent.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_eagle import Draft, Target, load_draft
from jax_eagle.config import ConfigError, DraftConfig, Llama4Attention, LlamaConfig
from jax_eagle.eagle import abstract_draft_params, init_draft_params
from jax_eagle.load import taps_fit
from jax_eagle.sharding import param_shardings
from pallas_kernels.grouped_matmul import dequantize

from .config import DraftSettings, TrainConfig
from .step import RUNNING, Batch, TrainState, unpack_teaching

FROM_SCRATCH = ("ridge", "random")
"""Values of `draft.start` that name no folder."""
RIDGE = 1e-3
"""Relative to the mean of the regression's diagonal."""
LAYER_OUTPUT = 0.1
"""Size of the layers' output kernels relative to the normal start."""


def check_target(config: TrainConfig, target: LlamaConfig) -> None:
    """Raises ConfigError if a run asks for more positions or tokens than the target has."""
    if config.data.length > target.max_position:
        raise ConfigError(
            f"data.length {config.data.length}: the target reads {target.max_position} positions, "
            "expected at most so many"
        )
    num_tokens = config.draft.vocab_size or target.vocab_size
    if config.loss.logits == "top_k_kl" and config.loss.top_k > num_tokens:
        raise ConfigError(
            f"loss.top_k {config.loss.top_k}: the draft knows {num_tokens} tokens, "
            "expected at most so many"
        )


def draft_to_train(settings: DraftSettings, target: Target) -> tuple[DraftConfig, Draft | None]:
    """The config of a run's draft in the target's dtype, and what it goes on from.

    Args:
      target: shapes may stand for its parameters; an embedding in the folder of an EAGLE-3 draft
        then counts as the draft's own, though it may be the target's.

    Returns:
      The config, and the draft of the folder in float32; None: from scratch. A draft with the
      target's head takes any vocabulary: its `draft_to_target` is None if the settings cut it anew.

    Raises:
      ConfigError, CheckpointError: settings or a folder that do not fit the target.
    """
    if settings.start in FROM_SCRATCH:
        return draft_config(settings, target.config), None
    given = load_draft(settings.start, target, dtype="float32")
    config = given.config
    if not config.own_head and settings.vocab_size not in (None, config.draft_vocab_size):
        config = dataclasses.replace(config, draft_vocab_size=settings.vocab_size)
        given = given.replace(draft_to_target=None)
    layer = dataclasses.replace(config.layer, dtype=target.config.dtype)
    config = dataclasses.replace(config, layer=layer)
    return config, given.replace(config=config)


def draft_config(settings: DraftSettings, target: LlamaConfig) -> DraftConfig:
    """The config of a draft from scratch.

    Raises:
      ConfigError: more draft tokens than the target has, taps that are not distinct layers of it
        from low to high, or a target too shallow for the usual ones.
    """
    U, num_layers = settings.vocab_size, settings.num_layers
    if U is not None and U > target.vocab_size:
        raise ConfigError(f"vocab_size {U}: the target has {target.vocab_size} tokens")
    if settings.kind == "eagle3":
        if not taps_fit(settings.taps or (), target.num_layers):
            raise ConfigError(
                f"draft.taps {list(settings.taps or ())}: expected distinct layers of the target, "
                f"low to high, in 0..{target.num_layers - 1}"
            )
        return DraftConfig.eagle3_for_target(
            target, num_layers=num_layers, taps=settings.taps, draft_vocab_size=U
        )
    config = DraftConfig.for_target(
        target,
        num_layers=num_layers,
        input_norm=settings.input_norm,
        output_norm=settings.output_norm,
        draft_vocab_size=U,
    )
    if settings.kind == "eagle-llama4":
        own = target.llama4 or Llama4Attention(nope_layers=())
        layer = dataclasses.replace(config.layer, llama4=own)
        return dataclasses.replace(config, layer=layer, input_norm=True, output_norm=True)
    return config


def input_scale(config: DraftConfig, target: Target, batches: Iterable[Batch]) -> jax.Array:
    """What the inputs of `fc` are multiplied with, [X].

    EAGLE: 1 / std(embedding), and 1 / g for the features. EAGLE-3: 1 / std of each tap over
    `batches`, whose features must be kept.
    """
    if not config.is_eagle3:
        table = np.asarray(target.params["embed"]["embedding"], np.float32)
        embed_D = np.full(table.shape[1], 1.0 / table.std(), np.float32)
        return jnp.asarray(np.concatenate([embed_D, 1.0 / _norm_weight(target)]))
    squares = jnp.zeros(len(config.taps))
    count = 0.0
    for batch in batches:
        assert batch.features is not None
        features_BTF = unpack_teaching(config, batch.features).features.astype(jnp.float32)
        by_tap = jnp.reshape(features_BTF, (*features_BTF.shape[:2], len(config.taps), -1))
        present_BT11 = (batch.segment > 0)[:, :, None, None]
        squares += jnp.sum(jnp.where(present_BT11, by_tap**2, 0.0), axis=(0, 1, 3))
        count += float(jnp.sum(batch.segment > 0)) * by_tap.shape[3]
    size = jnp.sqrt(squares / count)
    return jnp.repeat(1.0 / size, config.feature_width // len(config.taps))


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
    config: DraftConfig,
    target: Target,
    draft_to_target: jax.Array | None,
    scale_X: jax.Array,
    batches: Iterable[Batch],
    key: jax.Array,
) -> Any:
    """Parameters with the closed-form FC, fitted on batches that carry their features.

    Layers keep their random start; `fc` is for inputs times `scale_X`.
    """
    g = jnp.asarray(_norm_weight(target))
    gram = moment = 0.0
    for batch in batches:
        one_gram, one_moment = _moments(config, target, batch, scale_X, g)
        gram, moment = gram + one_gram, moment + one_moment
    gram = np.asarray(gram, np.float64)
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    kernel = np.linalg.solve(gram, np.asarray(moment, np.float64))
    params = random_params(config, key)
    if "norm" in params:
        params["norm"]["scale"] = g
    else:  # the output is not normed: g belongs into the estimate
        kernel = kernel * np.asarray(g, np.float64)[None, :]
    params["fc"]["kernel"] = jnp.asarray(kernel, jnp.float32)
    if config.own_head:
        ids = draft_to_target
        ids = jnp.arange(config.layer.vocab_size, dtype=jnp.int32) if ids is None else ids
        kernel, scale = target.head_columns(ids)
        own_head = kernel.astype(jnp.float32) if scale is None else dequantize(kernel, scale)
        params["lm_head"]["kernel"] = own_head
    return params


@jax.jit(static_argnums=0)
def _moments(config: DraftConfig, target: Target, batch: Batch, scale_X, g):
    """Sums over scored rows of inputs x inputs and of inputs x wanted outputs."""
    assert batch.features is not None
    teaching = unpack_teaching(config, batch.features)
    x_BTX = jnp.pad(teaching.features[:, :-1].astype(jnp.float32), ((0, 0), (1, 0), (0, 0)))
    if not config.is_eagle3:
        embeds_BTD = target.embed(batch.tokens).astype(jnp.float32)
        x_BTX = jnp.concatenate([embeds_BTD, x_BTX], axis=-1)
    x_BTX = x_BTX * scale_X[None, None]
    y_BTD = teaching.x.astype(jnp.float32) / g[None, None]
    weighted_BTX = x_BTX * batch.weight[:, :, None]
    return (
        jnp.einsum("btx,bty->xy", weighted_BTX, x_BTX),
        jnp.einsum("btx,btd->xd", weighted_BTX, y_BTD),
    )


def params_of(draft: Draft, scale_X: jax.Array) -> Any:
    """Copied float32 parameters of a draft, with `fc` for scaled inputs.

    Raises:
      ConfigError: an EAGLE-3 draft that borrows the target's head: its norm could not be trained.
    """
    if draft.config.is_eagle3 and not draft.config.own_head:
        raise ConfigError("draft.start: an EAGLE-3 draft without a head of its own, not trainable")
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), draft.params)
    params["fc"]["kernel"] = params["fc"]["kernel"] / scale_X[:, None]
    return params


def make_state(
    config: DraftConfig,
    params: Any,
    scale_X: jax.Array,
    draft_to_target: jax.Array | None,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    with_average: bool,
) -> TrainState:
    """The state of step 0."""
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer.init(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        failed=jnp.full((), RUNNING, jnp.int32),
        rng=jax.random.key_data(jax.random.key(seed)),
        params=params,
        average=jax.tree.map(jnp.copy, params) if with_average else None,
        opt_state=opt_state,
        input_scale=scale_X,
        draft_to_target=draft_to_target,
        config=config,
    )


def state_shardings(
    state: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Where each array of a state lies: moments and averages beside their parameters."""
    everywhere = NamedSharding(mesh, P())
    of_params = param_shardings(abstract_draft_params(state.config), mesh)
    placed = jax.tree.map(lambda _: everywhere, state)
    moments = optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, state.opt_state, of_params,
        transform_non_params=lambda _: everywhere,
    )  # fmt: skip
    average = None if state.average is None else of_params
    return placed.replace(params=of_params, average=average, opt_state=moments)
