"""Layers of Llama 4 with experts: a router, routed experts of which each token takes a few, and a
shared expert that all tokens take.

The weight of a chosen expert is the sigmoid of its own logit, whatever the others have, and it
multiplies what goes into the expert, not what comes out. The shared expert takes its input as it
is.

A few tokens hit a few experts, and the time is that of reading those. So rows are sorted by expert
into tiles, and `grouped_matmul` reads the kernels of the experts that have a tile, no others.

On a mesh each device has a share of the units of every expert, or some experts whole. Either way it
has a part of the sum over units and experts, and a share of the shared expert besides: one
all-reduce adds up both. A share needs gate and up of the same units: hence gate_up [E, D, 2, F],
gate before up.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.grouped_matmul import arrange, grouped_matmul, rows_per_tile

from .config import LlamaConfig
from .layers import Linear, SwiGLU, declare_kernel
from .packing import matmul, quantized_matmul
from .sharding import TENSOR, Backend

Scales = tuple[jax.Array | None, jax.Array | None]
"""Of the kernels gate_up and down."""


class Experts(nn.Module):
    """What stands in place of a dense SwiGLU: shared(x) + the sum of expert(weight * x)."""

    config: LlamaConfig
    backend: Backend = Backend()
    layer: int = 0

    @nn.compact
    def __call__(self, x_BMD: Float[Array, "B M D"]) -> Float[Array, "B M D"]:
        c, moe = self.config, self.config.moe
        assert moe is not None
        D, E, F = c.hidden_size, moe.num_experts, moe.intermediate_size
        stored = c.stored("experts", self.layer)
        gate_up, gate_up_scale = declare_kernel(
            self, "gate_up", ((E,), (D,), (2, F)), ("experts", "embed", None, "expert_mlp"),
            stored, x_BMD.dtype,
        )  # fmt: skip
        down, down_scale = declare_kernel(
            self, "down", ((E,), (F,), (D,)), ("experts", "expert_mlp", "embed"),
            stored, x_BMD.dtype,
        )  # fmt: skip
        scales = gate_up_scale, down_scale
        x_TD = jnp.reshape(x_BMD, (-1, D))
        with jax.named_scope("router"):
            # Every device routes every token: the experts' own axis is not the router's.
            router = Linear((D,), (E,), ("embed", None), out_dtype=jnp.float32, name="router")
            weight_TK, expert_TK = route(router(x_TD), moe.experts_per_token)
        routed = x_TD, weight_TK, expert_TK, gate_up, down
        shared = SwiGLU(c, F, c.stored("mlp", self.layer), self.backend, name="shared")
        if self.backend.mesh is None:
            with jax.named_scope("experts"):
                out_TD = run_experts(*routed, self.backend, scales)
            with jax.named_scope("shared_expert"):
                return shared(x_BMD) + jnp.reshape(out_TD, x_BMD.shape)
        with jax.named_scope("shared_expert"):
            inner_TF = jnp.reshape(shared.inner(x_BMD), (-1, F))
        with jax.named_scope("experts"):
            of_down = shared.variables["params"]["down"]
            whole = inner_TF, of_down["kernel"], of_down.get("scale")
            out_TD = _sum_over_devices(routed, scales, whole, self.backend)
            out_BMD = jnp.reshape(out_TD, x_BMD.shape)
        return out_BMD + jnp.reshape(of_down["bias"], (1, 1, -1)) if c.mlp_bias else out_BMD


def route(
    logits_TE: Float[Array, "T E"], count: int
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """The experts of each token, K = `count`, the best first: (weights, experts).

    Of equal logits the lower index wins, as in `argmax`. Weights do not add up to anything.
    """
    index_1E = jnp.arange(logits_TE.shape[1])[None]
    weights, experts = [], []
    for _ in range(count):  # one or two: cheaper than to sort
        expert_T1 = jnp.argmax(logits_TE, axis=1, keepdims=True).astype(jnp.int32)
        weights.append(nn.sigmoid(jnp.take_along_axis(logits_TE, expert_T1, axis=1)))
        experts.append(expert_T1)
        logits_TE = jnp.where(index_1E == expert_T1, -jnp.inf, logits_TE)
    return jnp.concatenate(weights, axis=1), jnp.concatenate(experts, axis=1)


def run_experts(
    x_TD: Float[Array, "T D"],
    weight_TK: Float[Array, "T K"],
    expert_TK: Int[Array, "T K"],
    gate_up: Num[Array, "E stored 2 F"],
    down: Num[Array, "E stored D"],
    backend: Backend,
    scales: Scales = (None, None),
) -> Float[Array, "T D"]:
    """The sum of expert(weight * x) over each token's experts; other experts are not read.

    A negative expert is left out. Kernels in fewer bits have `scales` [E, S, 2, F] and [E, S, D].
    """
    (T, K), E = expert_TK.shape, gate_up.shape[0]
    plan = arrange(expert_TK, E, rows_per_tile(T * K, E))
    product = functools.partial(
        grouped_matmul, implementation=backend.matmul, interpret=backend.interpret
    )
    weight_R = jnp.take(jnp.ravel(weight_TK), jnp.maximum(plan.choice_of_row, 0))
    x_RD = jnp.take(x_TD, plan.token_of_row, axis=0) * weight_R[:, None].astype(x_TD.dtype)
    scale = scales[0]
    inner_R2F = product(
        x_RD,
        jnp.reshape(gate_up, (*gate_up.shape[:2], -1)),
        plan.tile_group,
        scale=None if scale is None else jnp.reshape(scale, (*scale.shape[:2], -1)),
    )
    gate_RF, up_RF = jnp.split(inner_R2F, 2, axis=1)
    out_RD = product(nn.silu(gate_RF) * up_RF, down, plan.tile_group, scale=scales[1])
    out_TKD = out_RD.at[plan.row_of_choice].get(mode="fill", fill_value=0)
    return jnp.sum(out_TKD, axis=1, dtype=jnp.float32).astype(x_TD.dtype)


def _sum_over_devices(routed, scales: Scales, whole, backend: Backend):
    """`run_experts(*routed)` plus the product of inner_TF with the shared expert's kernel, of which
    each device of the mesh makes a part; `whole` are these two and the kernel's scales, if any."""

    def part(routed, scales, whole):
        x_TD, weight_TK, expert_TK, gate_up, down = routed
        if backend.expert_parallel:
            own_TK = expert_TK - jax.lax.axis_index(TENSOR) * gate_up.shape[0]
            is_here_TK = (own_TK >= 0) & (own_TK < gate_up.shape[0])
            expert_TK = jnp.where(is_here_TK, own_TK, -1)
        alone = dataclasses.replace(backend, mesh=None)
        routed_TD = run_experts(x_TD, weight_TK, expert_TK, gate_up, down, alone, scales)
        inner_TF, kernel, scale = whole
        if scale is None:
            shared_TD = matmul(inner_TF, kernel, None)
        else:
            shared_TD = quantized_matmul(inner_TF, kernel, scale, ("mlp", "embed"), alone)
        return jax.lax.psum(routed_TD + shared_TD, TENSOR)

    def inputs(scale, axes):  # as the kernel's, unless there is one scale for all inputs
        return P(*axes) if scale is not None and scale.shape[-2] > 1 else P(*axes[:-2], None, None)

    gate_up, down = (None, None, None, TENSOR), (None, TENSOR, None)
    kernels = P(*gate_up), P(*down)
    of_scales = P(*gate_up), inputs(scales[1], down)
    if backend.expert_parallel:
        kernels = of_scales = P(TENSOR), P(TENSOR)
    in_specs = (
        (P(), P(), P(), *kernels),
        of_scales,
        (P(None, TENSOR), P(TENSOR, None), inputs(whole[2], (TENSOR, None))),
    )
    # Unchecked: the kernels do not say how their outputs vary.
    return backend.on_each_device(part, in_specs, P(), check_vma=False)(routed, scales, whole)
