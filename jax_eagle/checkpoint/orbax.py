"""Orbax folders of a target or a draft: parameters, config and tokenizer; bit-equal round trips.

config.json      as in a Hugging Face folder (target) or in a draft folder
tokenizer files  of a target
orbax/           the Orbax checkpoint of {"params": ..., "draft_to_target": ... (if any)}
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ..config import DraftConfig
from ..draft import Draft
from ..llama import Target
from ..packing import unpack_params
from .files import read_json, write_json
from .hf import read_config, read_tokenizer
from .mapping import (
    CheckpointError,
    Entry,
    Tensor,
    check_tensors,
    draft_entries,
    nested,
    one_line,
    target_entries,
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


def load_target(folder: Path, *, dtype: str) -> Target:
    """Reads a target.

    Raises:
      CheckpointError: files are missing or damaged, or arrays do not fit the config.
      ConfigError: config.json cannot be used.
    """
    config = read_config(folder, dtype=dtype)
    arrays = _load(folder, _shapes(target_entries(config)), dtype)
    return Target(params=arrays["params"], config=config, tokenizer=read_tokenizer(folder))


def load_draft(folder: Path, *, dtype: str) -> Draft:
    """Reads a draft; errors as in `load_target`."""
    config = DraftConfig.from_dict(read_json(folder / "config.json"), dtype=dtype)
    expected = _shapes(draft_entries(config))
    if config.draft_vocab_size is not None:
        expected["draft_to_target",] = (config.draft_vocab_size,)
    arrays = _load(folder, expected, dtype)
    return Draft(
        params=arrays["params"], draft_to_target=arrays.get("draft_to_target"), config=config
    )


def _shapes(entries: list[Entry]) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {("params", *entry.path): entry.shape for entry in entries}


def _save(folder: str | os.PathLike, arrays: dict[str, Any], config: Mapping[str, Any]) -> None:
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / ARRAYS, arrays, force=True)
    write_json(folder / "config.json", config)


def _load(folder: Path, expected: Mapping[tuple[str, ...], tuple[int, ...]], dtype: str) -> Any:
    """The arrays, those of floating point in `dtype`, after a check against `expected`."""
    path = folder.absolute() / ARRAYS
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path).item_metadata.tree
            found = jax.tree_util.tree_leaves_with_path(stored)
            leaves = {tuple(key.key for key in keys): leaf for keys, leaf in found}
            check_tensors(
                {"/".join(keys): shape for keys, shape in expected.items()},
                {"/".join(keys): _described(path, leaf) for keys, leaf in leaves.items()},
                path,
            )
            arrays = checkpointer.restore(path, nested({k: _here(leaves[k]) for k in leaves}))
        except CheckpointError:
            raise
        except Exception as error:  # Orbax raises what its storage layers raise
            raise CheckpointError(f"{path}: truncated, or not whole ({one_line(error)})") from error
    floating = jnp.floating
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, floating) else x, arrays
    )


def _described(path: Path, leaf: Any) -> Tensor:
    def read():
        raise NotImplementedError("arrays of an Orbax folder are restored together")

    return Tensor(path, tuple(leaf.shape), read)


def _here(leaf: Any) -> jax.ShapeDtypeStruct:
    """What to restore a leaf as: stored shape and dtype, on this process's first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
