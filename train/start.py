"""The state that a run begins with: a draft from scratch, or one to go on from."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_eagle.config import ConfigError, DraftConfig

from . import init
from .config import DraftSettings, TrainConfig
from .corpus import Corpus
from .feed import Feed
from .step import Batch, TrainState, put_batch, teach
from .teacher import Teacher


def first_state(
    config: TrainConfig,
    teacher: Teacher,
    corpus: Corpus,
    feed: Feed,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state of step 0, on the target's devices.

    Raises:
      ConfigError: settings that contradict each other, the target, or the draft to go on from.
    """
    settings, base = config.draft, teacher.base
    draft, given = init.draft_to_train(settings, base)
    ids = None
    if given is not None:
        check_start(settings, given.config)
        ids = given.draft_to_target
    if ids is None and draft.draft_vocab_size is not None:
        ids = jnp.asarray(corpus.draft_vocabulary(draft.draft_vocab_size))
    key = jax.random.key(config.seed)
    looks_at_data = settings.start == "ridge" or draft.is_eagle3
    batches = list(_first_batches(config, teacher, feed, draft)) if looks_at_data else []
    scale = init.input_scale(draft, base, batches)
    if given is not None:
        params = init.params_of(given, scale)
    elif settings.start == "random":
        params = init.random_params(draft, key)
    else:
        params = init.ridge_params(draft, base, ids, scale, batches, key)
    state = _state(config, draft, params, scale, ids, optimizer)
    places = jax.tree.map(lambda x: x.sharding, placed(state, optimizer, base.backend.mesh))
    return jax.device_put(state, places)


def check_start(settings: DraftSettings, draft: DraftConfig) -> None:
    """Raises ConfigError unless the settings describe the draft that a run goes on from."""
    kind = "eagle3" if draft.is_eagle3 else "eagle"
    kind = "eagle-llama4" if draft.layer.llama4 is not None and kind == "eagle" else kind
    found: dict[str, Any] = {"kind": kind, "num_layers": draft.layer.num_layers}
    if kind == "eagle3":
        found |= {} if settings.taps is None else {"taps": draft.taps}
    else:
        found |= {"input_norm": draft.input_norm, "output_norm": draft.output_norm}
    if draft.own_head and settings.vocab_size is not None:
        found["vocab_size"] = draft.draft_vocab_size
    for name, value in found.items():
        if getattr(settings, name) != value:
            raise ConfigError(
                f"draft.{name} is {getattr(settings, name)}, but {settings.start} has {value}: "
                f"say {name}: {value}, or start from another draft"
            )


def empty_state(
    config: TrainConfig, draft: DraftConfig, optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes of the state of a run that trains `draft`."""

    def build():
        U = draft.draft_vocab_size
        ids = None if U is None else jnp.zeros(U, jnp.int32)
        num_inputs = draft.feature_width + (0 if draft.is_eagle3 else draft.layer.hidden_size)
        params = init.random_params(draft, jax.random.key(0))
        return _state(config, draft, params, jnp.zeros(num_inputs), ids, optimizer)

    return jax.eval_shape(build)


def placed(state: TrainState, optimizer: optax.GradientTransformation, mesh: Any) -> Any:
    """Shapes of a state with the devices where its arrays belong."""
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: device, state)
    else:
        places = init.state_shardings(state, optimizer, mesh)
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, places
    )


def for_dtype(draft: DraftConfig, dtype: str) -> DraftConfig:
    """The same draft for passes in another dtype."""
    return dataclasses.replace(draft, layer=dataclasses.replace(draft.layer, dtype=dtype))


def _state(config: TrainConfig, draft, params, scale, ids, optimizer) -> TrainState:
    return init.make_state(
        draft, params, scale, ids, optimizer,
        seed=config.seed, with_average=config.optimizer.ema is not None,
    )  # fmt: skip


def _first_batches(
    config: TrainConfig, teacher: Teacher, feed: Feed, draft: DraftConfig
) -> Iterator[Batch]:
    """The first batches of the run with the target's features."""
    count = max(1, config.draft.start_rows // config.data.batch)
    for number in range(min(count, feed.num_batches)):
        batch = put_batch(feed.batch(number), teacher.base.backend.mesh)
        yield batch.replace(features=teach(teacher, draft, batch))
