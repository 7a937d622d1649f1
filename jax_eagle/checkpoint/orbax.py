"""Orbax folders of a target or a draft: parameters, config and tokenizer; bit-equal round trips.

config.json      as in a Hugging Face folder (target) or in a draft folder
tokenizer files  of a target
orbax/           the Orbax checkpoint of {"params": ..., "draft_to_target": ... (if any)}
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import traverse_util

from ..config import DraftConfig
from ..draft import Draft, draft_placement
from ..eagle import abstract_draft_params
from ..llama import Target, abstract_params, target_placement
from ..packing import unpack_params
from ..placement import Placement
from ..quantization import Quantization
from ..quantize import quantize, quantized, quantized_draft
from ..sharding import Backend
from .files import read_json, write_json
from .hf import read_config, read_tokenizer
from .mapping import (
    CheckpointError,
    Tensor,
    check_tensors,
    nested,
    one_line,
)

ARRAYS = "orbax"


def is_orbax(folder: Path) -> bool:
    """Whether a folder holds what this module writes."""
    return (folder / ARRAYS).is_dir()


def save_target(target: Target, folder: str | os.PathLike) -> None:
    """Writes a target."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    if target.tokenizer is not None:
        target.tokenizer.save(folder)
    _save(folder, {"params": unpack_params(target.params)}, target.config.to_hf())


def save_draft(draft: Draft, folder: str | os.PathLike) -> None:
    """Writes a draft."""
    arrays = {"params": unpack_params(draft.params)}
    if draft.draft_to_target is not None:
        arrays["draft_to_target"] = draft.draft_to_target
    _save(folder, arrays, draft.config.to_dict())


def load_target(
    folder: Path,
    *,
    dtype: str,
    backend: Backend = Backend(),
    quantization: Quantization | str | None = None,
) -> Target:
    """Reads a target onto the devices of the backend's mesh.

    Args:
      quantization: how to store weights; None: as the folder has them. Weights that it stores
        whole are all there before they are quantised.

    Raises:
      CheckpointError: files are missing or damaged, or arrays do not fit the config.
      ConfigError: config.json cannot be used, or the folder is quantised in another way.
    """
    config = read_config(folder, dtype=dtype)
    quantized(config, quantization)
    placement = target_placement(config, backend)
    arrays = _load(folder, _declared(abstract_params(config)), placement)
    config, tokenizer = placement.fitted(config), read_tokenizer(folder)
    target = Target(arrays["params"], config, tokenizer, backend)
    return target if quantization is None else quantize(target, quantization)


def load_draft(
    folder: Path,
    *,
    dtype: str,
    backend: Backend = Backend(),
    quantization: Quantization | str | None = None,
) -> Draft:
    """Reads a draft; arguments and errors as in `load_target`."""
    config = DraftConfig.from_dict(read_json(folder / "config.json"), dtype=dtype)
    quantized_draft(config, quantization)
    expected = _declared(abstract_draft_params(config))
    if config.draft_vocab_size is not None:
        expected["draft_to_target",] = jax.ShapeDtypeStruct((config.draft_vocab_size,), jnp.int32)
    placement = draft_placement(config, backend)
    arrays = _load(folder, expected, placement)
    config = dataclasses.replace(config, layer=placement.fitted(config.layer))
    draft = Draft(
        params=arrays["params"], draft_to_target=arrays.get("draft_to_target"), config=config
    )
    return draft if quantization is None else quantize(draft, quantization)


def _declared(params: Any) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shapes and dtypes of abstract parameters, by path."""
    flat: Any = traverse_util.flatten_dict({"params": nn.unbox(params)})
    return flat


def _save(folder: str | os.PathLike, arrays: dict[str, Any], config: Mapping[str, Any]) -> None:
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / ARRAYS, arrays, force=True)
    write_json(folder / "config.json", config)


def _load(
    folder: Path,
    expected: Mapping[tuple[str, ...], jax.ShapeDtypeStruct],
    placement: Placement,
) -> Any:
    """The arrays in the dtypes that are expected, after a check of their shapes."""
    path = folder.absolute() / ARRAYS
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path).item_metadata.tree
            found = jax.tree_util.tree_leaves_with_path(stored)
            leaves = {tuple(key.key for key in keys): leaf for keys, leaf in found}
            check_tensors(
                {"/".join(keys): tuple(like.shape) for keys, like in expected.items()},
                {"/".join(keys): _described(path, leaf) for keys, leaf in leaves.items()},
                path,
            )
            arrays = checkpointer.restore(
                path, nested({k: _here(leaves[k], k, placement) for k in leaves})
            )
        except CheckpointError:
            raise
        except Exception as error:  # Orbax raises what its storage layers raise
            raise CheckpointError(f"{path}: truncated, or not whole ({one_line(error)})") from error
    dtypes = nested({keys: like.dtype for keys, like in expected.items()})
    arrays = jax.tree.map(lambda x, dtype: x.astype(dtype), arrays, dtypes)
    return arrays | {"params": placement.spread(arrays["params"])}


def _described(path: Path, leaf: Any) -> Tensor:
    def read():
        raise NotImplementedError("arrays of an Orbax folder are restored together")

    return Tensor(path, tuple(leaf.shape), read)


def _here(leaf: Any, keys: tuple[str, ...], placement: Placement) -> jax.ShapeDtypeStruct:
    """What to restore a leaf as: stored shape and dtype, on the devices where it belongs."""
    at = placement.of_file(keys[1:] if keys[0] == "params" else None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)
