"""The training step: frozen target, draft, losses and optimiser in one program.

Row i of the draft takes (token i, feature i-1) at position i and its state is turned into the law
of token i+1: the layout of `jax_eagle.draft`. The first token of a segment has no feature before
it, so it is neither a key nor scored.

`fc` is trained for scaled inputs (of about unit size): raw features are large and uneven, and
Adam's equal steps would wreck a good start. The scales are constants, folded into the kernel
whenever a draft is made.

A step whose loss or gradient is not finite changes nothing but `failed`, and neither do the steps
behind it: when the host reads of it, the state is still the last good one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, UInt32

from jax_eagle import Draft, Target
from jax_eagle.config import DraftConfig
from jax_eagle.sharding import named_sharding
from jax_eagle.unroll import Text, unroll

from .config import TrainConfig
from .loss import Heads, Mean, Positions, distillation_loss
from .teacher import Teacher, Teaching

RUNNING = -1
"""`TrainState.failed` while all is well."""


class Batch(struct.PyTreeNode):
    """Packed rows; see `feed`."""

    tokens: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    position: Int[Array, "B T"]
    weight: Float[Array, "B T"]
    features: Float[Array, "B T E"] | None = None
    """Features that were kept (`teach`); None: the step runs the target."""

    @property
    def text(self) -> Text:
        """The rows without what the loss needs."""
        return Text(self.tokens, self.segment, self.position)


class TrainState(struct.PyTreeNode):
    """All that changes in a run, and the constants of its draft."""

    step: Int[Array, ""]
    """Updates so far."""
    failed: Int[Array, ""]
    """The step that was not finite; RUNNING: none."""
    rng: UInt32[Array, "2"]
    """Key data; each step folds its number in."""
    params: Any
    """Float32, `fc` for scaled inputs."""
    average: Any
    """Moving average of `params`; None without one."""
    opt_state: Any
    input_scale: Float[Array, "X"]
    """What the inputs of `fc` are multiplied with."""
    draft_to_target: Int[Array, "U"] | None
    config: DraftConfig = struct.field(pytree_node=False)

    def draft(self) -> Draft:
        """The draft that would be exported now."""
        return make_draft(self.params if self.average is None else self.average, self)


class StepOutput(NamedTuple):
    """What a step tells the host, all still on the device."""

    metrics: dict[str, Mean]
    """Figures of the loss [J], and `gradient_norm`."""
    failed: Int[Array, ""]


def make_draft(params: Any, state: TrainState) -> Draft:
    """A draft of the config's dtype with the input scale folded into `fc`."""
    kernel = params["fc"]["kernel"] * state.input_scale[:, None]
    folded = params | {"fc": params["fc"] | {"kernel": kernel}}
    params = jax.tree.map(lambda x: x.astype(state.config.layer.dtype), folded)
    return Draft(params, state.draft_to_target, state.config)


@functools.partial(jax.jit, static_argnums=1)
def teach(teacher: Teacher, config: DraftConfig, batch: Batch) -> Float[Array, "B T E"]:
    """The target's features in the form in which they are kept: float16, in one array.

    A run that keeps features gets them here in its first epoch too, so that its steps are the same
    program on the same numbers whether they come from disk or not.
    """
    return pack_teaching(config, teacher(batch.text, config.taps)).astype(jnp.float16)


def put_batch(rows: dict[str, np.ndarray], mesh: Mesh | None, features: Any = None) -> Batch:
    """This process's rows of a batch on the devices."""

    def put(x):
        if mesh is None:
            return jnp.asarray(x)
        return jax.make_array_from_process_local_data(named_sharding(mesh, "batch"), x)

    names = "tokens", "segment", "position", "weight"
    kept = None if features is None else put(features)
    return Batch(**{name: put(rows[name]) for name in names}, features=kept)


def pack_teaching(config: DraftConfig, teaching: Teaching) -> jax.Array:
    """One array of what has to be kept: features, and behind tapped ones the head's input."""
    return jnp.concatenate(teaching, axis=-1) if config.is_eagle3 else teaching.features


def unpack_teaching(config: DraftConfig, packed: jax.Array) -> Teaching:
    """The inverse of `pack_teaching`."""
    width = config.feature_width
    return Teaching(packed[..., :width], packed[..., width:] if config.is_eagle3 else packed)


def make_optimizer(config: TrainConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine; `fc` moves by `fc_scale` of the others' rate."""
    c = config.optimizer
    warmup = max(1, round(c.warmup * num_steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        c.learning_rate,
        warmup,
        max(num_steps, warmup + 1),
        c.learning_rate * c.final_learning_rate,
    )
    return optax.chain(
        optax.clip_by_global_norm(c.clip),
        optax.scale_by_adam(b1=c.b1, b2=c.b2),
        optax.add_decayed_weights(
            c.weight_decay, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
        ),
        optax.masked(optax.scale(c.fc_scale), _is_fc),
        optax.scale_by_learning_rate(schedule),
    )


def _is_fc(params: Any) -> Any:
    return {
        name: jax.tree.map(lambda _, name=name: name == "fc", value)
        for name, value in params.items()
    }


def make_train_step(
    config: TrainConfig, optimizer: optax.GradientTransformation, **jit_options: Any
) -> Callable[[TrainState, Teacher, Batch], tuple[TrainState, StepOutput]]:
    """The jitted step: (state, teacher, batch) -> (state, output). Donates the state.

    Features are those of the batch if it has any, otherwise the target's, which runs in the step.

    Args:
      jit_options: further arguments of `jax.jit`, such as `out_shardings`.
    """

    @functools.partial(jax.jit, donate_argnums=0, **jit_options)
    def train_step(state: TrainState, teacher: Teacher, batch: Batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        gradients, metrics = accumulated_gradients(config, state, teacher, batch, key)
        norm = optax.tree.norm(gradients)
        metrics["gradient_norm"] = Mean(norm, jnp.ones_like(norm))
        finite = jnp.isfinite(norm) & jnp.all(jnp.isfinite(metrics["loss"].sum))
        good = finite & (state.failed == RUNNING)
        updated = _updated(state, gradients, optimizer, config.optimizer.ema)
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), updated, state)
        failed = jnp.where(finite | (state.failed != RUNNING), state.failed, state.step)
        return kept.replace(failed=failed), StepOutput(metrics, failed)

    return train_step


def step_shardings(state: TrainState, mesh: Mesh) -> tuple[TrainState, Any]:
    """Where a step leaves its results: the state as it lies, what the host reads everywhere."""
    return jax.tree.map(lambda x: x.sharding, state), named_sharding(mesh)


def accumulated_gradients(
    config: TrainConfig, state: TrainState, teacher: Teacher, batch: Batch, key: jax.Array
) -> tuple[Any, dict[str, Mean]]:
    """Gradients of the whole batch's mean loss, part by part; metrics."""
    num_parts = config.optimizer.accumulate
    weight_BTJ = pass_weights(config, batch)
    count_J = jnp.sum(weight_BTJ, axis=(0, 1))
    scale_J = 1.0 / jnp.maximum(count_J, 1e-6)

    def of_part(batch, key):
        teaching = _teaching(state, teacher, batch)

        def loss_of(params):
            return _loss(config, params, state, teacher.base, batch, teaching, scale_J, key)

        return jax.grad(loss_of, has_aux=True)(state.params)

    if num_parts == 1:
        return of_part(batch, key)

    def split(x):  # row b is in part b % parts: a batch that is cut over devices stays so
        return jnp.moveaxis(jnp.reshape(x, (-1, num_parts, *x.shape[1:])), 1, 0)

    def step(sums, part):
        return jax.tree.map(jnp.add, sums, of_part(*part)), None

    parts = jax.tree.map(split, batch), jax.random.split(key, num_parts)
    shapes = jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(step, zeros, parts)[0]


def pass_weights(config: TrainConfig, batch: Batch) -> Float[Array, "B T J"]:
    """Loss weights of each unrolled pass.

    When decoding, a chain begins at a token that is to be learnt and goes on from there: row i of
    pass j counts if the j rows before it do. A segment's first row never does.
    """
    weights, counts_BT = [], batch.weight > 0
    for j in range(config.loss.unroll):
        if j:
            counts_BT = (batch.weight > 0) & jnp.pad(counts_BT[:, :-1], ((0, 0), (1, 0)))
        weights.append(jnp.where(counts_BT, batch.weight, 0.0))
    return jnp.stack(weights, axis=2)


def _teaching(state: TrainState, teacher: Teacher, batch: Batch) -> Teaching:
    """The target's features, given or computed."""
    if batch.features is None:
        return teacher(batch.text, state.config.taps)
    dtype = jnp.dtype(teacher.base.config.dtype)
    return unpack_teaching(state.config, batch.features.astype(dtype))


def _loss(
    config: TrainConfig, params, state: TrainState, base: Target, batch: Batch, teaching: Teaching,
    scale_J, key,
) -> tuple[jax.Array, dict[str, Mean]]:  # fmt: skip
    """The loss of one part of a batch; a sum that `scale_J` makes a mean over the whole batch."""
    draft = make_draft(params, state)
    features_BTF = teaching.features
    if width := config.loss.feature_noise:
        noise = jax.random.uniform(key, features_BTF.shape, features_BTF.dtype, -width, width)
        features_BTF = features_BTF + noise
    passes = unroll(draft, base, batch.text, features_BTF, config.loss.unroll, remat=config.remat)
    positions = Positions(
        state=jnp.stack([p.state for p in passes], axis=2),
        feature=None if config.loss.feature == "none" else teaching.features,
        teacher=teaching.x,
        weight=pass_weights(config, batch),
    )
    cut = draft.cut_head(base)
    head_params, heads = {}, Heads(Partial(_fixed_head, cut), cut)
    if draft.config.own_head:
        head_params = {name: draft.params[name] for name in ("norm", "lm_head")}
        heads = Heads(Partial(_own_head, draft.replace(params=None), base), cut)
    return distillation_loss(config.loss, head_params, positions, heads, scale_J)


def _fixed_head(head, params, x):
    return head(x)


def _own_head(draft: Draft, target: Target, params, x):
    return draft.replace(params=params).bind_head(target)(x)


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
