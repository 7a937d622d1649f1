"""JSON and safetensors on disk: read with one-line errors, written atomically."""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from .mapping import CheckpointError, Tensor


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
    """The tensors of one file by name; values are read when asked for.

    Raises:
      CheckpointError: the file is missing or truncated.
    """
    try:
        file = safetensors.safe_open(path, framework="numpy")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({error})") from None
    return {
        name: Tensor(path, shape, functools.partial(file.get_tensor, name))
        for name, shape in shapes.items()
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON object, atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors into one file, atomically."""
    partial = path.with_name(path.name + ".partial")
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(contiguous, partial, metadata={"format": "np"})
    os.replace(partial, path)
