"""`load_target` and `load_draft`: a name or a path to a model that is ready to run."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pallas_kernels.tree_attention import IMPLEMENTATIONS

from . import hub
from .checkpoint import eagle, gguf, hf, orbax
from .checkpoint.mapping import CheckpointError
from .config import KV_DTYPES, ConfigError
from .draft import Draft
from .llama import Target
from .quantization import Quantization
from .sharding import Backend

DTYPES = ("float32", "bfloat16", "float16")


def load_target(
    name_or_path: str | os.PathLike,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    expert_parallel: bool = False,
    attention: str | None = None,
    quantization: Quantization | str | None = None,
    kv_dtype: str | None = None,
) -> Target:
    """Loads a target: a known name, a Hugging Face folder, a .gguf, an Orbax folder or a hub id.

    Args:
      dtype: of the parameters and of the computation; None: float32 on CPU, bfloat16 on GPU.
      mesh: devices to spread the parameters over (`sharding.make_mesh`); None: one device. Each
        device gets its part of each array straight from the file.
      expert_parallel: each device of the mesh has some experts whole, not a share of every one.
      attention: "reference" or "triton"; None: the best one here.
      quantization: how to store weights, as a `Quantization` or as its `parse` takes it: "fp8",
        "experts=fp8", "mlp=int4,attention=int8". Each kernel is quantised as it is read. None: as
        the checkpoint has them.
      kv_dtype: of cached keys and values, "fp8" (e4m3) or "auto": that of the model.

    Raises:
      CheckpointError: files that are missing, truncated, or do not fit their config.
      ConfigError: an architecture or an option that is not supported, or heads that do not divide
        over the mesh.
      DownloadError: the model could not be fetched.
    """
    if attention not in (None, *IMPLEMENTATIONS):
        raise ConfigError(f"attention {attention!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if expert_parallel and mesh is None:
        raise ConfigError("expert_parallel without a mesh: expected the devices to spread over")
    backend = Backend(attention=attention, mesh=mesh, expert_parallel=expert_parallel)
    name, kv_dtype = dtype_name(dtype), kv_dtype_name(kv_dtype)
    path = hub.resolve(name_or_path)
    folder = orbax.load_target if orbax.is_orbax(path) else hf.load
    load = gguf.load if path.is_file() else folder
    load = functools.partial(load, backend=backend, quantization=quantization)
    target = _read(load, path, name)
    return target.replace(config=dataclasses.replace(target.config, kv_dtype=kv_dtype))


def load_draft(
    name_or_path: str | os.PathLike,
    target: Target,
    *,
    dtype: Any = None,
    numbering: str | None = None,
    quantization: Quantization | str | None = None,
) -> Draft:
    """Loads a draft of any known form, onto the target's devices.

    Its keys and values are cached in the dtype of the target's.

    Args:
      dtype: None: that of the target.
      quantization: as in `load_target`, whatever the target has: "mlp=int4" for FFNs in int4.
      numbering: how an EAGLE-3 folder of another program numbers the layers it taps, "enter" or
        "output"; None: by where it names them (see `checkpoint.eagle3`).

    Raises:
      CheckpointError: files that do not fit their config, or a draft of another target.
      ConfigError: a config that cannot be used.
    """
    name = target.config.dtype if dtype is None else dtype_name(dtype)
    path = hub.resolve(name_or_path)
    backend = Backend(mesh=target.backend.mesh)
    draft = read_draft(
        path, dtype=name, target=target, numbering=numbering, backend=backend,
        quantization=quantization,
    )  # fmt: skip
    check_fit(draft, target, str(path))
    layer = dataclasses.replace(draft.config.layer, kv_dtype=target.config.kv_dtype)
    return draft.replace(config=dataclasses.replace(draft.config, layer=layer))


def read_draft(
    path: Path,
    *,
    dtype: str,
    target: Target | None = None,
    numbering: str | None = None,
    backend: Backend = Backend(),
    quantization: Quantization | str | None = None,
) -> Draft:
    """Reads a draft folder as it is: nothing is compared with a target. Errors as `load_draft`.

    The parameters go to the devices of the backend's mesh.
    """
    if path.is_file():
        raise CheckpointError(f"{path}: a draft is a folder with config.json and model.safetensors")
    if orbax.is_orbax(path):
        load = orbax.load_draft
    else:
        load = functools.partial(eagle.load, target=target, numbering=numbering)
    return _read(functools.partial(load, backend=backend, quantization=quantization), path, dtype)


def _read(load: Callable[..., Any], path: Path, dtype: str) -> Any:
    """Runs one loader; a config it cannot use is reported with the path."""
    try:
        return load(path, dtype=dtype)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def taps_fit(taps: tuple[int, ...], num_layers: int) -> bool:
    """Whether tapped layers are distinct ones of a target, low to high; none fit every target."""
    return all(low < high for low, high in itertools.pairwise((-1, *taps, num_layers)))


def check_fit(draft: Draft, target: Target, source: str) -> None:
    """Raises CheckpointError unless widths, vocabulary and taps of the draft are the target's."""
    own, its = draft.config, target.config
    widths = [("feature width", own.feature_width, its.hidden_size * max(1, len(own.taps)))]
    if not (own.own_embedding and own.own_head):
        widths.append(("hidden size", own.layer.hidden_size, its.hidden_size))
    widths.append(("vocabulary size", own.layer.vocab_size, its.vocab_size))
    if not taps_fit(own.taps, its.num_layers):
        raise CheckpointError(
            f"{source}: a draft of another target: it taps layers {own.taps}, "
            f"this target has {its.num_layers} (expected distinct ones, low to high, from 0)"
        )
    for what, given, expected in widths:
        if given != expected:
            raise CheckpointError(
                f"{source}: a draft of another target: its {what} is {given}, "
                f"this target needs {expected}"
            )
    if draft.draft_to_target is None:
        return
    ids = np.asarray(draft.draft_to_target)
    if ids.min() < 0 or ids.max() >= its.vocab_size or len(np.unique(ids)) != len(ids):
        raise CheckpointError(
            f"{source}: tensor d2t maps to ids {ids.min()}..{ids.max()}, "
            f"expected distinct ids in 0..{its.vocab_size - 1}"
        )


def dtype_name(dtype: Any = None) -> str:
    """The name of a parameter dtype; None: float32 on CPU, bfloat16 on GPU."""
    if dtype is None:
        return "bfloat16" if jax.default_backend() == "gpu" else "float32"
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ConfigError(f"dtype {name} is not supported, expected one of {', '.join(DTYPES)}")
    return name


def kv_dtype_name(name: str | None) -> str | None:
    """`LlamaConfig.kv_dtype` of a name that users give; None: that of the model."""
    if name is None or name in KV_DTYPES.values():
        return name
    if name not in KV_DTYPES:
        raise ConfigError(f"kv_dtype {name!r}: expected one of {', '.join(KV_DTYPES)}")
    return KV_DTYPES[name]
