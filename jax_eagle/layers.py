"""The small Linen layers: linear maps, RMS norm, embedding, SwiGLU, rotary embedding.

Each parameter declares its shape, logical axes and initialiser once. Kernels are stored
[in..., out...], so a matrix product needs no transposition.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .config import Llama4Attention, LlamaConfig
from .packing import matmul, module_blocks, quantized_matmul, tied_head
from .quantization import Stored, scale_path
from .sharding import Backend

_SPREAD = {"fp8": 1.0, "int8": 73.9, "int4": 4.6}
"""Standard deviations of the values that `_random_values` makes."""


class Kernel(NamedTuple):
    """The kernel of a linear map as it is stored: weight = value * scale."""

    values: jax.Array
    scale: jax.Array | None = None
    """[batch..., groups of inputs, out...] in float32; None: the values are the weights."""


def partitioned(init: Callable[..., Any], axes: tuple[str | None, ...]) -> Callable[..., Any]:
    """An initialiser whose parameter carries logical axis names; None: never cut."""
    return nn.with_logical_partitioning(init, axes)


def declare_kernel(
    module: nn.Module,
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    axes: tuple[str | None, ...],
    stored: Stored | None,
    dtype: Any,
) -> Kernel:
    """The kernel [batch..., in..., out...] of a linear map as a parameter of `module`.

    Args:
      name: "kernel", or another one; that of its scales follows (`scale_path`).
      shapes: of batch (experts), inputs, outputs.
      axes: the logical axes of all of them.
      stored: how; None: in `dtype`, without scales.
    """
    batch, inputs, outputs = shapes
    first, behind = len(batch), len(batch) + len(inputs)
    if stored is None:
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", batch_axis=tuple(range(first)),
            in_axis=tuple(range(first, behind)), out_axis=tuple(range(behind, len(axes))),
        )  # fmt: skip
        shape = batch + inputs + outputs
        return Kernel(module.param(name, partitioned(init, axes), shape, dtype))
    fan_in = math.prod(inputs)
    groups = stored.groups(fan_in)
    (scale_name,) = scale_path((name,))
    values = module.param(
        name,
        partitioned(_random_values, axes),
        batch + stored.kernel_shape(inputs, outputs),
        jnp.dtype(stored.dtype),
    )
    scale = module.param(
        scale_name,
        partitioned(
            nn.initializers.constant(1 / (_SPREAD[stored.scheme] * fan_in**0.5)),
            (*axes[:first], axes[first] if groups > 1 else None, *axes[behind:]),
        ),
        (*batch, groups, *outputs),
        jnp.float32,
    )
    return Kernel(values, scale)


def _random_values(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers, or random bits, which are int8 or pairs of int4."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jax.random.normal(key, shape).astype(dtype)
    return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), dtype)


class Linear(nn.Module):
    """x @ kernel (+ bias), contracting the last `len(in_shape)` axes of x with the kernel's."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = False
    out_dtype: Any = None
    """Of the result; None: that of x."""
    stored: Stored | None = None
    """How the kernel is stored; None: in the dtype of x."""
    backend: Backend = Backend()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shapes = (), self.in_shape, self.out_shape
        values, scale = declare_kernel(self, "kernel", shapes, self.axes, self.stored, x.dtype)
        kernel_DF = jnp.reshape(values, (-1, math.prod(self.out_shape)))
        batch_shape = x.shape[: x.ndim - len(self.in_shape)]
        x_D = jnp.reshape(x, (*batch_shape, -1))
        if scale is None:
            y_F = matmul(x_D, kernel_DF, module_blocks(self, kernel_DF), self.out_dtype)
        else:
            scale_SF = jnp.reshape(scale, (scale.shape[0], -1))
            axes = self.axes[0], self.axes[len(self.in_shape)]
            y_F = quantized_matmul(x_D, kernel_DF, scale_SF, axes, self.backend, self.out_dtype)
        y = jnp.reshape(y_F, batch_shape + self.out_shape)
        if self.use_bias:
            bias_init = partitioned(nn.initializers.zeros_init(), self.axes[len(self.in_shape) :])
            bias = self.param("bias", bias_init, self.out_shape, x.dtype)
            y = y + jnp.reshape(bias, (1,) * (y.ndim - bias.ndim) + bias.shape)
        return y

    def parameters(self) -> tuple[Kernel, jax.Array | None]:
        """(kernel [in..., out...], bias if it has one), for a product that the caller makes."""
        kernel = Kernel(self.get_variable("params", "kernel"), self.get_variable("params", "scale"))
        return kernel, self.get_variable("params", "bias")


class RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in float32, cast back, then the weight (HF's order)."""

    width: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = partitioned(nn.initializers.ones_init(), ("embed",))
        scale = self.param("scale", init, (self.width,), x.dtype)
        return unit_rms(x, self.eps) * jnp.reshape(scale, (1,) * (x.ndim - 1) + (-1,))


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """x scaled to a root mean square of 1 along its last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse).astype(x.dtype)


class Embed(nn.Module):
    """Token embedding [V, D]; `attend` uses the same table as the output head when tied."""

    vocab_size: int
    width: int
    dtype: jnp.dtype
    backend: Backend = Backend()

    def setup(self):
        init = partitioned(nn.initializers.normal(1.0), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.width), self.dtype)

    def __call__(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        return self.backend.lookup(self.embedding, tokens)

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits in float32."""
        return tied_head(x, self.embedding, module_blocks(self, self.embedding.T), jnp.float32)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: LlamaConfig
    width: int | None = None
    """Of what is between; None: that of the config's dense layers."""
    stored: Stored | None = None
    """How the kernels are stored; None: in the dtype of x."""
    backend: Backend = Backend()

    def setup(self):
        c = self.config
        D, F = (c.hidden_size,), (self.width or c.intermediate_size,)
        linear = functools.partial(
            Linear, use_bias=c.mlp_bias, stored=self.stored, backend=self.backend
        )
        self.gate = linear(D, F, ("embed", "mlp"))
        self.up = linear(D, F, ("embed", "mlp"))
        self.down = linear(F, D, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B M D"]) -> Float[Array, "B M D"]:
        return self.down(self.inner(x))

    def inner(self, x: Float[Array, "B M D"]) -> Float[Array, "B M F"]:
        """What `down` takes."""
        return nn.silu(self.gate(x)) * self.up(x)

    def before_down(
        self, x: Float[Array, "B M D"]
    ) -> tuple[Float[Array, "B M F"], Kernel, Float[Array, " D"] | None]:
        """(what `down` takes, its kernel [F, D], its bias), for those who sum it with other things.

        On a mesh each device has some of F. The product, its sum over the devices and the bias,
        which is added once, are left to the caller.
        """
        return self.inner(x), *self.down.parameters()


def rope_frequencies(config: LlamaConfig) -> Float[Array, "H/2"]:
    """Angle per position of each rotary pair, float32, Llama 3 scaling applied.

    Wavelengths below original / high_freq_factor stay, those above original / low_freq_factor
    are stretched by `factor`, and the band between is blended.
    """
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if (s := config.rope_scaling) is None:
        return frequency
    turns = s.original_max_position * frequency / (2 * jnp.pi)
    band = max(s.high_freq_factor - s.low_freq_factor, 1e-6)  # Llama 4 Scout: low equals high
    smooth = jnp.clip((turns - s.low_freq_factor) / band, 0.0, 1.0)
    return (1 - smooth) * frequency / s.factor + smooth * frequency


def rope_angles(config: LlamaConfig, position_BM: Int[Array, "B M"]):
    """(cos, sin), each [B, M, 1, H/2] in float32, from integer positions."""
    angle = position_BM.astype(jnp.float32)[:, :, None, None] * jnp.reshape(
        rope_frequencies(config), (1, 1, 1, -1)
    )
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x_BMNH: Float[Array, "B M N H"], rope) -> Float[Array, "B M N H"]:
    """Rotates pairs (i, i + H/2), the Hugging Face layout of Llama 3."""
    cos, sin = rope
    first, second = jnp.split(x_BMNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BMNH.dtype)


def scale_queries(
    config: Llama4Attention, q_BMNH: Float[Array, "B M N H"], position_BM: Int[Array, "B M"]
) -> Float[Array, "B M N H"]:
    """Queries of a NoPE layer, longer at later positions (arXiv 2501.19399)."""
    if config.floor_scale is None:
        return q_BMNH
    floors_BM = ((position_BM + 1) // config.floor_scale).astype(jnp.float32)
    factor_BM = 1 + config.attn_scale * jnp.log1p(floors_BM)
    return (q_BMNH.astype(jnp.float32) * factor_BM[:, :, None, None]).astype(q_BMNH.dtype)
