"""Generation on eight devices: the text of one, whichever way the model and the rows are cut.

Fewer KV heads than devices, so that heads are repeated; five prompts, so that rows are padded; both
a dense target and one with experts, each with a draft and a tree, greedy and sampled rows together.
The models are read from files straight onto the mesh.
"""

import collections
import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.equal_text import compare
from jax_eagle import (
    Draft,
    SamplingParams,
    Target,
    generate,
    generate_stream,
    load_draft,
    load_target,
)
from jax_eagle.checkpoint import eagle, hf, orbax
from jax_eagle.config import ConfigError, DraftConfig, Llama4Attention, LlamaConfig, MoE
from jax_eagle.eagle import init_draft_params
from jax_eagle.generate import decode
from jax_eagle.llama import init_params
from jax_eagle.prefill import start
from jax_eagle.sharding import fit, make_mesh
from jax_eagle.tree import chain_tree
from tests.conftest import random_params
from tests.devices import on_eight_devices

pytestmark = pytest.mark.usefixtures("quick_compiler")

DENSE = LlamaConfig(
    vocab_size=16, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=8, num_kv_heads=2,
    head_dim=16, max_position=64,
)  # fmt: skip
EXPERTS = dataclasses.replace(
    DENSE,
    num_layers=2,
    llama4=Llama4Attention(nope_layers=(1,), chunk=8, floor_scale=4),
    moe=MoE(num_experts=8, experts_per_token=2, layers=(1,), intermediate_size=16),
)
MODELS = {"dense": DENSE, "experts": EXPERTS}
CASES = {
    "dense, tp 8": ("dense", 8, 1, False),
    "dense, tp 4 x dp 2": ("dense", 4, 2, False),
    "experts, tp 8": ("experts", 8, 1, False),
    "experts, tp 4 x dp 2": ("experts", 4, 2, False),
    "experts, ep 8": ("experts", 8, 1, True),
}
"""Model, tensor size, data size, whether experts are whole."""
FAST = ("dense, tp 8", "experts, tp 4 x dp 2", "experts, ep 8")
SLOW = tuple(name for name in CASES if name not in FAST)
all_cases = pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
PROMPTS = [[1, 2, 3], [4] * 14, [7], [5, 6, 9, 10, 11], [8, 15]]
GREEDY = SamplingParams()
SAMPLING = [
    GREEDY,
    GREEDY,
    SamplingParams(temperature=0.8, top_p=0.9, seed=7),
    SamplingParams(temperature=1.0, top_k=6, presence_penalty=1.0, seed=3),
    SamplingParams(frequency_penalty=0.5),
]
OPTIONS = {
    "tree": "paths:[[0],[1]]", "sampling": SAMPLING, "max_new_tokens": 12,
    "stop_token_ids": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def of_fast():
    return on_eight_devices(__file__, *FAST)


@pytest.fixture(scope="module")
def of_slow():
    return on_eight_devices(__file__, *SLOW)


@pytest.fixture
def results(case, request):
    """Of all cases that run with this one."""
    return request.getfixturevalue("of_fast" if case in FAST else "of_slow")


@all_cases
def test_eight_devices_give_the_text_of_one(results, case):
    assert results["texts"][case], results["reports"][case]


@all_cases
def test_the_draft_is_right_and_wrong(results, case):
    """Or the paths of a tree would be all alike."""
    model, *_ = CASES[case]
    assert 1.1 < results["acceptance_length"][model] < 1.9


@all_cases
def test_devices_hold_their_own_pages_and_parameters(results, case):
    name, tensor, data, expert_parallel = CASES[case]
    shares, config = results["shares"][case], MODELS[name]
    pages = 1 + 8 // data  # of a layer, rows being padded to eight; a trash page for each rank
    pool = [config.num_layers * pages, 1, 64, 16]
    assert shares["pages before"] == shares["pages after"] == pool
    assert shares["k"] == [32, 1, 16]  # a head for every device
    whole = [8 // tensor, 32, 2, 16]
    assert shares.get("gate_up") == (
        None if config.moe is None else whole if expert_parallel else [8, 32, 2, 16 // tensor]
    )


@pytest.mark.parametrize(
    "case",
    ["dense, tp 8", pytest.param("experts, tp 8", marks=pytest.mark.slow), "experts, ep 8"],
)
def test_a_layer_ends_in_two_sums(results, case):
    """Behind the attention and behind what follows, and one more behind the embedding."""
    num_layers = MODELS[CASES[case][0]].num_layers
    assert results["collectives"][case] == {"all-reduce": 2 * num_layers + 1}


@all_cases
def test_loading_moves_no_more_than_shares(results, case):
    """Every parameter came in parts of its own size from a file, and they are those of the file."""
    assert results["loading"][case] == {"arrays": True, "parts": True, "values": True}


@pytest.mark.parametrize("case", ["dense, tp 8"])
def test_an_orbax_folder_is_restored_onto_the_mesh(results, case):
    assert results["orbax"] == {"values": True, "shardings": True}


def main(*cases: str) -> None:
    results: dict = {
        key: {}
        for key in ("texts", "reports", "acceptance_length", "shares", "loading", "collectives")
    }
    with tempfile.TemporaryDirectory() as name:
        for model, config in MODELS.items():
            folder = Path(name, model)
            target, draft = save_models(config, folder)
            one = generate(target, draft, PROMPTS, **OPTIONS)
            results["acceptance_length"][model] = one.acceptance_length
            for case in cases:
                of_model, tensor, data, expert_parallel = CASES[case]
                if of_model != model:
                    continue
                mesh = make_mesh(tensor, data=data)
                spread, results["loading"][case] = watched_load(
                    folder / "target", target, mesh=mesh, expert_parallel=expert_parallel
                )
                spread_draft = load_draft(folder / "draft", spread)
                many = generate(spread, spread_draft, PROMPTS, **OPTIONS)
                report = compare(target, PROMPTS, one.tokens, many.tokens, sampling=SAMPLING)
                # The stream runs the same rounds: once for each kind of mesh is enough.
                streamed = data == 1 or stream(spread, spread_draft) == many.tokens
                results["texts"][case] = report.equal and streamed
                results["reports"][case] = str(report)
                results["shares"][case] = shares(spread, spread_draft)
                if data == 1:
                    results["collectives"][case] = collectives(spread)
                if case == "dense, tp 8":
                    results["orbax"] = restored(target, spread, Path(name, "orbax"))
    print(json.dumps(results))


def save_models(config: LlamaConfig, folder: Path) -> tuple[Target, Draft]:
    """A random target and a random draft of it, and the folders that they are read from."""
    target = Target(random_params(init_params, config, 1), config)
    draft_config = DraftConfig.for_target(config, draft_vocab_size=8)
    ids = jnp.arange(8, dtype=jnp.int32) * 2
    draft = Draft(random_params(init_draft_params, draft_config, 2), ids, draft_config)
    hf.save(target, folder / "target")
    eagle.save(draft, folder / "draft")
    return target, draft


def watched_load(folder: Path, whole: Target, **options) -> tuple[Target, dict]:
    """The target, loaded while every part that goes to a device is looked at."""
    make, parts, num_arrays = jax.make_array_from_callback, [], 0

    def watched(shape, sharding, callback):
        nonlocal num_arrays
        num_arrays += 1

        def part(index):
            array = callback(index)
            parts.append(array.shape == sharding.shard_shape(shape))
            return array

        return make(shape, sharding, part)

    jax.make_array_from_callback = watched
    try:
        target = load_target(folder, dtype="float32", **options)
    finally:
        jax.make_array_from_callback = make
    leaves = jax.tree.leaves(target.params)
    return target, {
        "arrays": num_arrays == len(leaves),
        "parts": all(parts) and len(parts) >= num_arrays,
        "values": equal(target, whole),
    }


def equal(spread: Target, whole: Target) -> bool:
    """Whether the devices hold the parameters of `whole`, its KV heads repeated."""
    copies = spread.config.num_kv_heads // whole.config.num_kv_heads

    def same(path, x, y) -> bool:
        y = np.asarray(y)
        if path[-2].key in ("k", "v"):
            y = np.repeat(y, copies, axis=1)
        return x.shape == y.shape and all(
            np.array_equal(shard.data, y[shard.index]) for shard in x.addressable_shards
        )

    return all(jax.tree.leaves(jax.tree_util.tree_map_with_path(same, spread.params, whole.params)))


def stream(target: Target, draft: Draft) -> list[list[int]]:
    events = list(generate_stream(target, draft, PROMPTS, **OPTIONS))
    return [sum((event.new_tokens[b] for event in events), []) for b in range(len(PROMPTS))]


def shares(target: Target, draft: Draft) -> dict[str, list[int]]:
    """What one device has of a page pool before and after decoding, and of some kernels."""
    plan, state = start(target, draft, PROMPTS, **OPTIONS)
    before = of_device(state.cache.k_pages)
    model = target.replace(tokenizer=None)
    state = decode(model, draft, draft.bind_head(target), plan, state, np.int32(2**30))
    first, last = (target.params[f"layers_{i}"] for i in (0, target.config.num_layers - 1))
    return {
        "pages before": before,
        "pages after": of_device(state.cache.k_pages),
        "k": of_device(first["attention"]["k"]["kernel"]),
    } | ({"gate_up": of_device(last["moe"]["gate_up"])} if "moe" in last else {})


def collectives(target: Target) -> dict[str, int]:
    """How many of each kind a forward has."""
    tokens_BT = jnp.zeros((2, 4), jnp.int32)
    forward = jax.jit(lambda target: target(tokens_BT, chain_tree(2, 4), None).x)
    text = forward.lower(target.replace(tokenizer=None)).compile().as_text()
    kinds = r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    return collections.Counter(re.findall(kinds, text))


def of_device(x: jax.Array) -> list[int]:
    return list(x.addressable_shards[0].data.shape)


def restored(target: Target, spread: Target, folder: Path) -> dict:
    orbax.save_target(target, folder)
    again = load_target(folder, dtype="float32", mesh=spread.backend.mesh)
    pairs = zip(jax.tree.leaves(again.params), jax.tree.leaves(spread.params), strict=True)
    return {
        "values": equal(again, target),
        "shardings": all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs),
    }


# ---- what fits a mesh ----------------------------------------------------------------------------

EIGHT = jax.sharding.AbstractMesh((8,), ("tensor",))


def test_kv_heads_are_repeated_until_every_device_has_one():
    assert fit(DENSE, EIGHT).num_kv_heads == 8
    assert fit(DENSE, jax.sharding.AbstractMesh((4,), ("tensor",))).num_kv_heads == 4
    assert fit(DENSE, jax.sharding.AbstractMesh((2,), ("tensor",))) == DENSE


@pytest.mark.parametrize(
    "change, message",
    [({"num_heads": 12, "num_kv_heads": 4}, "12 attention heads"),
     ({"num_heads": 24, "num_kv_heads": 3}, "3 KV heads"),
     ({"vocab_size": 30}, "30 tokens")],
)  # fmt: skip
def test_what_cannot_be_repeated_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        fit(dataclasses.replace(DENSE, **change), EIGHT)


def test_experts_are_whole_or_cut():
    odd = dataclasses.replace(EXPERTS, moe=dataclasses.replace(EXPERTS.moe, num_experts=6))
    fit(odd, EIGHT)
    with pytest.raises(ConfigError, match="6 experts do not divide"):
        fit(odd, EIGHT, expert_parallel=True)
    with pytest.raises(ConfigError, match="no experts"):
        fit(DENSE, EIGHT, expert_parallel=True)


def test_experts_on_one_device_need_no_choice(tmp_path):
    with pytest.raises(ConfigError, match="without a mesh"):
        load_target(tmp_path, expert_parallel=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
