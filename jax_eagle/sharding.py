"""One table from logical axes to the axes of a device mesh: data, FSDP and tensor parallelism.

Parameters name their logical axes where they are declared (`layers.py`), and XLA derives the rest.
A mesh has some of the three axes; logical axes of the others are whole. Along "tensor" each device
holds its share of the heads, of the FFN and of the vocabulary, and the pages of its own KV heads.
Of experts it holds a share of each, or some of them whole (`Backend.expert_parallel`). A layer ends
in two all-reduces, behind the output projection and behind the FFN; one more follows the
embedding. Logits stay cut along the vocabulary until a token is drawn: devices exchange maxima,
sums and a few candidates of each row, make the noise of their own tokens, and so all draw the same
ones. Kernels are opaque to XLA: they run on each device for its own heads, units or experts.

Generation cuts its rows along "data" by hand: each rank has pages and a loop of its own, and XLA
cuts along "tensor" inside (`over_data`). Training cuts batches along "data" and "fsdp", and
parameters and moments along "fsdp" besides, all by XLA.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

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
    "experts": None,
    "expert_mlp": TENSOR,  # each device has a share of every expert
    "feature": TENSOR,  # the draft's FC: its input is cut, its output summed
    "embed": FSDP,
    "batch": (DATA, FSDP),
    "pages": DATA,  # of generation: each data rank has a pool of its own
    "head_dim": None,
}
EXPERT_PARALLEL = {"experts": TENSOR, "expert_mlp": None}
"""What is different where each device has some experts whole."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """How a model runs: by which attention, on which devices. Static under jit."""

    attention: str | None = None
    """`implementation` of `tree_attention`; None: the best one here."""
    matmul: str | None = None
    """`implementation` of `grouped_matmul`; None: the best one here."""
    interpret: bool = False
    """Run kernels in interpret mode, to test them without a GPU."""
    mesh: Mesh | None = None
    """Devices along the axes "data", "fsdp" and "tensor", or some of them; None: one device."""
    expert_parallel: bool = False
    """Each device has some experts whole; otherwise a share of every expert."""

    @property
    def cuts_vocab(self) -> bool:
        """Whether several devices share the vocabulary."""
        return self.mesh is not None and self.mesh.shape.get(TENSOR, 1) > 1

    def by_batch(self, x: Float[Array, "B ..."]) -> jax.Array:
        """x, cut along its leading axis at most."""
        return self.shard(x, self._batch_axis(x))

    def by_vocab(self, x: Float[Array, "B ... V"]) -> jax.Array:
        """Logits x, cut along the vocabulary, and along their leading axis if that divides."""
        return self.shard(x, *self._logits_axes(x))

    def batch_spec(self, x: jax.Array) -> Any:
        """The axes of the mesh that the leading axis of x [B, ...] is cut along, if it divides."""
        assert self.mesh is not None
        return named_sharding(_mesh_here(self.mesh), self._batch_axis(x)).spec[0]

    def _batch_axis(self, x: jax.Array) -> str | None:
        """ "batch" if the leading axis divides over the mesh: the last prompts may not."""
        sizes = {} if self.mesh is None else _free_axes(_mesh_here(self.mesh))
        count = sizes.get(DATA, 1) * sizes.get(FSDP, 1)
        return "batch" if x.ndim > 1 and x.shape[0] % count == 0 else None

    def lookup(self, table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
        """Rows of a table that is cut along the vocabulary: each device adds the rows it has.

        Left to itself, XLA would rather cut the whole table anew along its width, at every call.
        """
        if self.mesh is None or TENSOR not in self.mesh.axis_names:
            return jnp.take(table_VD, tokens, axis=0)

        def rows(table_VD, tokens):
            row, here = _own_part(tokens, table_VD.shape[0])
            found = jnp.take(table_VD, jnp.where(here, row, 0), axis=0)
            return jax.lax.psum(jnp.where(here[..., None], found, jnp.zeros_like(found)), TENSOR)

        by_batch = named_sharding(_mesh_here(self.mesh), self._batch_axis(tokens)).spec
        in_specs = P(TENSOR, None), by_batch
        return self.on_each_device(rows, in_specs, by_batch)(table_VD, tokens)

    def columns(self, x: Float[Array, "B ... V"], tokens: Int[Array, "B ... K"]) -> jax.Array:
        """Entries [B, ..., K] of rows cut along the vocabulary: each device adds what it has."""
        if not self.cuts_vocab:
            return jnp.take_along_axis(x, tokens, axis=-1)

        def part(x, tokens):
            place, here = _own_part(tokens, x.shape[-1])
            found = jnp.take_along_axis(x, jnp.where(here, place, 0), axis=-1)
            return jax.lax.psum(jnp.where(here, found, 0), TENSOR)

        cut = self._logits_spec(x)
        whole = P(*cut[:-1])
        return self.on_each_device(part, (cut, whole), whole)(x, tokens)

    def top_k(self, x: Float[Array, "B ... V"], k: int) -> tuple[jax.Array, jax.Array]:
        """`jax.lax.top_k` of rows cut along the vocabulary: (values, tokens), [B, ..., k].

        Each device gives its own best; of equals the lowest token comes first, as on one device.
        """
        if not self.cuts_vocab:
            return jax.lax.top_k(x, k)

        def part(x):
            width = x.shape[-1]
            values, tokens = jax.lax.top_k(x, min(k, width))
            tokens = tokens + jax.lax.axis_index(TENSOR) * width
            values, tokens = (
                jax.lax.all_gather(y, TENSOR, axis=y.ndim - 1, tiled=True) for y in (values, tokens)
            )
            values, index = jax.lax.top_k(values, k)
            return values, jnp.take_along_axis(tokens, index, axis=-1)

        cut = self._logits_spec(x)
        whole = P(*cut[:-1])
        return self.on_each_device(part, (cut,), (whole, whole), check_vma=False)(x)

    def spread_columns(
        self, x_BU: jax.Array, token_U: Int[Array, "U"], size: int
    ) -> Float[Array, "B V"]:
        """Columns of a draft vocabulary as those of their target tokens; zero for the others.

        A token lies on one device as the draft's and on another as the target's, so rows of the
        smaller vocabulary are gathered: the only place where a vocabulary is.
        """
        if not self.cuts_vocab:
            return jnp.zeros((x_BU.shape[0], size)).at[:, token_U].set(x_BU)

        def part(x_BU, token_U):
            x_BU = jax.lax.all_gather(x_BU, TENSOR, axis=1, tiled=True)
            width = size // jax.lax.axis_size(TENSOR)
            column_U, here_U = _own_part(token_U, width)
            column_U = jnp.where(here_U, column_U, width)
            return jnp.zeros((x_BU.shape[0], width)).at[:, column_U].set(x_BU, mode="drop")

        cut = self._logits_spec(x_BU)
        return self.on_each_device(part, (cut, P()), cut)(x_BU, token_U)

    def _logits_axes(self, x: jax.Array) -> tuple[str | None, ...]:
        return (self._batch_axis(x), *(None,) * (x.ndim - 2), "vocab")[-x.ndim :]

    def _logits_spec(self, x: jax.Array) -> P:
        assert self.mesh is not None
        return named_sharding(_mesh_here(self.mesh), *self._logits_axes(x)).spec

    def shard(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """x, cut along its logical axes."""
        if self.mesh is None:
            return x
        sharding = named_sharding(
            _mesh_here(self.mesh), *axes, expert_parallel=self.expert_parallel
        )
        return jax.lax.with_sharding_constraint(x, sharding)

    def on_each_device(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any, *, check_vma: bool = True
    ) -> Callable[..., Any]:
        """`jax.shard_map` over the axes of the mesh, inside `over_data` over the other ones."""
        assert self.mesh is not None
        mesh = _mesh_here(self.mesh)
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs,
            axis_names=set(_free_axes(mesh)), check_vma=check_vma,
        )  # fmt: skip


ONE_DEVICE = Backend()
"""What runs where nothing else is said."""


def _own_part(token: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """(place of each token in this device's part of the vocabulary, whether it is there)."""
    place = token - jax.lax.axis_index(TENSOR) * width
    return place, (place >= 0) & (place < width)


def _free_axes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Sizes of the axes along which XLA cuts arrays, or `on_each_device` may."""
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def _mesh_here(mesh: Mesh) -> Mesh | AbstractMesh:
    """The mesh as this part of a program has to name it: `over_data` takes an axis away."""
    here = jax.sharding.get_abstract_mesh()
    return here if DATA in here.manual_axes else mesh


def data_size(mesh: Mesh | None) -> int:
    """Ranks that generate on their own, each for its part of the rows.

    With parameters cut along FSDP there are none: all ranks take part in every layer.
    """
    return 1 if mesh is None or mesh.shape.get(FSDP, 1) > 1 else mesh.shape.get(DATA, 1)


def rows_per_rank(num_rows: int, mesh: Mesh | None) -> int:
    """Rows that each rank of the data axis has at least room for."""
    return -(-num_rows // data_size(mesh))


def over_data(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`function(shared, rows) -> rows`, run by each rank of the data axis on its part of the rows.

    Every array of `rows`, of the arguments and of the result, is cut along its first axis. Along
    the other axes of the mesh XLA goes on cutting by itself. No collective spans the ranks, so
    their loops may end after different numbers of rounds.

    XLA of JAX 0.11.2 crashes where `function` needs an empty constant, and `x.at[:, :n].set(y)`
    makes one: give it `jax.lax.dynamic_update_slice` instead.
    """
    if data_size(mesh) == 1:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(DATA),
        axis_names={DATA}, check_vma=False,
    )  # fmt: skip


def on_host(x: jax.Array) -> np.ndarray:
    """An array on the host, whole; of several processes with a part of it each gets all of them."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def make_mesh(
    tensor_parallel_size: int, devices: list | None = None, *, data: int = 1, fsdp: int = 1
) -> Mesh:
    """A mesh of the first devices, or of those given; the FSDP axis is for training."""
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


def named_sharding(
    mesh: Mesh | AbstractMesh, *axes: str | None, expert_parallel: bool = False
) -> NamedSharding:
    """How an array with these logical axes lies on the mesh."""
    table = LOGICAL_AXES | (EXPERT_PARALLEL if expert_parallel else {})
    free = _free_axes(mesh)

    def of(axis):
        names = table[axis] if axis else None
        present = [n for n in (names if isinstance(names, tuple) else (names,)) if n in free]
        return tuple(present) if len(present) > 1 else (present[0] if present else None)

    return NamedSharding(mesh, P(*map(of, axes)))


def page_sharding(mesh: Mesh) -> NamedSharding:
    """How a page pool [pages, kv_heads, page_size, head_dim] lies on the mesh."""
    return named_sharding(mesh, "pages" if data_size(mesh) > 1 else None, "kv_heads", None, None)


def param_shardings(boxed: Any, mesh: Mesh, *, expert_parallel: bool = False) -> Any:
    """Shardings of a module's parameters, from what its `init` returned (or `jax.eval_shape`)."""
    return jax.tree.map(
        lambda axes: named_sharding(mesh, *axes, expert_parallel=expert_parallel),
        nn.get_partition_spec(boxed),
        is_leaf=lambda x: isinstance(x, P),
    )


def fit(config: LlamaConfig, mesh: Mesh, *, expert_parallel: bool = False) -> LlamaConfig:
    """The config of the model as the mesh holds it: on more devices than KV heads, every head is
    repeated until each device has one.

    Raises:
      ConfigError: an axis that is to be cut does not divide evenly.
    """
    size = mesh.shape.get(TENSOR, 1)
    if size > config.num_kv_heads and size % config.num_kv_heads == config.num_heads % size == 0:
        config = dataclasses.replace(config, num_kv_heads=size)
    check_divides(config, mesh, expert_parallel=expert_parallel)
    return config


def check_divides(config: LlamaConfig, mesh: Mesh, *, expert_parallel: bool = False) -> None:
    """Raises ConfigError where a sharded axis does not divide evenly over the mesh."""
    if TENSOR not in mesh.axis_names:
        raise ConfigError(f"a mesh with axes {mesh.axis_names}: expected {TENSOR!r} (`make_mesh`)")
    if expert_parallel and config.moe is None:
        raise ConfigError("expert_parallel: the model has no experts, leave it out")
    num_experts, width = 0, 0
    if config.moe is not None:
        num_experts, width = config.moe.num_experts, config.moe.intermediate_size
    size = mesh.shape[TENSOR]
    for what, count in (
        ("attention heads", config.num_heads),
        ("KV heads", config.num_kv_heads),
        ("FFN units", config.intermediate_size),
        ("experts", num_experts if expert_parallel else 0),
        ("units of an expert", width),  # of the shared one, if nothing else
        ("channels", config.hidden_size),  # those of the draft's FC
        ("tokens of the vocabulary", config.vocab_size),
    ):
        if count % size:
            raise ConfigError(
                f"{count} {what} do not divide over {size} devices; "
                "choose a tensor-parallel size that divides them all"
            )
    # Inputs of int4 that share a scale share bytes as well: they stay together.
    for group, num_inputs in (
        ("attention", config.num_heads * config.head_dim),
        ("mlp", config.intermediate_size),
        ("mlp", width),
        ("experts", 0 if expert_parallel else width),
    ):
        stored = config.stored(group)
        groups = stored.groups(num_inputs) if stored is not None and num_inputs else 0
        if stored is not None and stored.scheme == "int4" and groups % size:
            raise ConfigError(
                f"quantization {group}=int4: {num_inputs} inputs in {groups} groups do not divide "
                f"over {size} devices; choose a smaller group_size"
            )
    if config.hidden_size % mesh.shape.get(FSDP, 1):
        raise ConfigError(
            f"{config.hidden_size} channels do not divide over fsdp={mesh.shape[FSDP]} devices"
        )
