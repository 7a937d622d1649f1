"""`--plan`: what a run will take, told before it starts, from shapes alone.

The target's config.json is all that is read of it. The step is the real one, compiled ahead of time
for the devices it will run on or for described ones (H100s on a machine without a GPU, see
`pallas_kernels.aot`), so its memory is what XLA has laid out, not an estimate.
"""

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_eagle import Target
from jax_eagle.config import ConfigError, DraftConfig, LlamaConfig
from jax_eagle.llama import abstract_params
from jax_eagle.load import dtype_name
from jax_eagle.planning import read_target
from jax_eagle.sharding import Backend, make_mesh, named_sharding, param_shardings
from pallas_kernels.aot import compile_for_h100, h100_mesh, has_plugin

from . import init
from .config import TrainConfig
from .start import check_start, empty_state
from .step import Batch, TrainState, make_optimizer, make_train_step, step_shardings
from .teacher import Teacher
from .throughput import step_flops

TOPOLOGIES = ("here", "h100")
PREALLOCATED = 0.75
"""Share of a GPU's memory that JAX takes unless it is told otherwise."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the step will run."""

    name: str
    mesh: Mesh
    memory: float
    """Bytes of one device."""
    described: bool
    """Nothing can run on it."""

    @property
    def backend(self) -> Backend:
        """Attention kernels have no gradient; one device needs no mesh."""
        return Backend("reference", mesh=self.mesh if self.mesh.size > 1 else None)


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """What one device holds while it runs a step, in bytes."""

    arguments: int
    outputs: int
    aliases: int
    """Of the outputs, those that take the place of arguments."""
    temporaries: int

    @property
    def peak(self) -> int:
        """All at once, as XLA allocates them."""
        return self.arguments + self.outputs - self.aliases + self.temporaries


def plan(config: TrainConfig, *, topology: str | None = None) -> Iterator[str]:
    """Lines about a run: parameters, bytes, tokens, FLOPs; then compiles and tells the memory.

    Args:
      topology: "here": the devices of this machine; "h100": described ones, as many as the config's
        mesh has; None: described ones if there is no GPU here while the CUDA plugin is installed.

    Raises:
      ConfigError, CheckpointError: what `config` names does not exist or does not fit.
      RuntimeError: a described device without the CUDA plugin.
    """
    place = find_place(config, topology)
    on_gpu = place.described or jax.default_backend() == "gpu"
    dtype = dtype_name(config.dtype or ("bfloat16" if on_gpu else "float32"))
    target = read_target(config.target, dtype)
    init.check_target(config, target)
    shapes = Target(nn.unbox(abstract_params(target)), target)
    draft, given = init.draft_to_train(config.draft, shapes)
    if given is not None:
        check_start(config.draft, draft)
    optimizer = make_optimizer(config, num_steps=1)  # the schedule's length changes no shape
    state, teacher = empty_state(config, draft, optimizer), abstract_teacher(target, place)
    yield from _sizes(config, target, draft, state, teacher)
    yield f"compiling the step for {place.mesh.size} x {place.name} ..."
    begin = time.monotonic()
    memory = step_memory(config, place, optimizer, state, teacher)
    yield f"compiled in {time.monotonic() - begin:.0f} s. Bytes of each device:"
    yield (
        f"  arguments {_gb(memory.arguments)}, outputs {_gb(memory.outputs)} "
        f"({_gb(memory.aliases)} of them in place), temporaries {_gb(memory.temporaries)}"
    )
    yield from verdict(memory, place)
    again = _bytes(teacher.layers) / (place.mesh.size / config.mesh.data)
    yield f"  between steps, evaluation holds the target's layers once more: {_gb(again)}"


def find_place(config: TrainConfig, topology: str | None) -> Place:
    """The devices that `plan` compiles for."""
    if topology not in (None, *TOPOLOGIES):
        raise ConfigError(f"topology {topology!r}: expected {' or '.join(TOPOLOGIES)}")
    m = config.mesh
    on_gpu = jax.default_backend() == "gpu"
    if topology == "h100" or (topology is None and not on_gpu and has_plugin()):
        devices = list(h100_mesh(m.data * m.fsdp * m.tensor).devices.flat)
        name, memory = "H100, described, 80 GB", 80e9
    else:
        devices = jax.devices()
        name = devices[0].device_kind
        memory = devices[0].memory_stats()["bytes_limit"] if on_gpu else _host_memory()
    mesh = make_mesh(m.tensor, devices, data=m.data, fsdp=m.fsdp)
    return Place(name, mesh, memory, described=devices[0] not in jax.devices())


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


# ---- shapes ----------------------------------------------------------------------------------


def abstract_teacher(config: LlamaConfig, place: Place) -> Teacher:
    """Shapes of the stacked target, lying on the devices as `Teacher.of` leaves them."""
    boxed = abstract_params(config)
    at = param_shardings(boxed, place.mesh)
    target = Target(nn.unbox(boxed), config, backend=place.backend)
    teacher = jax.eval_shape(Teacher.of, target)
    stacked = {
        name: jax.tree.map(lambda one: NamedSharding(place.mesh, P(None, *one.spec)), at[name])
        for name in teacher.layers
    }
    base = teacher.base.params
    return Teacher(
        _lying(teacher.layers, stacked),
        teacher.base.replace(params=_lying(base, {name: at[name] for name in base})),
    )


def _abstract_batch(config: TrainConfig, place: Place) -> Batch:
    at = named_sharding(place.mesh, "batch")
    shape = config.data.batch, config.data.length
    ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=at)
    weight: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at)
    return Batch(ids, ids, ids, weight)


def _lying(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, at: x.update(sharding=at), shapes, shardings)


def step_memory(
    config: TrainConfig,
    place: Place,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    teacher: Teacher,
) -> StepMemory:
    """Compiles the step that runs the target, and reads XLA's memory analysis."""
    mesh = place.mesh
    state = _lying(state, init.state_shardings(state, optimizer, mesh))
    shardings = step_shardings(state, mesh)
    train_step: Any = make_train_step(config, optimizer, out_shardings=shardings)
    lowered = train_step.lower(state, teacher, _abstract_batch(config, place))
    compiled = compile_for_h100(lowered).compiled if place.described else lowered.compile()
    memory: Any = compiled.memory_analysis()
    return StepMemory(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
    )


# ---- lines -----------------------------------------------------------------------------------


def _sizes(
    config: TrainConfig, target: LlamaConfig, draft: DraftConfig, state: TrainState, teacher: Any
) -> Iterator[str]:
    """Parameters, tokens, FLOPs, and bytes over all devices."""
    c, data = draft.layer, config.data
    yield f"target {config.target}: {_count(teacher):,} parameters, {target.dtype}"
    embedding = " and the embedding that its folder holds" if draft.own_embedding else ""
    yield (
        f"draft {config.draft.kind}, {c.num_layers} layers{embedding}: "
        f"{_count(state.params):,} parameters, {draft.draft_vocab_size or c.vocab_size:,} tokens"
    )
    per_step = data.batch * data.length
    yield f"tokens a step: {data.batch} x {data.length} = {per_step:,}; {_steps(config, per_step)}"
    flops = step_flops(config, target, draft, kept=False)
    own = step_flops(config, target, draft, kept=True)
    yield f"FLOPs a step: {flops:.3g}, {1 - own / flops:.0%} of them in the target's layers"
    groups = {
        "target": teacher,
        "masters": state.params,
        "moments": state.opt_state,
        "average": state.average,
        "gradients": state.params,
    }
    parts = [f"{name} {_gb(size)}" for name, tree in groups.items() if (size := _bytes(tree))]
    yield f"bytes over all devices: {', '.join(parts)}"


def _steps(config: TrainConfig, per_step: int) -> str:
    limits = [source.max_tokens for source in config.data.sources]
    known = [limit for limit in limits if limit is not None]
    if len(known) < len(limits):
        return "steps: as many as the sources give (some have no max_tokens)"
    tokens = sum(known) * (1 - config.data.validation_share)
    return f"steps: {config.data.epochs * math.ceil(tokens / per_step):,} if the sources are full"


def verdict(memory: StepMemory, place: Place) -> Iterator[str]:
    """Whether a step fits, and what has to be set that it does."""
    share = memory.peak / place.memory
    fits = "fits" if share <= 1 else "does NOT fit: smaller batch, accumulate, remat, or fsdp"
    yield f"  peak {_gb(memory.peak)} of {_gb(place.memory)}: {fits}"
    if place.described and PREALLOCATED < share <= 1:
        yield f"  JAX takes {PREALLOCATED:.0%} by default: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
