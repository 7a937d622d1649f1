"""Routing and experts against slow float64 references; what is not hit is not read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jax_eagle.cache import init_cache
from jax_eagle.config import ConfigError, Llama4Attention, LlamaConfig, MoE
from jax_eagle.generate import round_step
from jax_eagle.layers import Kernel
from jax_eagle.llama import Target, init_params
from jax_eagle.moe import Experts, Routed, route, run_experts
from jax_eagle.prefill import Prefill, extend_prompt, start
from jax_eagle.sharding import Backend, check_divides, make_mesh
from tests.devices import on_eight_devices

pytestmark = pytest.mark.usefixtures("quick_compiler")

T, D, E, F = 5, 32, 4, 64
CONFIG = LlamaConfig(
    vocab_size=8, hidden_size=D, intermediate_size=48, num_layers=2, num_heads=8, num_kv_heads=8,
    head_dim=8, llama4=Llama4Attention(()), moe=MoE(E, 2, (1,), F),
)  # fmt: skip
KERNELS = Backend(matmul="triton", interpret=True)


def random_inputs(seed: int, count: int):
    """x [T, D], weights and experts [T, K], and the kernels of all experts."""
    rng = np.random.default_rng(seed)
    shapes = (T, D), (E, D, 2, F), (E, F, D)
    x, gate_up, down = (rng.normal(size=s).astype(np.float32) / s[1] ** 0.5 for s in shapes)
    weight_TK = rng.uniform(0.1, 1, (T, count)).astype(np.float32)
    expert_TK = np.argsort(rng.random((T, E)), axis=1)[:, :count].astype(np.int32)
    return x, weight_TK, expert_TK, gate_up, down


def swiglu(x, gate, up, down):
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))
    return (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down


def reference(x_TD, weight_TK, expert_TK, gate_up, down):
    """Token by token, choice by choice."""
    out_TD = np.zeros(x_TD.shape)
    for t, k in np.ndindex(expert_TK.shape):
        e = expert_TK[t, k]
        x_D = weight_TK[t, k] * x_TD[t]
        out_TD[t] += swiglu(x_D, gate_up[e, :, 0], gate_up[e, :, 1], down[e])
    return out_TD


def distance(given, expected) -> float:
    return float(
        np.linalg.norm(np.asarray(given, np.float64) - expected) / np.linalg.norm(expected)
    )


# ---- routing -------------------------------------------------------------------------------------


@given(
    arrays.arrays(np.float32, (T, E), elements=st.sampled_from([-2.0, 0.0, 0.5, 0.5, 3.0])),
    st.integers(1, E),
)
def test_the_largest_logits_are_chosen_and_the_first_of_equals(logits_TE, count):
    weight_TK, expert_TK = jax.jit(route, static_argnums=1)(logits_TE, count)
    order_TE = np.argsort(-logits_TE, axis=1, kind="stable")
    np.testing.assert_array_equal(expert_TK, order_TE[:, :count])
    chosen_TK = np.take_along_axis(logits_TE, order_TE, axis=1)[:, :count].astype(np.float64)
    np.testing.assert_allclose(weight_TK, 1 / (1 + np.exp(-chosen_TK)), rtol=1e-6)


# ---- experts -------------------------------------------------------------------------------------


@jax.jit(static_argnums=5)
def run(x_TD, weight_TK, expert_TK, gate_up, down, backend):
    routed = Routed(x_TD, weight_TK, expert_TK, Kernel(gate_up), Kernel(down))
    return run_experts(routed, backend)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("backend", [Backend(), KERNELS], ids=["reference", "kernels"])
def test_experts_equal_the_reference(backend, count):
    inputs = random_inputs(0, count)
    assert distance(run(*inputs, backend), reference(*inputs)) < 1e-5
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in inputs if a.dtype == np.float32]
    x, weight_TK, gate_up, down = rounded
    out = run(x, weight_TK, inputs[2], gate_up, down, backend)
    assert out.dtype == jnp.bfloat16 and distance(out, reference(*inputs)) < 2e-2


@pytest.mark.parametrize("backend", [Backend(), KERNELS], ids=["reference", "kernels"])
def test_experts_that_no_token_chose_are_not_read(backend):
    x, weight_TK, expert_TK, gate_up, down = random_inputs(1, 1)
    expert_TK = expert_TK % 2 * 3  # 0 and 3
    assert {0, 3} == set(expert_TK.ravel().tolist())
    clean = run(x, weight_TK, expert_TK, gate_up, down, backend)
    gate_up[1:3], down[1:3] = np.nan, np.nan
    spoilt = run(x, weight_TK, expert_TK, gate_up, down, backend)
    np.testing.assert_array_equal(clean, spoilt)


def test_a_token_that_is_not_a_number_spoils_no_other():
    x, *others = random_inputs(2, 2)
    clean = run(x, *others, Backend())
    x[0] = np.nan
    spoilt = run(x, *others, Backend())
    assert np.isnan(spoilt[0]).all()
    np.testing.assert_array_equal(clean[1:], spoilt[1:])


# ---- the layer -----------------------------------------------------------------------------------


def random_layer(seed: int):
    """Parameters of `Experts`, and x [1, T, D]."""
    x, _, _, gate_up, down = random_inputs(seed, 1)
    rng = np.random.default_rng(seed)
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    shared = {n: {"kernel": rng.normal(size=s) / s[0] ** 0.5} for n, s in shapes.items()}
    router = {"kernel": 3 * rng.normal(size=(D, E))}
    params = {"gate_up": gate_up, "down": down, "router": router, "shared": shared}
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params), jnp.asarray(x)[None]


def test_the_layer_equals_the_reference():
    params, x_1TD = random_layer(3)
    out_1TD = jax.jit(Experts(CONFIG).apply)({"params": params}, x_1TD)
    x_TD = np.asarray(x_1TD[0], np.float64)
    logits_TE = x_TD @ np.asarray(params["router"]["kernel"], np.float64)
    expert_TK = np.argsort(-logits_TE, axis=1)[:, :2]
    weight_TK = 1 / (1 + np.exp(-np.take_along_axis(logits_TE, expert_TK, axis=1)))
    kernels = (np.asarray(params[name]) for name in ("gate_up", "down"))
    shared = (params["shared"][name]["kernel"] for name in ("gate", "up", "down"))
    expected_TD = reference(x_TD, weight_TK, expert_TK, *kernels) + swiglu(x_TD, *shared)
    assert distance(out_1TD[0], expected_TD) < 1e-5


def test_tokens_that_nobody_asks_for_read_no_experts():
    """Those of finished sequences and behind the end of a prompt; the others see no difference."""
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, experts_per_token=1))
    params, x_1TD = random_layer(5)
    layer = jax.jit(Experts(config).apply)
    logits_TE = x_1TD[0] @ params["router"]["kernel"]
    expert_T = np.asarray(jnp.argmax(logits_TE, axis=1))
    live_T = expert_T == expert_T[0]
    assert 0 < live_T.sum() < T
    everything = layer({"params": params}, x_1TD)
    hit = jnp.arange(E)[:, None, None] == expert_T[0]
    spoilt = params | {
        "gate_up": jnp.where(hit[..., None], params["gate_up"], jnp.nan),
        "down": jnp.where(hit, params["down"], jnp.nan),
    }
    some = layer({"params": spoilt}, x_1TD, jnp.asarray(live_T)[None])
    np.testing.assert_array_equal(everything[0, live_T], some[0, live_T])
    assert np.isfinite(some).all()
    assert np.isnan(layer({"params": spoilt}, x_1TD)).any()


def test_what_pads_a_chunk_of_a_prompt_reads_no_experts():
    target = Target(init_params(CONFIG, jax.random.key(0)), CONFIG)
    dead = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 if path[-1].key == "down" and path[-2].key == "moe" else x,
        target.params,
    )
    cache = init_cache(CONFIG, jnp.ones((1, 1), jnp.int32), num_pages=2, page_size=8)
    zeros_1D = jnp.zeros((1, D))
    carry = Prefill(cache, None, zeros_1D, zeros_1D)

    def features(target):
        chunk = jnp.ones((1, 4), jnp.int32), jnp.full(1, 3, jnp.int32)
        return np.asarray(jax.jit(extend_prompt)(target, None, carry, *chunk)[1][0])

    whole, without = features(target), features(target.replace(params=dead))
    np.testing.assert_array_equal(whole[3], without[3])
    assert (whole[:3] != without[:3]).any(axis=1).all()


def test_a_round_routes_the_rows_that_run(monkeypatch):
    """Of a batch in which a row has ended, in a plain step."""
    target, seen = Target(init_params(CONFIG, jax.random.key(0)), CONFIG), []

    def watched(routed, *others):
        jax.debug.callback(lambda experts: seen.append(np.asarray(experts)), routed.expert_TK)
        return run_experts(routed, *others)

    plan, state = start(
        target, None, [[1, 2], [3]], tree="plain", max_new_tokens=4, stop_token_ids=[]
    )
    monkeypatch.setattr("jax_eagle.moe.run_experts", watched)
    ended = state.replace(finish=jnp.array([0, 1], jnp.int32))
    jax.block_until_ready(
        jax.jit(round_step, static_argnums=(1, 2, 3))(target, None, None, plan, ended)
    )
    jax.effects_barrier()
    (experts_TK,) = seen
    assert (experts_TK[0] >= 0).all() and (experts_TK[1:] == -1).all()


def test_eight_devices_give_what_one_gives():
    assert max(on_eight_devices(__file__).values()) < 1e-5


def main() -> None:
    params, x_1TD = random_layer(4)
    mesh = make_mesh(8)
    check_divides(CONFIG, mesh)
    one = np.asarray(jax.jit(Experts(CONFIG).apply)({"params": params}, x_1TD), np.float64)
    backends = {"reference": Backend(mesh=mesh), "kernels": dataclasses.replace(KERNELS, mesh=mesh)}
    found = {}
    for name, backend in backends.items():
        layer = Experts(CONFIG, backend)
        out = jax.jit(layer.apply)({"params": params}, x_1TD)
        found[name] = distance(out, one)
    print(json.dumps(found))


def test_units_that_do_not_divide_are_refused():
    mesh = jax.sharding.AbstractMesh((8,), ("tensor",))
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, intermediate_size=60))
    with pytest.raises(ConfigError, match="60 units of an expert do not divide over 8"):
        check_divides(config, mesh)


if __name__ == "__main__":
    main()
