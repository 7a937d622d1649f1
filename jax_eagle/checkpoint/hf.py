"""Hugging Face folders: config.json, one or many safetensors files, tokenizer files.

Of multimodal Llama 4 folders the language model is read, which has a prefix there, and of folders
that hold each expert by itself all experts. `save` writes neither form: experts are stacked, and
there are no other models.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np

from ..config import LlamaConfig
from ..hf_config import token_ids
from ..llama import Target, target_placement
from ..quantization import Quantization
from ..quantize import quantized, target_forms
from ..sharding import Backend
from ..tokenizer import Tokenizer
from . import fp8
from .experts import fuse_experts, split_experts
from .files import read_json, read_safetensors, write_json, write_safetensors
from .mapping import (
    CheckpointError,
    Entry,
    Tensor,
    check_tensors,
    file_shapes,
    target_entries,
    to_params,
    to_tensors,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_TEXT = "language_model."
_OTHER_MODELS = ("vision_model.", "multi_modal_projector.")
"""Prefixes of multimodal folders: of the model that we read, and of those that we do not."""


def load(
    folder: Path,
    *,
    dtype: str,
    backend: Backend = Backend(),
    quantization: Quantization | str | None = None,
) -> Target:
    """Reads a Hugging Face folder of a Llama; all checks come before any values are read.

    Values go from the files, which are mapped into memory, to the devices of the backend's mesh.

    Args:
      quantization: how to store weights; None: as the folder has them.

    Raises:
      CheckpointError: a file or a tensor is missing, truncated, left over or of the wrong shape.
      ConfigError: an architecture, a RoPE type or a quantization that is not supported.
    """
    config = read_config(folder, dtype=dtype)
    tensors = read_folder(folder)
    # A tied head may be stored all the same; it is the embedding.
    ignored = ["lm_head.weight"] if config.tie_embeddings else []
    entries = target_entries(config)
    if config.llama4 is not None:
        entries = _with_prefix(entries, tensors)
        ignored += [name for name in tensors if name.startswith(_OTHER_MODELS)]
    published = fp8.find(config, entries, tensors, read_json(folder / "config.json"), folder)
    narrow = []
    if published is not None:
        config = quantized(config, published.quantization)
        ignored += published.scales
        narrow = published.weights
    stored = split_experts(entries, tensors)
    check_tensors(file_shapes(stored), tensors, folder, ignored=ignored, narrow=narrow)
    if published is not None:
        entries, tensors = entries + published.entries, tensors | published.tensors
    config = quantized(config, quantization)
    placement, forms = target_placement(config, backend), target_forms(config)
    tensors = fuse_experts(entries, tensors)
    params = to_params(entries, tensors, dtype=dtype, placement=placement, forms=forms)
    config, tokenizer = placement.fitted(config), read_tokenizer(folder)
    return Target(params=params, config=config, tokenizer=tokenizer, backend=backend)


def _with_prefix(entries: list[Entry], tensors: dict[str, Tensor]) -> list[Entry]:
    """The entries under the names of a multimodal folder, if this is one."""
    if not any(name.startswith(_TEXT) for name in tensors):
        return entries
    return [dataclasses.replace(entry, module=_TEXT + entry.module) for entry in entries]


def save(target: Target, folder: str | os.PathLike, *, max_shard_bytes: int = 5 * 2**30) -> None:
    """Writes a folder that `load` (and any reader of Hugging Face folders) reads back bit-equal.

    Raises:
      ConfigError: a quantised target; `orbax.save_target` takes it.
    """
    tensors = to_tensors(target_entries(target.config), target.params)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    _write_shards(folder, tensors, shards)
    if target.tokenizer is not None:
        target.tokenizer.save(folder)
    write_json(folder / "config.json", target.config.to_hf())


def _write_shards(folder: Path, tensors: dict[str, np.ndarray], shards: list[list[str]]) -> None:
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, tensors)
        (folder / INDEX).unlink(missing_ok=True)
        return
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    total = sum(array.nbytes for array in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / SINGLE).unlink(missing_ok=True)


def read_config(folder: Path, *, dtype: str) -> LlamaConfig:
    """config.json, with the stop tokens of generation_config.json added to its own."""
    fields = read_json(folder / "config.json")
    config = LlamaConfig.from_hf(fields, dtype=dtype)
    if not (folder / "generation_config.json").is_file():
        return config
    stop = read_json(folder / "generation_config.json").get("eos_token_id")
    both = dict.fromkeys(config.stop_token_ids + token_ids(stop))
    return dataclasses.replace(config, stop_token_ids=tuple(both))


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None if it has none."""
    return Tokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of all files that its index names."""
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file() and (found := sorted(folder.glob("pytorch_model*.bin"))):
            raise CheckpointError(
                f"{found[0]}: pickled weights are not read; convert the file to safetensors "
                f"({SINGLE}) first"
            )
        return read_safetensors(folder / SINGLE)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map")
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(weight_map.values()):
        tensors |= read_safetensors(folder / file)
    return tensors
