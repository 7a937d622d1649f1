"""The backend changes nothing but speed: attention kernels, and a mesh of eight devices."""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jax_eagle import Draft, SamplingParams, Target, generate, load_draft, load_target
from jax_eagle.checkpoint import eagle, hf
from jax_eagle.config import ConfigError, DraftConfig, LlamaConfig
from jax_eagle.eagle import init_draft_params
from jax_eagle.llama import init_params
from jax_eagle.sharding import Backend, check_divides, make_mesh
from tests.devices import on_eight_devices

CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=16, num_kv_heads=8,
    head_dim=16, max_position=128,
)  # fmt: skip
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
SAMPLING = [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=7)]
KERNELS = Backend(attention="triton", interpret=True)


def models() -> tuple[Target, Draft]:
    config = DraftConfig.for_target(CONFIG, draft_vocab_size=16)
    draft = Draft(
        init_draft_params(config, jax.random.key(1)), jnp.arange(16, dtype=jnp.int32) * 2, config
    )
    return Target(init_params(CONFIG, jax.random.key(0)), CONFIG), draft


def text(target: Target, draft: Draft | None, tree: str) -> list[list[int]]:
    options = {"max_new_tokens": 12, "sampling": SAMPLING, "stop_token_ids": []}
    return generate(target, draft, PROMPTS, tree=tree, **options).tokens


@pytest.mark.slow  # the eight devices below run the kernels too
def test_kernels_give_the_text_of_the_reference():
    target, draft = models()
    plain = text(target.replace(backend=Backend(attention="reference")), None, "auto")
    tree = "paths:[[0],[1]]"
    assert text(target.replace(backend=KERNELS), draft, tree) == plain


def test_eight_devices_give_the_text_of_one():
    one, eight = on_eight_devices(__file__)
    assert eight == one


def main() -> None:
    target, draft = models()
    mesh = make_mesh(8)
    with tempfile.TemporaryDirectory() as folder:
        hf.save(target, Path(folder, "target"))
        eagle.save(draft, Path(folder, "draft"))
        spread = load_target(Path(folder, "target"), mesh=mesh)
        spread_draft = load_draft(Path(folder, "draft"), spread)
    assert len(spread.params["layers_0"]["mlp"]["up"]["kernel"].devices()) == 8
    kernels = spread.replace(backend=dataclasses.replace(KERNELS, mesh=mesh))
    print(json.dumps([text(target, None, "auto"), text(kernels, spread_draft, "paths:[[0],[1]]")]))


@pytest.mark.parametrize(
    "change, message",
    [({"num_heads": 4, "num_kv_heads": 4}, "4 attention heads"),
     ({"num_kv_heads": 4}, "4 KV heads"), ({"vocab_size": 30}, "30 tokens"),
     ({"intermediate_size": 36}, "36 FFN units")],
)  # fmt: skip
def test_what_does_not_divide_is_refused(change, message):
    mesh = jax.sharding.AbstractMesh((8,), ("tensor",))
    with pytest.raises(ConfigError, match=message):
        check_divides(dataclasses.replace(CONFIG, **change), mesh)


def test_a_mesh_without_the_axis_is_refused():
    with pytest.raises(ConfigError, match="'heads'.*expected 'tensor'"):
        check_divides(CONFIG, jax.sharding.AbstractMesh((8,), ("heads",)))


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(ConfigError, match="there are"):
        make_mesh(len(jax.devices()) + 1)


if __name__ == "__main__":
    main()
