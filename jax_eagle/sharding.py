"""One table from logical axes to the axes of a device mesh: data, FSDP and tensor parallelism.

Parameters name their logical axes where they are declared (`layers.py`), and XLA derives the rest.
A mesh has some of the three axes; logical axes of the others are whole. Serving has "tensor" alone:
each device holds its share of the heads, of the FFN and of the vocabulary, and the pages of its own
KV heads. A layer ends in two all-reduces, behind the output projection and behind the FFN; one more
follows the embedding; logits are gathered whole, so that every device samples the same tokens.
Training cuts batches along "data" and "fsdp", and parameters and moments along "fsdp" besides.
Attention kernels are opaque to XLA: they run on each device for its own heads.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from .config import ConfigError, LlamaConfig

TENSOR = "tensor"
"""The mesh axis of tensor parallelism."""
DATA, FSDP = "data", "fsdp"
"""The mesh axes of data parallelism: parameters are whole along one, cut along the other."""

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
    "feature": TENSOR,  # the draft's FC: its input is cut, its output summed
    "embed": FSDP,
    "batch": (DATA, FSDP),
    "head_dim": None,
}


@dataclasses.dataclass(frozen=True)
class Backend:
    """How a model runs: by which attention, on which devices. Static under jit."""

    attention: str | None = None
    """`implementation` of `tree_attention`; None: the best one here."""
    interpret: bool = False
    """Run attention kernels in interpret mode, to test them without a GPU."""
    mesh: Mesh | None = None
    """Devices along the axes "data", "fsdp" and "tensor", or some of them; None: one device."""

    def by_batch(self, x: Float[Array, "B ..."]) -> jax.Array:
        """x, cut along its leading axis at most."""
        return self.shard(x, self._batch_axis(x))

    def _batch_axis(self, x: jax.Array) -> str | None:
        """ "batch" if the leading axis divides over the mesh: the last prompts may not."""
        sizes = {} if self.mesh is None else self.mesh.shape
        count = sizes.get(DATA, 1) * sizes.get(FSDP, 1)
        return "batch" if x.ndim > 1 and x.shape[0] % count == 0 else None

    def lookup(self, table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
        """Rows of a table that is cut along the vocabulary: each device adds the rows it has.

        Left to itself, XLA would rather cut the whole table anew along its width, at every call.
        """
        if self.mesh is None or TENSOR not in self.mesh.axis_names:
            return jnp.take(table_VD, tokens, axis=0)

        def rows(table_VD, tokens):
            row = tokens - jax.lax.axis_index(TENSOR) * table_VD.shape[0]
            here = (row >= 0) & (row < table_VD.shape[0])
            found = jnp.take(table_VD, jnp.where(here, row, 0), axis=0)
            return jax.lax.psum(jnp.where(here[..., None], found, jnp.zeros_like(found)), TENSOR)

        by_batch = named_sharding(self.mesh, self._batch_axis(tokens)).spec
        specs = P(TENSOR, None), by_batch
        return jax.shard_map(rows, mesh=self.mesh, in_specs=specs, out_specs=by_batch)(
            table_VD, tokens
        )

    def shard(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """x, cut along its logical axes."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, named_sharding(self.mesh, *axes))


def make_mesh(
    tensor_parallel_size: int, devices: list | None = None, *, data: int = 1, fsdp: int = 1
) -> Mesh:
    """A mesh of the first devices, or of those given; data and FSDP axes are for training."""
    available = jax.devices() if devices is None else devices
    count = data * fsdp * tensor_parallel_size
    if min(data, fsdp, tensor_parallel_size) < 1 or count > len(available):
        raise ConfigError(
            f"tensor parallelism over {tensor_parallel_size} devices, data {data}, FSDP {fsdp}: "
            f"there are {len(available)}"
        )
    shape, names = (tensor_parallel_size,), (TENSOR,)
    if data * fsdp > 1:
        shape, names = (data, fsdp, tensor_parallel_size), (DATA, FSDP, TENSOR)
    return jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(names), devices=available[:count]
    )


def named_sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """How an array with these logical axes lies on the mesh."""

    def of(axis):
        names = LOGICAL_AXES[axis] if axis else None
        present = [n for n in (names if isinstance(names, tuple) else (names,)) if n in mesh.shape]
        return tuple(present) if len(present) > 1 else (present[0] if present else None)

    return NamedSharding(mesh, P(*map(of, axes)))


def page_sharding(mesh: Mesh) -> NamedSharding:
    """How a page pool [pages, kv_heads, page_size, head_dim] lies on the mesh."""
    return named_sharding(mesh, None, "kv_heads", None, None)


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a module's parameters, from what its `init` returned (or `jax.eval_shape`)."""
    return jax.tree.map(
        lambda axes: named_sharding(mesh, *axes),
        nn.get_partition_spec(boxed),
        is_leaf=lambda x: isinstance(x, P),
    )


def check_divides(config: LlamaConfig, mesh: Mesh) -> None:
    """Raises ConfigError where a sharded axis does not divide evenly over the mesh."""
    if TENSOR not in mesh.axis_names:
        raise ConfigError(f"a mesh with axes {mesh.axis_names}: expected {TENSOR!r} (`make_mesh`)")
    size = mesh.shape[TENSOR]
    for what, count in (
        ("attention heads", config.num_heads),
        ("KV heads", config.num_kv_heads),
        ("FFN units", config.intermediate_size),
        ("channels", config.hidden_size),  # those of the draft's FC
        ("tokens of the vocabulary", config.vocab_size),
    ):
        if count % size:
            raise ConfigError(
                f"{count} {what} do not divide over {size} devices; "
                "choose a tensor-parallel size that divides them all"
            )
    if config.hidden_size % mesh.shape.get(FSDP, 1):
        raise ConfigError(
            f"{config.hidden_size} channels do not divide over fsdp={mesh.shape[FSDP]} devices"
        )
