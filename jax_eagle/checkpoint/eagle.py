"""EAGLE draft folders: config.json and model.safetensors under the names of EAGLE files.

Our own folders hold the whole `DraftConfig` in config.json and, with a reduced vocabulary, d2t: the
target id of draft id j is j + d2t[j]. Official EAGLE-1 folders have a plain Llama config and say
the rest by their tensors: no norm in front of the first layer, none behind the last, a bias of the
FC or not.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config import DraftConfig, LlamaConfig
from ..draft import Draft
from .files import read_json, write_json, write_safetensors
from .hf import SINGLE, read_folder
from .mapping import (
    CheckpointError,
    Tensor,
    check_tensors,
    draft_entries,
    file_shapes,
    to_params,
    to_tensors,
)


def load(folder: Path, *, dtype: str) -> Draft:
    """Reads a draft folder.

    Raises:
      CheckpointError: a file or a tensor is missing, truncated, left over or of the wrong shape,
        or the folder holds another kind of draft.
      ConfigError: config.json cannot be used.
    """
    fields = read_json(folder / "config.json")
    tensors = read_folder(folder)
    config = _config(fields, tensors, folder, dtype)
    entries = draft_entries(config)
    expected = file_shapes(entries)
    if config.draft_vocab_size is not None:
        expected["d2t"] = (config.draft_vocab_size,)
    # Official files may repeat the target's embedding; the draft uses the target's own.
    ignored = [] if "eagle" in fields else ["embed_tokens.weight"]
    check_tensors(expected, tensors, folder, ignored=ignored)
    params = to_params(entries, tensors, dtype=dtype)
    draft_to_target = _target_ids(tensors["d2t"].read()) if "d2t" in expected else None
    return Draft(params=params, draft_to_target=draft_to_target, config=config)


def save(draft: Draft, folder: str | os.PathLike) -> None:
    """Writes a folder that `load` reads back bit-equal."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_tensors(draft_entries(draft.config), draft.params)
    if draft.draft_to_target is not None:
        ids = np.asarray(draft.draft_to_target, np.int64)
        tensors["d2t"] = ids - np.arange(len(ids), dtype=np.int64)
    write_safetensors(folder / SINGLE, tensors)
    write_json(folder / "config.json", draft.config.to_dict())


def _config(
    fields: dict[str, Any], tensors: dict[str, Tensor], folder: Path, dtype: str
) -> DraftConfig:
    if "eagle" in fields:
        return DraftConfig.from_dict(fields, dtype=dtype)
    if any(name.startswith("midlayer.") for name in tensors):
        raise CheckpointError(f"{folder}: an EAGLE-3 draft, expected an EAGLE-1 or EAGLE-2 draft")
    if "fc.weight" not in tensors:
        raise CheckpointError(f"{folder}: not an EAGLE draft: tensor fc.weight is missing")
    layer = LlamaConfig.from_hf(fields, dtype=dtype)
    return DraftConfig(
        layer=layer,
        feature_width=layer.hidden_size,
        input_norm=False,
        output_norm=False,
        fc_bias="fc.bias" in tensors,
    )


def _target_ids(offsets: np.ndarray) -> jax.Array:
    return jnp.asarray((np.arange(len(offsets)) + offsets).astype(np.int32))
