"""How a model is to be served: the keys of a server's YAML file that its size and speed depend on.

The server itself reads all keys (`serve.config`); here the others are left aside, so a plan can be
made without it. Names and meanings are the server's.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml
from jax.sharding import AbstractMesh, AxisType, Mesh

from . import hub
from .config import ConfigError
from .sharding import DATA, TENSOR
from .tree import AUTO_TREES, PLAIN, parse_tree


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A model, its draft, and how they are to be served."""

    model: str
    draft: str | None = None
    trees: tuple[tuple[int | None, str], ...] = ((None, PLAIN),)
    """(largest batch, tree), rising; None: any batch."""
    dtype: str = "bfloat16"
    quantization: str | None = None
    """Of the target's weights, as `Quantization.parse` takes it."""
    draft_quantization: str | None = None
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    block_size: int = 64

    @property
    def mesh(self) -> Mesh:
        """Of its own sizes, described."""
        return describe_mesh(self.tensor_parallel_size, data=self.data_parallel_size)

    def tree(self, batch: int) -> str:
        """The tree for so many sequences."""
        return next(tree for most, tree in self.trees if most is None or batch <= most)


KINDS: dict[str, type] = {
    "model": str,
    "dtype": str,
    "quantization": str,
    "kv_cache_dtype": str,
    "tensor_parallel_size": int,
    "data_parallel_size": int,
    "enable_expert_parallel": bool,
    "max_model_len": int,
    "gpu_memory_utilization": float,
    "block_size": int,
}
"""Keys that are read as they are, and what they hold; null and "auto" leave the default."""


def is_deployment(name: str) -> bool:
    """Whether a name is that of a server's file rather than of a model."""
    return Path(name).suffix in (".yaml", ".yml")


def read_deployment(name: str) -> Deployment:
    """From a server's file; any other name is a model, without a draft.

    Raises:
      ConfigError: the file cannot be read, names no model, or holds a value that cannot be.
    """
    if not is_deployment(name):
        return Deployment(name)
    try:
        tree = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{name}: cannot be read ({' '.join(str(error).split())})") from None
    keys = {str(k).replace("-", "_"): v for k, v in tree.items()} if isinstance(tree, dict) else {}
    if "model" not in keys:
        raise ConfigError(
            f"{name}: names no model, expected a file for `python -m serve.server --config` "
            "(for one of training: `python -m train.train --plan`)"
        )
    given = {
        key: _value(keys[key], kind, f"{name}: {key.replace('_', '-')}")
        for key, kind in KINDS.items()
        if keys.get(key) not in (None, "auto")
    }
    return Deployment(**given, **_speculation(keys, name))


def _value(value: Any, kind: type, where: str) -> Any:
    if kind in (str, bool):
        fits = type(value) is kind
    else:
        fits = type(value) in (int, kind) and value > 0
    if not fits:
        expected = {str: "a text", bool: "true or false", int: "a whole number above 0"}
        raise ConfigError(
            f"{where} is {value!r}, expected {expected.get(kind, 'a number above 0')}"
        )
    return value


def _speculation(keys: dict[str, Any], source: str) -> dict[str, Any]:
    """Draft and trees: the server's key speculative-config."""
    value, where = keys.get("speculative_config", {}), f"{source}: speculative-config"
    if value in (None, "none"):
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}, expected keys such as model and tree")
    draft = _value(value.get("model", "auto"), str, f"{where}: model")
    draft = hub.DRAFTS.get(keys["model"]) if draft == "auto" else draft
    if draft is None:
        return {}
    tree = value.get("tree", "auto")
    if "num_speculative_tokens" in value:
        tree = f"chain:{value['num_speculative_tokens']}"
    if tree == "auto":
        tree = AUTO_TREES["gpu"]
    try:
        rungs = [(None, tree)] if isinstance(tree, str) else [(most, name) for most, name in tree]
        for _, name in rungs:
            parse_tree(name)
        if not rungs or rungs[-1][0] is not None:
            raise ValueError("the last tree is for any number of sequences: null")
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{where} has tree {tree!r}: {error}") from None
    own = {"draft": draft, "trees": tuple(rungs)}
    if value.get("quantization") is not None:
        own["draft_quantization"] = _value(value["quantization"], str, f"{where}: quantization")
    return own


def read_mesh(text: str) -> Mesh:
    """A described mesh, no device needed: "8" shares each layer, "data=2,tensor=4" two copies.

    Raises:
      ConfigError: another form.
    """
    found = re.fullmatch(rf"(?:{DATA}=([1-9]\d*),)?(?:{TENSOR}=)?([1-9]\d*)", text)
    if found is None:
        raise ConfigError(f"mesh {text!r}: expected a number of devices, or data=2,tensor=4")
    return describe_mesh(int(found[2]), data=int(found[1] or 1))


def describe_mesh(tensor: int, *, data: int = 1) -> Mesh:
    """A mesh of these sizes without devices."""
    sizes = {DATA: data, TENSOR: tensor} if data > 1 else {TENSOR: tensor}
    kinds = (AxisType.Auto,) * len(sizes)
    mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
    return mesh
