"""Memory that parameters take on each device, from their shapes, and what is free there."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding

from .config import ConfigError
from .sharding import param_shardings


def device_bytes(boxed: Any, mesh: Mesh | None, *, expert_parallel: bool = False) -> Counter[str]:
    """Bytes of parameters on each device of `mesh` (None: on one device), by group.

    Args:
      boxed: what `abstract_params` or `abstract_draft_params` returned.
    """
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))
    shardings: list[Any] = [None] * len(leaves)
    if mesh is not None:
        placed = param_shardings(boxed, mesh, expert_parallel=expert_parallel)
        shardings = jax.tree.leaves(placed)
    groups: Counter[str] = Counter()
    for (path, leaf), sharding in zip(leaves, shardings, strict=True):
        size = math.prod(_part(leaf.shape, sharding)) * leaf.dtype.itemsize
        groups[_group([key.key for key in path])] += size
    return groups


def _part(shape: tuple[int, ...], sharding: NamedSharding | None) -> Iterator[int]:
    """The shape of one device's part: a whole KV head where there are fewer than devices."""
    axes = () if sharding is None else sharding.spec
    for size, names in itertools.zip_longest(shape, axes):
        names = (names,) if isinstance(names, str) else names or ()
        cuts = math.prod(sharding.mesh.shape[name] for name in names) if sharding else 1
        yield -(-size // cuts)


def _group(path: list[str]) -> str:
    """The group of a parameter, by the names of the modules that it is in."""
    if any(name.endswith("norm") for name in path):
        return "norms"
    for name, group in (
        ("embed", "embedding"),
        ("lm_head", "head"),
        ("attention", "attention"),
        ("mlp", "dense FFN"),
        ("router", "router"),
        ("shared", "shared experts"),
        ("moe", "routed experts"),
    ):
        if name in path:
            return group
    return path[0]


def check_room(
    abstract: Callable[[], Any], mesh: Mesh | None, *, expert_parallel: bool = False
) -> None:
    """Raises ConfigError if parameters do not fit into what is free, before they are read.

    Devices that do not tell, as CPUs, are left alone.

    Args:
      abstract: gives what `device_bytes` takes.
      mesh: real devices; None: the first one.
    """
    devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    free = [room for device in devices if (room := free_bytes(device.memory_stats())) is not None]
    if free:
        needed = device_bytes(abstract(), mesh, expert_parallel=expert_parallel).total()
        require(needed, min(free), 1 if mesh is None else mesh.size)


def free_bytes(stats: dict[str, int] | None) -> int | None:
    """What a device's `memory_stats` leave; None: they do not say."""
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def require(needed: float, free: float, num_devices: int) -> None:
    """Raises ConfigError, one line with what is needed and what is there, unless it is enough."""
    if needed > free:
        raise ConfigError(
            f"each of {num_devices} devices needs {size_text(needed)} for weights, "
            f"{size_text(free)} are free; take more devices or weights of fewer bits "
            "(`jax-eagle inspect MODEL --mesh N` plans it)"
        )


def size_text(size: float) -> str:
    """Bytes, to be read."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
