"""Llama 4 with experts: mistakes that the goldens would show, speculation, files, configurations.

The goldens have chunks of 16 positions, query factors that change every 8, and NoPE layers 3 and 7.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import Llama4Config, Llama4TextConfig

from jax_eagle import Target, attention, generate, load_target, moe
from jax_eagle.attention import Attention, View
from jax_eagle.cache import init_cache
from jax_eagle.checkpoint import hf, mapping
from jax_eagle.checkpoint.mapping import CheckpointError
from jax_eagle.config import ConfigError, DraftConfig, Llama4Attention, LlamaConfig, MoE
from jax_eagle.layers import rope_angles
from jax_eagle.sharding import Backend
from jax_eagle.tree import chain_tree
from tests.golden import GOLDENS, bound, check, golden
from train.teacher import Teacher

pytestmark = pytest.mark.usefixtures("quick_compiler")


def first_layers(target: Target, count: int) -> Target:
    """The target without the layers behind the first few."""
    dropped = {f"layers_{i}" for i in range(count, target.config.num_layers)}
    return target.replace(
        params={name: value for name, value in target.params.items() if name not in dropped},
        config=dataclasses.replace(target.config, num_layers=count),
    )


# ---- mistakes ------------------------------------------------------------------------------------
#
# Each breaks one thing of the case l4_s, and the gate of the parity tests has to notice.


def with_block(**changes):
    """The attention's config."""

    def broken(target, monkeypatch):
        own = dataclasses.replace(target.config.llama4, **changes)
        return target.replace(config=dataclasses.replace(target.config, llama4=own))

    return broken


def without_rope_scaling(target, monkeypatch):
    return target.replace(config=dataclasses.replace(target.config, rope_scaling=None))


def with_true_norm(target, monkeypatch):
    def by_sum(x, eps):
        return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps)

    monkeypatch.setattr(attention, "unit_rms", by_sum)
    return target


def with_pairs_apart(target, monkeypatch):
    monkeypatch.setattr(mapping, "_swap_pairs", lambda array, *shape: array)
    return target.replace(params=load_target(GOLDENS / "l4_s", dtype="float32").params)


def with_softmax_router(target, monkeypatch):
    def softmax(logits_TE, count):
        _, expert_TK = route(logits_TE, count)
        return jnp.take_along_axis(jax.nn.softmax(logits_TE, axis=1), expert_TK, axis=1), expert_TK

    route = moe.route
    monkeypatch.setattr(moe, "route", softmax)
    return target


def with_scaled_outputs(target, monkeypatch):
    def scaled(routed, *others):
        ones_T1 = jnp.ones_like(routed.weight_TK)
        return routed.weight_TK * run_experts(routed._replace(weight_TK=ones_T1), *others)

    run_experts = moe.run_experts
    monkeypatch.setattr(moe, "run_experts", scaled)
    return target


def with_experts(change):
    """The parameters of each MoE layer."""

    def broken(target, monkeypatch):
        params = dict(target.params)
        for i in target.config.moe.layers:
            layer = params[f"layers_{i}"]
            params[f"layers_{i}"] = layer | {"moe": layer["moe"] | change(layer["moe"])}
        return target.replace(params=params)

    return broken


def without_shared(experts):
    return {"shared": jax.tree.map(jnp.zeros_like, experts["shared"])}


def with_gate_and_up_swapped(experts):
    return {"gate_up": experts["gate_up"][:, :, ::-1]}


MISTAKES = {  # and the first position that shows it
    "no chunk mask": (with_block(chunk=None), 16),
    "rope on all layers": (with_block(nope_layers=()), 1),
    "no q/k norm": (with_block(qk_norm=False), 1),
    "true L2 norm": (with_true_norm, 1),
    "no temperature": (with_block(floor_scale=None), 7),
    "no rope scaling": (without_rope_scaling, 1),
    "rotary pairs apart": (with_pairs_apart, 1),
    "softmax router": (with_softmax_router, 0),
    "outputs scaled": (with_scaled_outputs, 0),
    "gate and up swapped": (with_experts(with_gate_and_up_swapped), 0),
    "no shared expert": (with_experts(without_shared), 0),
}
WIDTH = 24


def first_logits(target):
    """Of the first text of l4_s, op by op: a program a mistake would take long to compile."""
    tokens_1T = jnp.asarray(golden("l4_s")[1]["ids"][:1, :WIDTH])
    x_1TD = target(tokens_1T, chain_tree(1, WIDTH), cache=None).x
    return np.asarray(target.head(x_1TD))[0]


def test_without_a_mistake_the_gate_is_passed():
    target, expected = golden("l4_s")
    check(first_logits(target), expected["logits"][0, :WIDTH])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_gate_notices(mistake, monkeypatch):
    target, expected = golden("l4_s")
    breaks, first = MISTAKES[mistake]
    logits_TV = first_logits(breaks(target, monkeypatch))
    error_T = np.abs(logits_TV - expected["logits"][0, :WIDTH]).max(axis=1)
    gate = bound(expected["logits"])
    assert error_T.max() > 500 * gate
    assert np.argmax(error_T > gate) == first


# ---- pages of earlier chunks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend",
    [Backend(), Backend(attention="triton", interpret=True)],
    ids=["reference", "kernels"],
)
@pytest.mark.parametrize("length", [20, 31])
def test_chunked_layers_do_not_read_pages_before_the_chunk(length, backend):
    target, _ = golden("l4_s")
    config, M = target.config, 3
    rng = np.random.default_rng(length)
    table_1R = jnp.arange(1, 6, dtype=jnp.int32)[None]
    cache = init_cache(config, table_1R, num_pages=6, page_size=8)
    pages = jnp.asarray(rng.normal(size=cache.k_pages.shape), jnp.float32)
    cache = cache.replace(k_pages=pages, v_pages=pages[::-1], length=jnp.asarray([length]))
    spoilt = jax.tree.map(lambda pages: pages.at[old_pages(cache)].set(jnp.nan), pages_of(cache))
    x_1MD = rng.normal(size=(1, M, config.hidden_size)).astype(np.float32)
    for layer in (0, 3):
        params = target.params[f"layers_{layer}"]["attention"]
        clean_1MD, spoilt_1MD = (
            attend(config, layer, backend, params, x_1MD, cache.replace(**own))
            for own in (pages_of(cache), spoilt)
        )
        if config.uses_rope(layer):
            np.testing.assert_array_equal(clean_1MD, spoilt_1MD)
        else:  # reads everything
            assert np.isfinite(clean_1MD).all() and np.isnan(spoilt_1MD).all()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def attend(config, layer, backend, params, x_1MD, cache):
    """One layer's attention of a chain of nodes."""
    position_1M = cache.length[:, None] + jnp.arange(x_1MD.shape[1], dtype=jnp.int32)[None]
    view, rope = View(position_1M, cache=cache), rope_angles(config, position_1M)
    return Attention(config, layer, backend).apply({"params": params}, x_1MD, rope, view)[0]


def pages_of(cache):
    return {"k_pages": cache.k_pages, "v_pages": cache.v_pages}


def old_pages(cache):
    """Rows of the pool, of every layer, that hold positions 0 to 15."""
    first = jnp.arange(cache.num_layers)[:, None] * cache.pages_per_layer
    return jnp.ravel(first + cache.page_table[:, :2])


# ---- speculation ---------------------------------------------------------------------------------


def test_speculation_changes_no_token(make_target, make_draft, small_pages):
    """Across chunks of 8 positions and query factors that change every 4; six tokens, so that a
    random draft is sometimes right."""
    own = Llama4Attention(nope_layers=(1,), chunk=8, floor_scale=4)
    target = make_target(seed=5, llama4=own, moe=MoE(4, 1, (1,), 48), max_position=64)
    draft = make_draft(vocab=(0, 2, 3, 5), llama4=own, max_position=64)
    prompts, options = [[3, 1, 4, 1, 5], [2, 0, 5]], {"max_new_tokens": 29, "stop_token_ids": []}
    plain = generate(target, None, prompts, **options)
    tree = generate(target, draft, prompts, tree="paths:[[0],[1],[0,0],[1,0]]", **options)
    assert tree.tokens == plain.tokens
    assert all(len(set(tokens)) > 2 for tokens in plain.tokens) and sum(tree.rounds) < 50


@pytest.mark.slow  # large programs
def test_the_target_drafting_for_itself_is_always_right(make_oracle, small_pages):
    target, expected = golden("l4_m")
    prompts = [ids[:length].tolist() for ids, length in zip(expected["ids"], (13, 10), strict=True)]
    options = {"max_new_tokens": 22, "stop_token_ids": []}
    plain = generate(target, None, prompts, **options)
    layer = dataclasses.replace(target.config, moe=None)
    oracle = make_oracle().replace(config=DraftConfig(layer, feature_width=layer.hidden_size))
    chain = generate(target, oracle, prompts, tree="chain:2", **options)
    assert chain.tokens == plain.tokens and chain.rounds == [7, 7]  # the first one, then three each


def test_a_teacher_with_experts_is_refused():
    with pytest.raises(ConfigError, match=r"MoE layers \[1, 3, 5, 7\]: expected a dense one"):
        Teacher.of(golden("l4_m")[0])


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Target:
    """A dense layer and one with experts."""
    return first_layers(golden("l4_m")[0], 2)


DENSE, SPARSE = "model.layers.0.feed_forward.", "model.layers.1.feed_forward."
EXPERTS = {
    SPARSE + "router.weight": (8, 80),
    SPARSE + "experts.gate_up_proj": (8, 80, 192),
    SPARSE + "experts.down_proj": (8, 96, 80),
    SPARSE + "shared_expert.gate_proj.weight": (96, 80),
    SPARSE + "shared_expert.up_proj.weight": (96, 80),
    SPARSE + "shared_expert.down_proj.weight": (80, 96),
}


def assert_same(given: Target, expected: Target) -> None:
    assert given.config == expected.config
    assert jax.tree.structure(given.params) == jax.tree.structure(expected.params)
    jax.tree.map(np.testing.assert_array_equal, given.params, expected.params)


def test_a_folder_is_read_back_bit_equal_with_experts_stacked(small, tmp_path):
    hf.save(small, tmp_path)
    assert_same(load_target(tmp_path, dtype="float32"), small)
    tensors = load_file(tmp_path / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name.startswith(SPARSE)}
    assert shapes == EXPERTS
    assert tensors[DENSE + "gate_proj.weight"].shape == (192, 80)
    gate_up = np.asarray(small.params["layers_1"]["moe"]["gate_up"])
    np.testing.assert_array_equal(
        tensors[SPARSE + "experts.gate_up_proj"],
        np.concatenate([gate_up[:, :, 0], gate_up[:, :, 1]], axis=2),
    )


def write_multimodal(target: Target, folder: Path, *, split: bool) -> dict[str, np.ndarray]:
    """A folder as Llama4ForConditionalGeneration has it; `split`: each expert by itself."""
    hf.save(target, folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = f"language_model.{name}"
        if split and name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(np.split(own, 2, axis=1) for own in tensor):
                tensors[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate.T.copy()
                tensors[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up.T.copy()
        elif split and name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                tensors[name.replace("down_proj", f"{e}.down_proj.weight")] = down.T.copy()
        else:
            tensors[name] = tensor
    tensors["vision_model.class_embedding"] = np.zeros(3, np.float32)
    tensors["multi_modal_projector.linear_1.weight"] = np.zeros((3, 2), np.float32)
    write(tensors, folder)
    text = json.loads((folder / "config.json").read_text())
    del text["architectures"]
    fields = {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
        "text_config": text, "vision_config": {"model_type": "llama4_vision_model"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    return tensors


def write(tensors: dict[str, np.ndarray], folder: Path) -> None:
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("split", [False, True], ids=["stacked", "each by itself"])
def test_multimodal_folders_are_read(small, split, tmp_path):
    tensors = write_multimodal(small, tmp_path, split=split)
    prefix = f"language_model.{SPARSE}experts."
    assert (f"{prefix}7.up_proj.weight" in tensors) == split
    assert_same(load_target(tmp_path, dtype="float32"), small)


def one_line(message: str):
    return pytest.raises(CheckpointError, match=rf"\A[^\n]*{message}[^\n]*\Z")


def test_an_expert_that_is_missing_or_of_another_shape_is_named(small, tmp_path):
    tensors = write_multimodal(small, tmp_path, split=True)
    name = f"language_model.{SPARSE}experts.5.down_proj.weight"
    write(tensors | {name: tensors[name].T.copy()}, tmp_path)
    with one_line(re.escape(f"tensor {name} has shape [96, 80], expected [80, 96]")):
        load_target(tmp_path)
    write({k: v for k, v in tensors.items() if k != name}, tmp_path)
    with one_line(re.escape(f"tensor {name} is missing")):
        load_target(tmp_path)
    spare = name.replace(".5.", ".8.")
    write(tensors | {spare: tensors[name]}, tmp_path)
    with one_line(re.escape(f"tensor {spare} is not expected")):
        load_target(tmp_path)


def test_what_is_missing_is_named(small, tmp_path):
    hf.save(small, tmp_path, max_shard_bytes=500_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    hidden = shards[1].rename(tmp_path / "hidden")
    with one_line(f"{shards[1].name}: no such file"):
        load_target(tmp_path)
    hidden.rename(shards[1])
    index = json.loads((tmp_path / hf.INDEX).read_text())
    name = SPARSE + "experts.gate_up_proj"
    shard = tmp_path / index["weight_map"][name]
    tensors = load_file(shard)
    save_file({k: v for k, v in tensors.items() if k != name}, shard)
    with one_line(re.escape(f"tensor {name} is missing")):
        load_target(tmp_path)
    save_file(tensors | {name: tensors[name][:7]}, shard)
    with one_line(re.escape(f"tensor {name} has shape [7, 80, 192], expected [8, 80, 192]")):
        load_target(tmp_path)


# ---- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["l4_s", "l4_s2", "l4_m"])
def test_the_form_of_hugging_face_is_read_back_equal(case):
    config = golden(case)[0].config
    fields = config.to_hf()
    assert LlamaConfig.from_hf(fields) == config
    theirs = Llama4TextConfig(**fields)
    assert LlamaConfig.from_hf(theirs.to_dict()) == config
    whole = Llama4Config(text_config=theirs, architectures=["Llama4ForConditionalGeneration"])
    assert LlamaConfig.from_hf(whole.to_dict()) == config


def test_old_and_new_forms_are_read_alike():
    old = json.loads((GOLDENS / "l4_s" / "config.json").read_text())
    assert old["attn_temperature_tuning"] == 4 and old["no_rope_layers"] == []
    assert "rope_scaling" in old and "moe_layers" not in old
    new = json.loads((GOLDENS / "l4_s2" / "config.json").read_text())
    assert new["attn_temperature_tuning"] is True and "rope_parameters" in new
    given, other = LlamaConfig.from_hf(old), LlamaConfig.from_hf(new)
    assert dataclasses.replace(given, rope_scaling=other.rope_scaling) == other
    assert given.moe == MoE(4, 1, tuple(range(8)), 96) and given.intermediate_size == 192


@pytest.mark.parametrize(
    "change, layers",
    [({"moe_layers": [5, 2]}, (2, 5)), ({"moe_layers": [0]}, (0,)), ({"moe_layers": []}, None),
     ({"moe_layers": None, "interleave_moe_layer_step": 3}, (2, 5)),
     ({"moe_layers": None, "interleave_moe_layer_step": 0}, None)],
    ids=str,
)  # fmt: skip
def test_layers_with_experts(change, layers):
    config = LlamaConfig.from_hf(golden("l4_m")[0].config.to_hf() | change)
    assert (config.moe and config.moe.layers) == layers
    assert [i for i in range(8) if config.uses_experts(i)] == list(layers or ())
    assert LlamaConfig.from_hf(config.to_hf()) == config


def test_fewer_layers_keep_their_kind():
    config = golden("l4_m")[0].config
    assert dataclasses.replace(config, num_layers=4).moe.layers == (1, 3)
    assert dataclasses.replace(config, num_layers=1).moe is None


def test_drafts_are_dense():
    config = golden("l4_s")[0].config
    for draft in (
        DraftConfig.for_target(config, num_layers=3),
        DraftConfig.eagle3_for_target(config, draft_vocab_size=64),
    ):
        assert draft.layer.moe is None and draft.layer.intermediate_size == 192
        assert DraftConfig.from_dict(draft.to_dict()) == draft
    with pytest.raises(ConfigError, match="draft with MoE layers"):
        DraftConfig(layer=config, feature_width=config.hidden_size)


@pytest.mark.parametrize(
    "change, message",
    [({"moe_layers": [1, 8]}, r"moe_layers \[1, 8\]: expected layers in 0..7"),
     ({"num_experts_per_tok": 9}, "9 experts per token: expected 1 to 8"),
     ({"num_experts_per_tok": 0}, "0 experts per token: expected 1 to 8"),
     ({"model_type": "llama4"}, "model type llama4 lacks the field 'text_config'")],
)  # fmt: skip
def test_what_cannot_be_run_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_hf(golden("l4_m")[0].config.to_hf() | change)


def test_only_llama4_has_experts():
    with pytest.raises(ConfigError, match="MoE layers without `llama4`"):
        dataclasses.replace(golden("l4_m")[0].config, llama4=None)
