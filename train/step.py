"""The training step: frozen target and draft in one program.

Row i of the draft takes (token i, feature i-1) at position i and estimates feature i, whose logits
are the law of token i+1: the layout of `jax_eagle.draft`. The first token of a segment has no
feature before it, so it is neither a key nor scored.

`fc` is trained for scaled inputs (embeddings of unit size, features without the final norm's
weight): raw features are large and uneven, and Adam's equal steps would wreck a good start. The
scales are constants, folded into the kernel whenever a draft is made.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from jax_eagle import Draft, Target
from jax_eagle.attention import View
from jax_eagle.config import DraftConfig
from jax_eagle.tree import Tree

from .config import TrainConfig
from .loss import Metrics, distillation_loss


@struct.dataclass
class Batch:
    """Packed rows; see `data.Rows`."""

    tokens: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    position: Int[Array, "B T"]
    weight: Float[Array, "B T"]
    features: Float[Array, "B T F"] | None = None
    """Kept features of the target in float16; None: the step runs the target."""


@struct.dataclass
class TrainState:
    """All that changes in a run, and the constants of its draft."""

    step: Int[Array, ""]
    params: Any
    """Float32, `fc` for scaled inputs."""
    average: Any
    """Moving average of `params`; None without one."""
    opt_state: Any
    input_scale: Float[Array, "D+F"]
    draft_to_target: Int[Array, "U"] | None
    config: DraftConfig = struct.field(pytree_node=False)

    def draft(self) -> Draft:
        """The draft that would be exported now."""
        params = self.params if self.average is None else self.average
        return make_draft(params, self)


def make_draft(params: Any, state: TrainState) -> Draft:
    """A draft of the config's dtype with the input scale folded into `fc`."""
    kernel = params["fc"]["kernel"] * state.input_scale[:, None]
    folded = params | {"fc": params["fc"] | {"kernel": kernel}}
    params = jax.tree.map(lambda x: x.astype(state.config.layer.dtype), folded)
    return Draft(params, state.draft_to_target, state.config)


def target_features(target: Target, batch: Batch) -> Float[Array, "B T F"]:
    """The target's features of packed rows; no segment sees another."""
    zeros = jnp.zeros_like(batch.position)
    tree = Tree(parent=zeros, depth=batch.position, rank=zeros, mask=_segment_mask(batch))
    return jax.lax.stop_gradient(target(batch.tokens, tree, cache=None).features)


def draft_outputs(draft: Draft, target: Target, batch: Batch, features_BTF) -> jax.Array:
    """The draft's estimates [B, T, D] of `features_BTF`, each from the features before it."""
    before_BTF = jnp.pad(features_BTF[:, :-1], ((0, 0), (1, 0), (0, 0)))
    has_feature_BT = batch.position > 0
    before_BTF = jnp.where(has_feature_BT[:, :, None], before_BTF, jnp.zeros_like(before_BTF))
    mask_BTT = _segment_mask(batch) & has_feature_BT[:, None, :]
    mask_BTT = mask_BTT | jnp.eye(mask_BTT.shape[1], dtype=bool)[None]
    return draft(target, batch.tokens, before_BTF, View(batch.position, mask_BTT))[0]


def _segment_mask(batch: Batch):
    T = batch.tokens.shape[1]
    same_BTT = batch.segment[:, :, None] == batch.segment[:, None, :]
    return same_BTT & jnp.tril(jnp.ones((T, T), bool))[None]


def make_optimizer(config: TrainConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine; `fc` moves by `fc_lr_scale` of the others' rate."""
    warmup = max(1, round(config.warmup * num_steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        warmup,
        max(num_steps, warmup + 1),
        config.learning_rate * config.final_learning_rate,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
        ),
        optax.masked(optax.scale(config.fc_lr_scale), _is_fc),
        optax.scale_by_learning_rate(schedule),
    )


def _is_fc(params: Any) -> Any:
    return {
        name: jax.tree.map(lambda _, name=name: name == "fc", value)
        for name, value in params.items()
    }


def make_train_step(
    config: TrainConfig, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Target, Batch], tuple[TrainState, Metrics, Array]]:
    """The jitted step: (state, target, batch) -> (state, metrics, features). Donates the state.

    Features are those of the batch if it has any, otherwise the target's; with `keep_features`
    they are rounded to float16 first, so both ways train on the same numbers.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, target: Target, batch: Batch):
        dtype = jnp.dtype(target.config.dtype)
        features_BTF = batch.features
        if features_BTF is None:
            features_BTF = target_features(target, batch)
            if config.keep_features:
                features_BTF = features_BTF.astype(jnp.float16)

        def loss_of(params):
            draft = make_draft(params, state)
            truth_BTF = features_BTF.astype(dtype)
            x_BTD = draft_outputs(draft, target, batch, truth_BTF)
            head = draft.bind_head(target)
            return distillation_loss(
                x_BTD, truth_BTF, batch.weight, head, ce_weight=config.ce_weight
            )

        gradients, metrics = jax.grad(loss_of, has_aux=True)(state.params)
        state = _updated(state, gradients, optimizer, config.ema)
        return state, metrics, features_BTF

    return train_step


def _updated(state: TrainState, gradients: Any, optimizer, ema: float | None) -> TrainState:
    with jax.numpy_dtype_promotion("standard"):  # optax mixes Python and array scalars freely
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    average = state.average
    if ema is not None:
        # Early on the average is over the few steps there are, not over the start.
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, average, params)
    return dataclasses.replace(
        state, step=state.step + 1, params=params, average=average, opt_state=opt_state
    )
