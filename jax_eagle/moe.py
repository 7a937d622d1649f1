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
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.grouped_matmul import arrange, grouped_matmul, rows_per_tile

from .config import LlamaConfig
from .layers import Kernel, Linear, SwiGLU, declare_kernel
from .packing import matmul, quantized_matmul
from .sharding import TENSOR, Backend


class Routed(NamedTuple):
    """Tokens, the experts that each takes, and all experts' kernels."""

    x_TD: Float[Array, "T D"]
    weight_TK: Float[Array, "T K"]
    expert_TK: Int[Array, "T K"]
    """A negative one is left out."""
    gate_up: Kernel
    """[E, D, 2, F] as it is stored, its scales [E, S, 2, F]."""
    down: Kernel
    """[E, F, D] as it is stored, its scales [E, S, D]."""


class Experts(nn.Module):
    """What stands in place of a dense SwiGLU: shared(x) + the sum of expert(weight * x)."""

    config: LlamaConfig
    backend: Backend = Backend()
    layer: int = 0

    @nn.compact
    def __call__(
        self, x_BMD: Float[Array, "B M D"], live_BM: Bool[Array, "B M"] | None = None
    ) -> Float[Array, "B M D"]:
        c, moe = self.config, self.config.moe
        assert moe is not None
        D, E, F = c.hidden_size, moe.num_experts, moe.intermediate_size
        stored = c.stored("experts", self.layer)
        gate_up = declare_kernel(
            self, "gate_up", ((E,), (D,), (2, F)), ("experts", "embed", None, "expert_mlp"),
            stored, x_BMD.dtype,
        )  # fmt: skip
        down = declare_kernel(
            self, "down", ((E,), (F,), (D,)), ("experts", "expert_mlp", "embed"),
            stored, x_BMD.dtype,
        )  # fmt: skip
        x_TD = jnp.reshape(x_BMD, (-1, D))
        with jax.named_scope("router"):
            # Every device routes every token: the experts' own axis is not the router's.
            router = Linear((D,), (E,), ("embed", None), out_dtype=jnp.float32, name="router")
            weight_TK, expert_TK = route(router(x_TD), moe.experts_per_token)
            if live_BM is not None:
                expert_TK = jnp.where(jnp.reshape(live_BM, (-1, 1)), expert_TK, -1)
        routed = Routed(x_TD, weight_TK, expert_TK, gate_up, down)
        shared = SwiGLU(c, F, c.stored("mlp", self.layer), self.backend, name="shared")
        if self.backend.mesh is None:
            with jax.named_scope("experts"):
                out_TD = run_experts(routed, self.backend)
            with jax.named_scope("shared_expert"):
                return shared(x_BMD) + jnp.reshape(out_TD, x_BMD.shape)
        with jax.named_scope("shared_expert"):
            inner_BMF, shared_down, bias = shared.before_down(x_BMD)
            inner_TF = jnp.reshape(inner_BMF, (-1, F))
        with jax.named_scope("experts"):
            out_TD = _sum_over_devices(routed, inner_TF, shared_down, self.backend)
            out_BMD = jnp.reshape(out_TD, x_BMD.shape)
        return out_BMD if bias is None else out_BMD + jnp.reshape(bias, (1, 1, -1))


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
    routed: Routed, backend: Backend, num_experts: int | None = None
) -> Float[Array, "T D"]:
    """The sum of expert(weight * x) over each token's experts; other experts are not read.

    Args:
      num_experts: those that the choices fell on, if they are more than the E that are here.
    """
    x_TD, weight_TK, expert_TK, gate_up, down = routed
    (T, K), E = expert_TK.shape, gate_up.values.shape[0]
    plan = arrange(expert_TK, E, rows_per_tile(T * K, num_experts or E))
    product = functools.partial(
        grouped_matmul, implementation=backend.matmul, interpret=backend.interpret
    )
    weight_R = jnp.take(jnp.ravel(weight_TK), jnp.maximum(plan.choice_of_row, 0))
    x_RD = jnp.take(x_TD, plan.token_of_row, axis=0) * weight_R[:, None].astype(x_TD.dtype)
    both = jax.tree.map(lambda array: jnp.reshape(array, (*array.shape[:2], -1)), gate_up)
    inner_R2F = product(x_RD, both.values, plan.tile_group, scale=both.scale)
    gate_RF, up_RF = jnp.split(inner_R2F, 2, axis=1)
    out_RD = product(nn.silu(gate_RF) * up_RF, down.values, plan.tile_group, scale=down.scale)
    out_TKD = out_RD.at[plan.row_of_choice].get(mode="fill", fill_value=0)
    return jnp.sum(out_TKD, axis=1, dtype=jnp.float32).astype(x_TD.dtype)


def _sum_over_devices(
    routed: Routed, inner_TF: Float[Array, "T F"], shared_down: Kernel, backend: Backend
) -> Float[Array, "T D"]:
    """`run_experts` plus inner_TF @ shared_down: each device of the mesh makes a part of both."""

    def part(routed, inner_TF, shared_down):
        num_here = num_experts = routed.gate_up.values.shape[0]
        if backend.expert_parallel:
            num_experts *= jax.lax.axis_size(TENSOR)
            own_TK = routed.expert_TK - jax.lax.axis_index(TENSOR) * num_here
            is_here_TK = (own_TK >= 0) & (own_TK < num_here)
            routed = routed._replace(expert_TK=jnp.where(is_here_TK, own_TK, -1))
        alone = dataclasses.replace(backend, mesh=None)
        routed_TD = run_experts(routed, alone, num_experts)
        values, scale = shared_down
        if scale is None:
            shared_TD = matmul(inner_TF, values, None)
        else:
            shared_TD = quantized_matmul(inner_TF, values, scale, ("mlp", "embed"), alone)
        return jax.lax.psum(routed_TD + shared_TD, TENSOR)

    if backend.expert_parallel:
        of_experts = P(TENSOR), P(TENSOR)
    else:
        of_experts = P(None, None, None, TENSOR), _cut_inputs(routed.down, None)
    in_specs = Routed._make([P(), P(), P(), *of_experts]), P(None, TENSOR), _cut_inputs(shared_down)
    # Unchecked: the kernels do not say how their outputs vary.
    return backend.on_each_device(part, in_specs, P(), check_vma=False)(
        routed, inner_TF, shared_down
    )


def _cut_inputs(kernel: Kernel, *batch: None) -> Any:
    """Specs of [batch..., in, out] whose inputs are cut; one scale for all inputs is not."""
    return jax.tree.map(lambda x: P(*batch, TENSOR if x.shape[-2] > 1 else None, None), kernel)
