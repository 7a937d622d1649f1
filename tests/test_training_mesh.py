"""Training on eight devices: data, FSDP and tensor parallelism change neither loss nor updates.

Bounds: losses and gradient norms within 2e-5 of one device's, relative; what three steps did to the
parameters within 1e-3 of its size. Adam divides by the size of the gradient, so where that is
nothing but rounding the single parameter may move otherwise.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eagle import Target, generate
from jax_eagle.llama import init_params
from jax_eagle.sharding import Backend, make_mesh, named_sharding
from tests.devices import on_eight_devices
from tests.training import CONFIG, first_state, make_batch, make_config
from train import init
from train.config import DraftSettings, LossConfig
from train.step import TrainState, make_train_step, step_shardings
from train.teacher import Teacher

MESHES = {"8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2), "1x1x8": (1, 1, 8)}
ROWS = 16
WIDE = dataclasses.replace(
    CONFIG, num_heads=16, num_kv_heads=8, head_dim=4, num_layers=4, intermediate_size=64
)
KINDS = {
    "eagle": (DraftSettings(vocab_size=24, num_layers=2), LossConfig(unroll=2), 2),
    "eagle3": (
        DraftSettings(kind="eagle3", vocab_size=24, taps=(0, 1, 3)),
        LossConfig(feature="none", logits="kl", logits_weight=1.0, unroll=2),
        1,
    ),
}
"""Draft, loss, parts of a batch."""
CASES = [("eagle", "2x2x2")]
"""Data, FSDP and tensor parallelism together."""
SLOW_CASES = [("eagle", "8x1x1"), ("eagle", "1x1x8"), ("eagle3", "2x2x2")]


@pytest.fixture(scope="module")
def figures():
    """figures(kind, mesh) -> those of the mesh and of one device."""
    return functools.cache(functools.partial(on_eight_devices, __file__))


@pytest.mark.parametrize(
    "kind, mesh", [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_a_mesh_changes_nothing(figures, kind, mesh):
    one, many = (figures(kind, mesh)[name] for name in ("one", mesh))
    print(kind, mesh, many)
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=2e-5)
    np.testing.assert_allclose(many["norms"], one["norms"], rtol=2e-5)
    assert many["update_difference"] < 1e-3
    _, fsdp, tensor = MESHES[mesh]
    assert many["share"] == 1 / (fsdp * tensor)  # of a kernel, on each device


def test_the_mesh_decodes_for_the_evaluation(figures):
    one, many = figures("eagle", "2x2x2")["texts"]
    assert many == one


def main(kind: str, name: str) -> None:
    target = Target(init_params(WIDE, jax.random.key(0)), WIDE)
    batch = make_batch(rows=ROWS)
    data, fsdp, tensor = MESHES[name]
    mesh = make_mesh(tensor, data=data, fsdp=fsdp)
    results = {}
    if (kind, name) in CASES:
        results["texts"] = [text(target), text(target.spread(mesh))]
    draft, loss, accumulate = KINDS[kind]
    config = make_config(draft=draft, loss=loss, accumulate=accumulate)
    start, optimizer = first_state(config, target, batch)
    steps = functools.partial(three_steps, config, optimizer, start, target, batch)
    (one, alone), (state, figures) = steps(None), steps(mesh)
    figures["update_difference"] = distance(state, one) / distance(one, start)
    print(json.dumps(results | {"one": alone, name: figures}))


def text(target: Target) -> list[list[int]]:
    """Three prompts: they do not divide over a mesh."""
    return generate(target, None, [[1, 2], [3], [4, 5]], max_new_tokens=6, stop_token_ids=[]).tokens


def three_steps(config, optimizer, state, target, batch, mesh) -> tuple[TrainState, dict]:
    """The state after three steps, and the figures on the way."""
    options, state = {}, jax.tree.map(jnp.copy, state)
    target = target.replace(backend=Backend("reference"))
    if mesh is not None:
        target = target.spread(mesh)
        places = init.state_shardings(state, optimizer, mesh)
        state = jax.device_put(state, places)
        batch = jax.device_put(batch, named_sharding(mesh, "batch"))
        options = {"out_shardings": step_shardings(state, mesh)}
    train_step = make_train_step(config, optimizer, **options)
    teacher = Teacher.of(target)
    losses, norms = [], []
    for _ in range(3):
        state, output = train_step(state, teacher, batch)
        loss = output.metrics["loss"]
        losses.append(float(jnp.sum(loss.sum) / jnp.sum(loss.count)))
        norms.append(float(output.metrics["gradient_norm"].sum))
    kernel = state.params["layers_0"]["mlp"]["up"]["kernel"]
    share = kernel.addressable_shards[0].data.size / kernel.size
    return jax.device_get(state), {"losses": losses, "norms": norms, "share": share}


def distance(one: TrainState, other: TrainState) -> float:
    """Between the parameters of two states."""
    squares = jax.tree.map(lambda x, y: np.sum((x - y) ** 2), one.params, other.params)
    return float(np.sqrt(sum(jax.tree.leaves(squares))))


if __name__ == "__main__":
    main(*sys.argv[1:])
