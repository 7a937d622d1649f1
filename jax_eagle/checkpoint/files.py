"""JSON and safetensors on disk: read with one-line errors, written atomically."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from .mapping import CheckpointError, Tensor

_LENGTH = 8
"""Bytes of the number with which a safetensors file begins: the length of its header."""
_BLOCK, _NUM_BLOCKS = 2**12, 256
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64",
}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name. Read, they are views of the file mapped into memory.

    Raises:
      CheckpointError: the file is missing or truncated, or has a dtype that we do not know.
    """
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # the library checks header and length
        with path.open("rb") as file:
            size = int.from_bytes(file.read(_LENGTH), "little")
            header = json.loads(file.read(size))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({error})") from None
    header.pop("__metadata__", None)
    for name, spec in header.items():
        if spec["dtype"] not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {spec['dtype']}, expected one of {known}"
            )
    return {
        name: Tensor(
            path,
            tuple(spec["shape"]),
            functools.partial(_map_tensor, path, _LENGTH + size, spec),
            _DTYPES[spec["dtype"]],
        )
        for name, spec in header.items()
    }


def _map_tensor(path: Path, begin: int, spec: Mapping[str, Any]) -> np.ndarray:
    """A tensor as a view of its file, of which `begin` is the first byte behind the header."""
    dtype, shape = jnp.dtype(_DTYPES[spec["dtype"]]), tuple(spec["shape"])
    if 0 in shape:
        return np.empty(shape, dtype)
    offset = begin + spec["data_offsets"][0]
    return np.asarray(np.memmap(path, dtype, mode="r", offset=offset, shape=shape))


def fingerprint(path: Path) -> bytes:
    """Tells a checkpoint, a file or a folder, from others without reading all of it.

    Files count with their names, sizes and blocks of 4 KiB spread evenly over them: enough to tell
    one model from another, not to notice a single tensor that was changed. Hidden files do not.
    """
    content = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        inner = file.relative_to(path)
        if not file.is_file() or any(part.startswith(".") for part in inner.parts):
            continue
        size = file.stat().st_size
        content.update(f"{inner} {size}\n".encode())
        with file.open("rb") as opened:
            for i in range(_NUM_BLOCKS):
                opened.seek(max(0, size - _BLOCK) * i // (_NUM_BLOCKS - 1))
                content.update(opened.read(_BLOCK))
    return content.digest()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON object, atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors into one file, atomically."""
    partial = path.with_name(path.name + ".partial")
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    # The tensors are the same for every framework, but transformers refuses "np".
    safetensors.numpy.save_file(contiguous, partial, metadata={"format": "pt"})
    os.replace(partial, path)
