"""Tensor parallelism: one table from the logical axes of parameters to the axis of a device mesh.

Parameters name their logical axes where they are declared (`layers.py`), and XLA derives the rest.
Each device holds its share of the heads, of the FFN and of the vocabulary, and the pages of its own
KV heads. A layer ends in two all-reduces, behind the output projection and behind the FFN; one more
follows the embedding; logits are gathered whole, so that every device samples the same tokens.
Attention kernels are opaque to XLA: they run on each device for its own heads.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .config import ConfigError, LlamaConfig

TENSOR = "tensor"
"""The mesh axis of tensor parallelism."""

LOGICAL_AXES = {
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
    "feature": TENSOR,  # the draft's FC: its input is cut, its output summed
    "embed": None,
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
    """Devices along the axis "tensor"; None: one device."""

    def replicate(self, x: jax.Array) -> jax.Array:
        """x, whole on every device."""
        return self.shard(x)

    def lookup(self, table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
        """Rows of a table that is cut along the vocabulary: each device adds the rows it has.

        Left to itself, XLA would rather cut the whole table anew along its width, at every call.
        """
        if self.mesh is None:
            return jnp.take(table_VD, tokens, axis=0)

        def rows(table_VD, tokens):
            row = tokens - jax.lax.axis_index(TENSOR) * table_VD.shape[0]
            here = (row >= 0) & (row < table_VD.shape[0])
            found = jnp.take(table_VD, jnp.where(here, row, 0), axis=0)
            return jax.lax.psum(jnp.where(here[..., None], found, jnp.zeros_like(found)), TENSOR)

        specs = P(TENSOR, None), P()
        return jax.shard_map(rows, mesh=self.mesh, in_specs=specs, out_specs=P())(table_VD, tokens)

    def shard(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """x, cut along its logical axes."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, named_sharding(self.mesh, *axes))


def make_mesh(tensor_parallel_size: int, devices: list | None = None) -> Mesh:
    """A mesh of the first devices, or of those given."""
    available = jax.devices() if devices is None else devices
    if not 1 <= tensor_parallel_size <= len(available):
        raise ConfigError(
            f"tensor parallelism over {tensor_parallel_size} devices: there are {len(available)}"
        )
    return jax.make_mesh(
        (tensor_parallel_size,), (TENSOR,), axis_types=(AxisType.Auto,),
        devices=available[:tensor_parallel_size],
    )  # fmt: skip


def named_sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """How an array with these logical axes lies on the mesh."""
    return NamedSharding(mesh, P(*(LOGICAL_AXES[axis] if axis else None for axis in axes)))


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
