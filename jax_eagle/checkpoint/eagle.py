"""EAGLE draft folders: config.json and model.safetensors under the names of EAGLE files.

Our own folders hold the whole `DraftConfig` in config.json ("eagle") and, with a reduced
vocabulary, d2t: the target id of draft id j is j + d2t[j]. Folders of others say what they are by
their tensors and by the fields that their own readers look at (`eagle_llama`, `eagle3`); `profiles`
writes those.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..config import ConfigError, DraftConfig
from ..draft import Draft, draft_placement
from ..llama import Target
from ..quantization import Quantization
from ..quantize import draft_forms, quantized_draft
from ..sharding import Backend
from . import eagle3, eagle_llama
from .files import read_json, write_json, write_safetensors
from .hf import INDEX, SINGLE, read_folder
from .mapping import (
    Entry,
    Tensor,
    check_tensors,
    draft_entries,
    file_shapes,
    to_params,
    to_tensors,
)


def load(
    folder: Path,
    *,
    dtype: str,
    target: Target | None = None,
    numbering: str | None = None,
    backend: Backend = Backend(),
    quantization: Quantization | str | None = None,
) -> Draft:
    """Reads a draft folder of any form, onto the devices of the backend's mesh.

    Args:
      quantization: how to store weights; None: as the folder has them.
      target: what the draft is for; None: not known, which a few EAGLE-3 folders do not allow.
      numbering: how an EAGLE-3 folder numbers the tapped layers, "enter" or "output"; None: by
        where it names them.

    Raises:
      CheckpointError: a file or a tensor is missing, truncated, left over or of the wrong shape,
        or the folder holds no draft.
      ConfigError: config.json cannot be used.
    """
    fields = read_json(folder / "config.json")
    is_own = "eagle" in fields
    tensors = read_folder(folder)
    if not is_own and eagle3.is_eagle3(fields, tensors):
        config = eagle3.read_config(
            fields, tensors, dtype=dtype, target=target, numbering=numbering
        )
        entries = eagle3.entries_of(config, eagle3.first_layer_of(tensors))
        config = quantized_draft(config, quantization)
        return _draft(config, entries, tensors, folder, eagle3.MAY_HOLD, backend)
    if numbering is not None:
        raise ConfigError(f"numbering {numbering}: a choice for EAGLE-3 folders of other programs")
    if is_own:
        config, ignored = DraftConfig.from_dict(fields, dtype=dtype), ()
    else:
        config = eagle_llama.read_config(fields, tensors, folder, dtype=dtype)
        ignored = eagle_llama.MAY_HOLD
    config = quantized_draft(config, quantization)
    return _draft(config, draft_entries(config), tensors, folder, ignored, backend)


def _draft(
    config: DraftConfig,
    entries: list[Entry],
    tensors: Mapping[str, Tensor],
    folder: Path,
    ignored: tuple[str, ...],
    backend: Backend,
) -> Draft:
    """The draft, if its tensors are those that the config calls for."""
    expected = file_shapes(entries)
    num_tokens, ids_U = config.draft_vocab_size, None
    if num_tokens is not None:
        expected["d2t"] = (num_tokens,)
    check_tensors(expected, tensors, folder, ignored=ignored, narrow=["d2t"])
    if num_tokens is not None:
        ids_U = (np.arange(num_tokens) + tensors["d2t"].read()).astype(np.int32)
    if "t2d" in tensors:
        eagle3.check_flags(tensors["t2d"], ids_U, config.layer.vocab_size)
    placement, forms = draft_placement(config, backend), draft_forms(config)
    dtype = config.layer.dtype
    params = to_params(entries, tensors, dtype=dtype, placement=placement, forms=forms)
    config = replace(config, layer=placement.fitted(config.layer))
    mapping = None if ids_U is None else jax.device_put(ids_U, placement.of_file(None))
    return Draft(params=params, draft_to_target=mapping, config=config)


def save(draft: Draft, folder: str | os.PathLike) -> None:
    """Writes a folder of our own form, which `load` reads back bit-equal.

    Raises:
      ConfigError: a quantised draft; `orbax.save_draft` takes it.
    """
    tensors = to_tensors(draft_entries(draft.config), draft.params)
    if draft.draft_to_target is not None:
        tensors["d2t"] = eagle3.offsets(draft.draft_to_target)
    write_folder(folder, draft.config.to_dict(), tensors)


def write_folder(
    folder: str | os.PathLike, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Path:
    """Writes config.json and model.safetensors; the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / SINGLE, tensors)
    (folder / INDEX).unlink(missing_ok=True)
    write_json(folder / "config.json", fields)
    return folder
