"""Parameters on the devices of a mesh: each device gets its own part of an array and no more.

Arrays come from files, which are mapped into memory and read part by part, or from devices. Where
there are more devices than KV heads, every head is repeated until each device has the one that its
queries look at: the same function, of a config with more KV heads (`sharding.fit`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from .config import LlamaConfig
from .memory import check_room
from .sharding import Backend, fit, named_sharding


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the parameters of one model lie."""

    backend: Backend
    axes: Any = None
    """Logical axes of each parameter, in the tree of the parameters; None on one device."""
    copies: int = 1
    """How often each KV head is repeated."""

    @classmethod
    def of(cls, config: LlamaConfig, abstract: Callable[[], Any], backend: Backend) -> "Placement":
        """Of a model of this config, or of a draft with such layers.

        Args:
          abstract: gives shapes and logical axes of the parameters, as `init` returns them.

        Raises:
          ConfigError: heads, FFN, vocabulary or experts do not divide over the mesh, or the
            parameters do not fit into what is free on its devices.
        """
        if backend.mesh is None:
            check_room(abstract, None)
            return cls(backend)
        fitted = fit(config, backend.mesh, expert_parallel=backend.expert_parallel)
        check_room(abstract, backend.mesh, expert_parallel=backend.expert_parallel)
        axes = nn.get_partition_spec(abstract())
        return cls(backend, axes, fitted.num_kv_heads // config.num_kv_heads)

    def fitted(self, config: LlamaConfig) -> LlamaConfig:
        """The config of the model as the devices hold it."""
        return dataclasses.replace(config, num_kv_heads=config.num_kv_heads * self.copies)

    def spread(self, params: Any) -> Any:
        """Parameters that are on devices, on those where they belong."""
        if self.backend.mesh is None:
            return params
        return jax.tree.map(
            lambda x, axes: jax.device_put(self._repeat(x, axes), self._sharding(axes)),
            params, self.axes,
        )  # fmt: skip

    def read(self, path: tuple[str, ...], array: np.ndarray, dtype: str) -> jax.Array:
        """The parameter at `path` from a host array, of which each device copies its part."""

        def part(index):
            return np.array(array[index], jnp.dtype(dtype), order="C")

        if self.backend.mesh is None:
            return jnp.asarray(part(...))
        axes = self._axes_at(path)
        array = np.asarray(self._repeat(array, axes))
        return jax.make_array_from_callback(array.shape, self._sharding(axes), part)

    def sharding(self, path: tuple[str, ...]) -> jax.sharding.Sharding | None:
        """How the parameter at `path` is cut; None on one device."""
        return None if self.backend.mesh is None else self._sharding(self._axes_at(path))

    def of_file(self, path: tuple[str, ...] | None) -> jax.sharding.Sharding:
        """Where to put the stored parameter at `path`, to be spread; None: an array that is whole.

        KV heads that are to be repeated do not divide yet: those are whole as well.
        """
        if self.backend.mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        axes = P() if path is None else self._axes_at(path)
        return self._sharding(P() if self._repeats(axes) else axes)

    def _axes_at(self, path: tuple[str, ...]) -> P:
        axes = self.axes
        for key in path:
            axes = axes[key]
        return axes

    def _repeats(self, axes: P) -> bool:
        return self.copies > 1 and "kv_heads" in axes

    def _repeat(self, x, axes: P):
        if not self._repeats(axes):
            return x
        repeat = jnp.repeat if isinstance(x, jax.Array) else np.repeat
        return repeat(x, self.copies, axis=tuple(axes).index("kv_heads"))

    def _sharding(self, axes: P) -> jax.sharding.Sharding:
        assert self.backend.mesh is not None
        return named_sharding(
            self.backend.mesh, *axes, expert_parallel=self.backend.expert_parallel
        )
