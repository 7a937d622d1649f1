"""Weights in fewer bits: which numbers are stored, and how they are made from whole weights.

A kernel is stored as small numbers and float32 scales: weight = value * scale. fp8 (e4m3) and int8
have one scale for each output channel, int4 one for each group of inputs of an output channel; all
are symmetric and rounded to the nearest. What is stored how says `quantization.Quantization`:
modules declare their kernels accordingly (`layers.declare_kernel`), and kernels become here what is
declared. Products widen the values on the fly (`packing.quantized_matmul`).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Num

from pallas_kernels.grouped_matmul import pack_int4

from .config import ConfigError, DraftConfig, LlamaConfig
from .draft import Draft, draft_placement
from .eagle import abstract_draft_params
from .llama import Target, abstract_params, target_placement
from .packing import unpack_params
from .placement import Placement
from .quantization import STORED_DTYPES, Quantization, Stored, scale_path
from .sharding import Backend

_LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
_SCHEMES = {dtype: scheme for scheme, dtype in STORED_DTYPES.items()}

Path = tuple[str, ...]
Model = TypeVar("Model", Target, Draft)


@functools.partial(jax.jit, static_argnames=("scheme", "group_size"))
def quantize_kernel(
    kernel: Float[Array, "*E D F"], scheme: str, group_size: int = 128
) -> tuple[Num[Array, "*E stored F"], Float[Array, "*E S F"]]:
    """(values, scales) of a kernel, or of a stack of kernels.

    Args:
      scheme: "fp8" (values in float8_e4m3fn), "int8", or "int4" (uint8, two a byte, as
        `pack_int4` has it).
      group_size: int4: inputs that share a scale; see `quantization.Stored.groups`.

    Raises:
      ConfigError: int4 groups that do not fit the inputs.
    """
    *stack, D, F = kernel.shape
    groups = Stored(scheme, group_size).groups(D)
    grouped = jnp.reshape(kernel.astype(jnp.float32), (*stack, groups, D // groups, F))
    largest = jnp.max(jnp.abs(grouped), axis=-2)
    # Of zeros, or as good as that: a scale that is too small for float32 would divide by zero.
    scale = jnp.where(largest > 1e-30, largest / _LARGEST[scheme], 1.0)
    values = jnp.reshape(grouped / scale[..., None, :], kernel.shape)
    if scheme == "fp8":
        return jnp.clip(values, -448.0, 448.0).astype(jnp.float8_e4m3fn), scale
    values = jnp.round(values).astype(jnp.int8)
    return (values if scheme == "int8" else pack_int4(values, D // groups)), scale


def quantize(model: Model, quantization: Quantization | str) -> Model:
    """A target or draft with some of its weights in fewer bits, on the devices where it is.

    Kernels go one by one, but those of the given model live on for as long as the caller keeps it.
    `load_target` and `load_draft` drop each one at once.

    Raises:
      ConfigError: a quantization that does not fit the model, or a model that has another one.
    """
    if isinstance(model, Draft):
        config = quantized_draft(model.config, quantization)
        forms, placement = draft_forms(config), draft_placement(config, _where(model))
    else:
        config = quantized(model.config, quantization)
        forms, placement = target_forms(config), target_placement(config, model.backend)
    if config == model.config:
        return model
    whole: dict[Path, Any] = traverse_util.flatten_dict(unpack_params(model.params))
    leaves: dict[Path, jax.Array] = {}
    for path, leaf in whole.items():
        leaves |= forms[path].store(path, leaf, placement) if path in forms else {path: leaf}
    return model.replace(params=traverse_util.unflatten_dict(leaves), config=config)


def _where(draft: Draft) -> Backend:
    sharding = jax.tree.leaves(draft.params)[0].sharding
    mesh: Any = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return Backend(mesh=mesh)


class Form(NamedTuple):
    """How a quantised kernel is declared."""

    scheme: str
    group_size: int
    stack_axes: int
    output_axes: int

    def store(self, path: Path, kernel: jax.Array, placement: Placement) -> dict[Path, jax.Array]:
        """Values and scales of a kernel, by path, each device making those that it keeps."""
        paths = path, scale_path(path)
        shardings = tuple(placement.sharding(path) for path in paths)
        return dict(zip(paths, _store(self, shardings, kernel), strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _store(form: Form, shardings, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values and scales of [stack..., in..., out...], cut as the kernel is cut.

    Axes of outputs stay apart: where the last one is cut (gate_up), merged they could not be.
    """

    def one(kernel):  # [in..., out]
        *inputs, F = kernel.shape
        matrix = jnp.reshape(kernel, (-1, F))
        values, scale = quantize_kernel(matrix, form.scheme, form.group_size)
        stored = Stored(form.scheme, form.group_size).kernel_shape(tuple(inputs), (F,))
        return jnp.reshape(values, stored), scale

    for _ in range(form.output_axes - 1):
        one = jax.vmap(one, in_axes=-2, out_axes=-2)
    for _ in range(form.stack_axes):
        one = jax.vmap(one)
    values, scale = one(kernel)
    if shardings != (None, None):
        values, scale = jax.lax.with_sharding_constraint((values, scale), shardings)
    return values, scale


def stored_forms(declared: Any) -> dict[Path, Form]:
    """The kernels that are declared as quantised, by path.

    Args:
      declared: what `abstract_params` or `abstract_draft_params` returned.
    """
    flat: dict[Path, Any] = traverse_util.flatten_dict(nn.unbox(declared))
    forms = {}
    for path, kernel in flat.items():
        stack_axes = int(path[-1] != "kernel")  # experts
        scale = flat.get(scale_path(path))
        if scale is not None and kernel.dtype.name in _SCHEMES:
            scheme, output_axes = _SCHEMES[kernel.dtype.name], scale.ndim - stack_axes - 1
            stored = math.prod(kernel.shape[stack_axes : kernel.ndim - output_axes])
            num_inputs = stored * (2 if scheme == "int4" else 1)
            group_size = num_inputs // scale.shape[stack_axes]
            forms[path] = Form(scheme, group_size, stack_axes, output_axes)
    return forms


def target_forms(config: LlamaConfig) -> dict[Path, Form]:
    """`stored_forms` of a target."""
    return {} if config.quantization is None else stored_forms(abstract_params(config))


def draft_forms(config: DraftConfig) -> dict[Path, Form]:
    """`stored_forms` of a draft."""
    return {} if config.layer.quantization is None else stored_forms(abstract_draft_params(config))


def quantized(layer: LlamaConfig, quantization: Quantization | str | None) -> LlamaConfig:
    """The config with a quantization, as such or as `Quantization.parse` takes it; None: as it is.

    Weights that are stored in these schemes already stay as they are, skipped layers included.

    Raises:
      ConfigError: a quantization that does not fit, or a config that has another one.
    """
    if quantization is None:
        return layer
    if isinstance(quantization, str):
        quantization = Quantization.parse(quantization)
    config = dataclasses.replace(layer, quantization=quantization)
    if (stored := layer.quantization) is None:
        return config
    asked = config.quantization
    assert asked is not None
    # Which layers a published file leaves as they are is its own affair, unless somebody asks.
    skipped = asked.skipped_layers or stored.skipped_layers
    if dataclasses.replace(asked, skipped_layers=skipped) != stored:
        raise ConfigError(
            f"the weights are stored as {stored}: expected no quantization, or that one, given is "
            f"{asked}"
        )
    return layer


def quantized_draft(config: DraftConfig, quantization: Quantization | str | None) -> DraftConfig:
    """`quantized` of a draft's layers."""
    return dataclasses.replace(config, layer=quantized(config.layer, quantization))
