"""Hugging Face folders: config.json, one or many safetensors files, tokenizer files."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from ..config import LlamaConfig
from ..llama import Target
from ..tokenizer import Tokenizer
from .files import read_json, read_safetensors, write_json, write_safetensors
from .mapping import (
    CheckpointError,
    Tensor,
    check_tensors,
    file_shapes,
    target_entries,
    to_params,
    to_tensors,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load(folder: Path, *, dtype: str) -> Target:
    """Reads a Hugging Face folder of architecture LlamaForCausalLM.

    Raises:
      CheckpointError: a file or a tensor is missing, truncated, left over or of the wrong shape.
      ConfigError: an architecture or a RoPE type that is not supported.
    """
    config = read_config(folder, dtype=dtype)
    tensors = read_folder(folder)
    # A tied head may be stored all the same; it is the embedding.
    ignored = ["lm_head.weight"] if config.tie_embeddings else []
    entries = target_entries(config)
    check_tensors(file_shapes(entries), tensors, folder, ignored=ignored)
    params = to_params(entries, tensors, dtype=dtype)
    return Target(params=params, config=config, tokenizer=read_tokenizer(folder))


def save(target: Target, folder: str | os.PathLike, *, max_shard_bytes: int = 5 * 2**30) -> None:
    """Writes a folder that `load` (and any reader of Hugging Face folders) reads back bit-equal."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_tensors(target_entries(target.config), target.params)
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
    more = LlamaConfig.from_hf(fields | {"eos_token_id": stop}).stop_token_ids
    both = dict.fromkeys(config.stop_token_ids + more)
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
