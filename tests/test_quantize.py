"""Weights and caches in fewer bits: what is stored, what it computes, and that no text changes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jax_eagle import SamplingParams, Target, generate, load_draft, load_target
from jax_eagle.cache import as_cached, commit, init_cache
from jax_eagle.checkpoint import eagle, hf, orbax
from jax_eagle.config import ConfigError, DraftConfig, Llama4Attention, LlamaConfig, MoE
from jax_eagle.llama import abstract_params, init_params, target_placement
from jax_eagle.packing import quantized_matmul
from jax_eagle.quantization import Quantization, Stored, scale_path
from jax_eagle.quantize import quantize, quantize_kernel, stored_forms, target_forms
from jax_eagle.sharding import Backend, check_divides, make_mesh
from jax_eagle.tree import chain_tree
from pallas_kernels.grouped_matmul import dequantize
from tests.devices import on_eight_devices

pytestmark = pytest.mark.usefixtures("quick_compiler")

E, D, F = 2, 64, 8
DTYPES = {"fp8": "float8_e4m3fn", "int8": "int8", "int4": "uint8"}
WITH_EXPERTS = LlamaConfig(
    vocab_size=32, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, max_position=64, llama4=Llama4Attention((1,), chunk=8), moe=MoE(4, 1, (1,), 64),
)  # fmt: skip
KERNELS = arrays.arrays(
    np.float32, (E, D, F), elements=st.floats(-1000, 1000, width=32), fill=st.just(0)
)


@pytest.fixture(scope="module")
def with_experts() -> Target:
    return Target(init_params(WITH_EXPERTS, jax.random.key(0)), WITH_EXPERTS)


def dequantized(target: Target) -> Target:
    """The same numbers as whole weights."""
    flat = traverse_util.flatten_dict(target.params)
    forms = stored_forms(abstract_params(target.config))
    config = dataclasses.replace(target.config, quantization=None)
    shapes = traverse_util.flatten_dict(abstract_params(config))
    for path, form in forms.items():
        stack = flat[path].shape[: form.stack_axes]
        scale = flat.pop(scale_path(path))
        groups = scale.shape[form.stack_axes]
        values = jnp.reshape(flat[path], (*stack, -1, scale[0].size // (groups if stack else 1)))
        whole = dequantize(values, jnp.reshape(scale, (*stack, groups, values.shape[-1])))
        flat[path] = jnp.reshape(whole, shapes[path].unbox().shape)
    return target.replace(params=traverse_util.unflatten_dict(flat), config=config)


def distance(given, expected) -> float:
    given, expected = np.asarray(given, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(given - expected) / np.linalg.norm(expected))


# ---- numbers -------------------------------------------------------------------------------------


@given(KERNELS, st.sampled_from(sorted(DTYPES)))
def test_every_weight_is_rounded_to_the_nearest(kernel, scheme):
    values, scale = quantize_kernel(kernel, scheme, 32)
    groups = 2 if scheme == "int4" else 1
    assert values.dtype == DTYPES[scheme] and scale.dtype == jnp.float32
    assert values.shape == (E, D // groups, F) and scale.shape == (E, groups, F)
    whole = np.asarray(dequantize(values, scale), np.float64)
    step = np.repeat(np.asarray(scale, np.float64), D // groups, axis=1)
    # Half a step; of fp8, half of what the last of four bits is worth.
    half = np.maximum(np.abs(kernel) * 2**-4, step * 2**-10) if scheme == "fp8" else step / 2
    assert (np.abs(whole - kernel) <= half * (1 + 1e-5) + 1e-30).all()
    one = quantize_kernel(kernel[1], scheme, 32)
    np.testing.assert_array_equal(np.asarray(one[0]), np.asarray(values[1]))


def test_largest_weights_reach_the_largest_numbers_and_zeros_stay():
    kernel = np.zeros((32, 3), np.float32)
    kernel[5] = -3, 0, 448
    for scheme, largest in (("fp8", 448), ("int8", 127), ("int4", 7)):
        values, scale = quantize_kernel(kernel, scheme)
        np.testing.assert_allclose(scale[0], np.array([3 / largest, 1, 448 / largest]), rtol=1e-6)
        np.testing.assert_allclose(dequantize(values, scale), kernel, rtol=1e-6)


@pytest.mark.parametrize(
    "inputs, group_size, groups", [(576, 128, 9), (1536, 128, 12), (32, 128, 1), (192, 96, 2)]
)
def test_groups_divide_the_inputs(inputs, group_size, groups):
    assert Stored("int4", group_size).groups(inputs) == groups
    assert Stored("fp8", group_size).groups(inputs) == 1


def test_groups_too_small_for_the_kernels_are_refused():
    with pytest.raises(ConfigError, match="128: 48 inputs leave groups of 16, expected a multiple"):
        Stored("int4", 128).groups(48)


FLOATS = st.floats(-1024, 1024, width=32) | st.floats(-0.125, 0.125, width=32) | st.just(np.nan)


@given(arrays.arrays(np.float32, (64,), elements=FLOATS))
def test_cached_numbers_are_those_of_the_pages(x):
    expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    found = jax.jit(as_cached, static_argnums=1)(x, "float8_e4m3fn")
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    assert as_cached(x, None) is x


# ---- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, fields",
    [("fp8", {"experts": "fp8", "mlp": "fp8", "attention": "fp8"}),
     ("experts=fp8,skipped_layers=0+47", {"experts": "fp8", "skipped_layers": (0, 47)}),
     ("mlp=int4, attention=int8,group_size=64",
      {"mlp": "int4", "attention": "int8", "group_size": 64}),
     ("head=int8", {"head": "int8"})],
)  # fmt: skip
def test_quantization_is_named(text, fields):
    assert Quantization.parse(text) == Quantization(**fields)


@pytest.mark.parametrize(
    "text, message",
    [("fp4", "'fp4': expected fp8, int8, int4, or such as experts=fp8"),
     ("mlp=fp4", "mlp=fp4: expected one of fp8, int8, int4"), ("embed=fp8", "'embed=fp8'"),
     ("mlp=fp8,mlp=int8", "expected"), ("mlp=int4,group_size=x", "invalid literal"),
     ("mlp=int4,group_size=100", "group_size 100: expected a multiple of 32")],
)  # fmt: skip
def test_what_is_no_quantization(text, message):
    with pytest.raises(ConfigError, match=message):
        Quantization.parse(text)


def test_configs_say_how_weights_are_stored():
    config = dataclasses.replace(WITH_EXPERTS, quantization=Quantization.parse("fp8"))
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    draft = DraftConfig.for_target(config)
    assert draft.layer.quantization is None  # a draft chooses for itself
    own = dataclasses.replace(draft.layer, quantization=Quantization(mlp="int4"))
    draft = dataclasses.replace(draft, layer=own)
    assert DraftConfig.from_dict(json.loads(json.dumps(draft.to_dict()))) == draft
    with pytest.raises(ConfigError, match="head: this draft has no head of its own"):
        dataclasses.replace(draft, layer=dataclasses.replace(own, quantization=HEAD))
    with pytest.raises(ConfigError, match="head: this model's head is its embedding"):
        dataclasses.replace(config, tie_embeddings=True, quantization=HEAD)
    with pytest.raises(ConfigError, match="kv_dtype 'int8'"):
        dataclasses.replace(config, kv_dtype="int8")
    with pytest.raises(ConfigError, match="experts in float16: expected dtype bfloat16"):
        dataclasses.replace(WITH_EXPERTS, dtype="float16")
    with pytest.raises(ConfigError, match="quantised weights in float16"):
        dataclasses.replace(config, dtype="float16", moe=None)


HEAD = Quantization(head="fp8")


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["fp8", "int8", "int4,head=int8", "experts=int4,attention=fp8,skipped_layers=0"]
)
def test_a_quantised_target_is_what_its_config_declares(with_experts, text):
    quantization = Quantization.parse(text.split(",head")[0])
    if "head" in text:
        quantization = dataclasses.replace(quantization, head="int8")
    target = quantize(with_experts, quantization)
    declared = jax.tree.map(lambda x: (x.shape, x.dtype), unboxed(abstract_params(target.config)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), target.params) == declared
    skipped = target.params["layers_0"]["attention"]["q"]["kernel"].dtype
    assert (skipped == jnp.float32) == ("skipped" in text)
    assert quantize(target, quantization) is target
    with pytest.raises(ConfigError, match="stored as Quantization.*expected no quantization, or"):
        quantize(target, "head=fp8")
    assert target.pack().packed == ("skipped" in text)  # kernels that are whole, and no others


def unboxed(boxed):
    return jax.tree.map(lambda x: x.unbox(), boxed, is_leaf=lambda x: hasattr(x, "unbox"))


@pytest.mark.parametrize("scheme", sorted(DTYPES))
def test_products_are_those_of_the_stored_numbers(with_experts, scheme):
    quantization = Quantization(scheme, scheme, scheme, scheme, group_size=32)
    target = quantize(with_experts, quantization)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 12))
    logits = target.logits(tokens)
    assert distance(logits, dequantized(target).logits(tokens)) < 1e-5
    error = distance(logits, with_experts.logits(tokens))
    assert 1e-3 < error < {"fp8": 0.1, "int8": 0.02, "int4": 0.3}[scheme]


def test_the_backend_chooses_what_multiplies():
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 3, D), (D, F)))
    stored = quantize_kernel(kernel, "int4", 32)
    run = jax.jit(quantized_matmul, static_argnums=(3, 4))
    kernels = Backend(matmul="triton", interpret=True)
    found = run(x, *stored, ("embed", "mlp"), kernels)
    assert distance(found, run(x, *stored, ("embed", "mlp"), Backend())) < 1e-6
    with pytest.raises(ValueError, match="no implementation 'other'"):
        run(x, *stored, ("embed", "mlp"), Backend(matmul="other"))


def test_random_parameters_give_logits_of_a_sane_size():
    quantization = Quantization.parse("experts=int4,mlp=int8,attention=fp8")
    config = dataclasses.replace(WITH_EXPERTS, quantization=quantization)
    logits = Target(init_params(config, jax.random.key(0)), config).logits([[1, 2, 3]])
    assert 0.3 < float(jnp.std(logits)) < 3


# ---- generation ----------------------------------------------------------------------------------

MIXED = "mlp=int4,attention=fp8,head=int8"


@pytest.mark.parametrize(
    "quantization, kv_dtype, tree",
    [(MIXED, "float8_e4m3fn", "paths:[[0],[1],[0,0],[0,1]]"),
     pytest.param(MIXED, "float8_e4m3fn", "chain:2", marks=pytest.mark.slow),
     pytest.param("fp8", None, "chain:2", marks=pytest.mark.slow),
     pytest.param("int8", None, "chain:2", marks=pytest.mark.slow),
     pytest.param("int4", None, "chain:2", marks=pytest.mark.slow)],
)  # fmt: skip
def test_speculation_changes_no_text(make_target, make_draft, quantization, kv_dtype, tree):
    sizes = {"num_layers": 1, "kv_dtype": kv_dtype}
    target = quantize(make_target(**sizes), quantization)
    draft = quantize(make_draft(vocab=(0, 2, 3, 5), **sizes), "mlp=int4")
    prompts, sampling = [[1, 2, 3, 4, 5], [2]], [SamplingParams(), SamplingParams(1.0, seed=3)]
    options = {"max_new_tokens": 12, "sampling": sampling, "stop_token_ids": []}
    plain = generate(target, None, prompts, **options)
    speculated = generate(target, draft, prompts, tree=tree, **options)
    assert speculated.tokens == plain.tokens
    assert speculated.acceptance_length > 1


@pytest.mark.parametrize("rounded", [True, False])
def test_what_a_tree_attends_to_is_what_pages_hold(make_target, monkeypatch, rounded):
    """A text in one piece, and its last tokens behind pages that hold the first ones."""
    target = make_target(num_layers=1, kv_dtype="float8_e4m3fn")
    if not rounded:
        monkeypatch.setattr("jax_eagle.attention.as_cached", lambda x, dtype: x)
    tokens = jnp.asarray([[0, 1, 2, 3, 4, 5, 1, 3]], jnp.int32)
    table = jnp.asarray([[1, 2]], jnp.int32)
    pages = init_cache(target.config, table, num_pages=3, page_size=8)
    assert pages.k_pages.dtype == jnp.float8_e4m3fn

    @jax.jit
    def both(target, tokens, pages):
        new_kv = target(tokens[:, :6], chain_tree(1, 6), pages).new_kv
        row_BA = jnp.arange(6, dtype=jnp.int32)[None]
        behind = commit(pages, new_kv, row_BA, jnp.full(1, 6, jnp.int32))
        whole = target(tokens, chain_tree(1, 8), None)
        return target(tokens[:, 6:], chain_tree(1, 2), behind).x, whole.x[:, 6:]

    assert (distance(*both(target, tokens, pages)) < 1e-5) == rounded


# ---- files ---------------------------------------------------------------------------------------


def assert_same(found, expected):
    assert found.config == expected.config
    paths = [jax.tree_util.tree_leaves_with_path(model.params) for model in (found, expected)]
    assert [path for path, _ in paths[0]] == [path for path, _ in paths[1]]
    for (path, a), (_, b) in zip(*paths, strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def test_weights_are_quantised_as_they_are_read(with_experts, make_draft, tmp_path):
    hf.save(with_experts, tmp_path / "target")
    target = load_target(tmp_path / "target", quantization="fp8", kv_dtype="fp8")
    cached = dataclasses.replace(target.config, kv_dtype=None)
    assert_same(target.replace(config=cached), quantize(with_experts, "fp8"))
    assert target.config.kv_dtype == "float8_e4m3fn"
    with pytest.raises(ConfigError, match="kv_dtype 'fp4': expected one of auto, fp8, fp8_e4m3"):
        load_target(tmp_path / "target", kv_dtype="fp4")

    config = DraftConfig.for_target(target.config)
    draft = make_draft(**{f.name: getattr(config.layer, f.name) for f in fields(config.layer)})
    eagle.save(draft, tmp_path / "draft")
    found = load_draft(tmp_path / "draft", target, quantization="mlp=int4")
    assert found.config.layer.kv_dtype == "float8_e4m3fn"
    assert_same(found, quantize(draft, Quantization(mlp="int4")))


def fields(config):
    return [f for f in dataclasses.fields(config) if f.name != "num_layers"]


def test_orbax_keeps_every_bit(with_experts, make_draft, tmp_path):
    target = quantize(with_experts, "experts=fp8,mlp=int4,attention=int8")
    orbax.save_target(target, tmp_path / "target")
    assert_same(load_target(tmp_path / "target"), target)
    same = load_target(tmp_path / "target", quantization=target.config.quantization)
    assert_same(same, target)
    with pytest.raises(ConfigError, match="stored as Quantization"):
        load_target(tmp_path / "target", quantization="fp8")
    orbax.save_target(with_experts, tmp_path / "whole")
    assert_same(
        load_target(tmp_path / "whole", quantization="int8"), quantize(with_experts, "int8")
    )
    draft = quantize(make_draft(), "mlp=int4")
    orbax.save_draft(draft, tmp_path / "draft")
    assert_same(orbax.load_draft(tmp_path / "draft", dtype="float32"), draft)


def test_files_without_a_place_for_scales_are_not_written(with_experts, make_draft, tmp_path):
    with pytest.raises(ConfigError, match="stored as float8_e4m3fn.*as an Orbax folder"):
        hf.save(quantize(with_experts, "fp8"), tmp_path / "target")
    with pytest.raises(ConfigError, match="stored as uint8.*as an Orbax folder"):
        eagle.save(quantize(make_draft(), "mlp=int4"), tmp_path / "draft")
    assert not list(tmp_path.iterdir())


# ---- meshes --------------------------------------------------------------------------------------


def test_two_devices_compute_what_one_does():
    for name, error in on_eight_devices(__file__).items():
        assert error < 1e-5, name


def compare(found: jax.Array, expected: jax.Array) -> bool:
    """Whether an array that equals the expected one lies on the devices in parts."""
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    return shard_size(found) < found.size


def shard_size(x: jax.Array) -> int:
    return x.addressable_shards[0].data.size


def gathers(kernel: jax.Array, name: str, target: Target) -> bool:
    """Whether quantising a stack of experts puts it together anywhere."""
    path = "layers_1", "moe", name
    form = target_forms(target.config)[path]
    placement = target_placement(target.config, target.backend)
    store = jax.jit(lambda kernel: form.store(path, kernel, placement))
    text = store.lower(kernel).compile().as_text()
    assert text is not None and "f8e4m3fn" in text
    return "all-gather" in text


def main() -> None:
    target = Target(init_params(WITH_EXPERTS, jax.random.key(0)), WITH_EXPERTS)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 12))
    mesh, errors = make_mesh(2), {}
    for text, expert_parallel in (
        ("experts=int4,mlp=fp8,attention=int4,head=int8,group_size=32", False),
        ("experts=fp8,mlp=int4,attention=fp8,group_size=32", True),
    ):
        whole = quantize(target, text)
        spread = whole.spread(mesh, expert_parallel=expert_parallel)
        errors[text] = distance(spread.logits(tokens), whole.logits(tokens))
    text = "experts=fp8,mlp=int8,attention=int4,group_size=32"
    early = target.spread(mesh)
    late, expected = quantize(early, text), quantize(target, text)
    leaves = jax.tree.leaves(jax.tree.map(compare, late.params, expected.params))
    assert 0.3 < sum(leaves) / len(leaves) < 1  # most are cut in two
    experts = late.params["layers_1"]["moe"]
    for name in ("gate_up", "down"):
        halved = shard_size(experts[name]) * 2 == experts[name].size
        assert halved and not gathers(early.params["layers_1"]["moe"][name], name, late)
    print(json.dumps(errors))


def test_groups_that_would_be_torn_apart_are_refused():
    mesh = jax.sharding.AbstractMesh((2,), ("tensor",))
    config = dataclasses.replace(WITH_EXPERTS, quantization=Quantization(attention="int4"))
    with pytest.raises(ConfigError, match="attention=int4: 64 inputs in 1 groups do not divide"):
        check_divides(config, mesh)
    smaller = Quantization(attention="int4", group_size=32)
    check_divides(dataclasses.replace(config, quantization=smaller), mesh)


if __name__ == "__main__":
    main()
