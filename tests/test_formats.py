"""Draft folders of other programs: exact names and shapes, bit-equal round trips, same numbers.

The tables of names and shapes and the forward passes in numpy are written from what the formats
say, not from our mapping.
"""

import dataclasses
import functools
import io
import json
import pickle
import re
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from flax import traverse_util

from jax_eagle import Draft, Target, load_draft
from jax_eagle.attention import View
from jax_eagle.checkpoint import CheckpointError, eagle, orbax, profiles
from jax_eagle.checkpoint.mapping import draft_entries
from jax_eagle.config import ConfigError, DraftConfig, Llama4Attention, LlamaConfig, RopeScaling
from jax_eagle.eagle import init_draft_params
from jax_eagle.llama import init_params
from tests.conftest import random_params
from tests.test_checkpoint import assert_same, rewrite, rewrite_json
from train import export

D, V, L = 32, 48, 6
LLAMA = LlamaConfig(
    vocab_size=V, hidden_size=D, intermediate_size=56, num_layers=L, num_heads=4, num_kv_heads=2,
    head_dim=10, rope_theta=500000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
    max_position=4096, stop_token_ids=(1, 5),
)  # fmt: skip
LLAMA4 = dataclasses.replace(LLAMA, llama4=Llama4Attention(nope_layers=(3,)))
IDS = (0, 2, 3, 11, 12, 30, 47)
CUT: dict[str, Any] = {"draft_vocab_size": len(IDS)}
DRAFTS = {
    "eagle": (LLAMA, {"output_norm": False, "num_layers": 2}),
    "eagle-fc-bias": (LLAMA, {"output_norm": False, "fc_bias": True}),
    "llama4": (LLAMA4, {"input_norm": True, "num_layers": 2}),
    "llama4-own-head": (LLAMA4, {"input_norm": True, "own_head": True}),
    "eagle3": (LLAMA, {"num_layers": 2, **CUT}),
    "eagle3-joint": (LLAMA, {"feature_norm": "joint", "output_norm": True}),
    "eagle3-each": (LLAMA, {"feature_norm": "each", "norm_before_residual": True, **CUT}),
    "eagle3-target-head": (LLAMA, {"own_head": False}),
    "eagle3-own-width": (LLAMA, {"own_embedding": True, "width": 16, **CUT}),
}
WRITES = [
    ("eagle-llama-vllm", "eagle"),
    ("eagle-llama-sglang", "eagle"),
    ("eagle-llama-sglang", "eagle-fc-bias"),
    ("eagle-llama4", "llama4"),
    ("eagle-llama4", "llama4-own-head"),
    *(("eagle3", name) for name in DRAFTS if name.startswith("eagle3")),
    *(("speculators", name) for name in DRAFTS if name.startswith("eagle3")),
]
EACH = pytest.mark.parametrize(("profile", "name"), WRITES)


@functools.cache
def make_target(config=LLAMA) -> Target:
    return Target(random_params(init_params, config, 1), config)


@functools.cache
def make_draft(name: str, *, dtype: str = "float32", **changes: Any) -> Draft:
    """A random draft of one of the kinds, for the target of that kind."""
    target, options = DRAFTS[name]
    target, options = dataclasses.replace(target, dtype=dtype), options | changes
    width = options.pop("width", D)
    if name.startswith("eagle3"):
        config = DraftConfig.eagle3_for_target(target, taps=(1, 3, 4), **options)
    else:
        config = DraftConfig.for_target(target, **options)
    layer = dataclasses.replace(config.layer, hidden_size=width)
    config = dataclasses.replace(config, layer=layer)
    ids = jnp.asarray(IDS, jnp.int32) if config.draft_vocab_size else None
    return Draft(random_params(init_draft_params, config, 2), ids, config)


def save(draft: Draft, folder, profile: str, **options) -> None:
    profiles.save(draft, folder, profile, verifier="name/of-target", **options)


def read(folder) -> tuple[dict, dict[str, np.ndarray]]:
    config = json.loads((folder / "config.json").read_text())
    return config, safetensors.numpy.load_file(folder / "model.safetensors")


def one_line(error: type[Exception], match: str):
    return pytest.raises(error, match=rf"\A[^\n]*{match}[^\n]*\Z")


# ---- names and shapes --------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAFTS)
def test_mapping_has_each_parameter_of_the_network_once(name):
    config = make_draft(name).config
    shapes = jax.eval_shape(lambda: init_draft_params(config, jax.random.key(0)))
    expected = jax.tree.map(lambda x: x.shape, traverse_util.flatten_dict(shapes))
    entries = draft_entries(config)
    assert {entry.path: entry.shape for entry in entries} == expected
    assert len({entry.name for entry in entries}) == len(entries)


def layer_table(prefix: str, mlp: str = "mlp", width: int = 32) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.self_attn.q_proj.weight": (40, width),
        f"{prefix}.self_attn.k_proj.weight": (20, width),
        f"{prefix}.self_attn.v_proj.weight": (20, width),
        f"{prefix}.self_attn.o_proj.weight": (32, 40),
        f"{prefix}.{mlp}.gate_proj.weight": (56, 32),
        f"{prefix}.{mlp}.up_proj.weight": (56, 32),
        f"{prefix}.{mlp}.down_proj.weight": (32, 56),
        f"{prefix}.post_attention_layernorm.weight": (32,),
    }


EAGLE_LLAMA = {
    "fc.weight": (32, 64),
    **layer_table("layers.0"),
    **layer_table("layers.1"),
    "layers.1.input_layernorm.weight": (32,),
}
EAGLE_LLAMA4 = {
    "fc.weight": (32, 64),
    **layer_table("layers.0", "feed_forward"),
    **layer_table("layers.1", "feed_forward"),
    "layers.0.input_layernorm.weight": (32,),
    "layers.1.input_layernorm.weight": (32,),
    "norm.weight": (32,),
}


def eagle3_table(first: str) -> dict[str, tuple[int, ...]]:
    return {
        "fc.weight": (32, 96),
        **layer_table(first, width=64),
        f"{first}.input_layernorm.weight": (32,),
        f"{first}.hidden_norm.weight": (32,),
        **layer_table("layers.1"),
        "layers.1.input_layernorm.weight": (32,),
        "norm.weight": (32,),
        "lm_head.weight": (7, 32),
        "d2t": (7,),
        "t2d": (48,),
    }


TABLES = {
    "eagle-llama-vllm": ("eagle", {}, EAGLE_LLAMA),
    "eagle-llama-sglang": ("eagle", {}, EAGLE_LLAMA | {"fc.bias": (32,)}),
    "eagle-llama4": ("llama4", {}, EAGLE_LLAMA4),
    "eagle3": ("eagle3", {}, eagle3_table("midlayer")),
    "eagle3-layers": ("eagle3", {"first_layer": "layers.0"}, eagle3_table("layers.0")),
    "speculators": ("eagle3", {}, eagle3_table("layers.0")),
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_names_shapes_and_dtypes(tmp_path, case, dtype):
    name, options, table = TABLES[case]
    save(make_draft(name, dtype=dtype), tmp_path, case.removesuffix("-layers"), **options)
    _, tensors = read(tmp_path)
    assert {name: array.shape for name, array in tensors.items()} == table
    dtypes = {name: array.dtype.name for name, array in tensors.items()}
    assert dtypes == dict.fromkeys(table, dtype) | (
        {"d2t": "int64", "t2d": "bool"} if "d2t" in table else {}
    )


def test_options_of_eagle3_have_tensors_and_fields(tmp_path):
    for name, extra, expected in (
        ("eagle3-joint", {"input_norm.weight": (96,)}, {"norm_before_fc": True}),
        ("eagle3-each", {f"fc_norm.{i}.weight": (32,) for i in range(3)}, {"fc_norm": True}),
        ("eagle3-own-width", {"embed_tokens.weight": (48, 16)}, {"target_hidden_size": 32}),
    ):
        save(make_draft(name), tmp_path, "eagle3")
        fields, tensors = read(tmp_path)
        assert extra.items() <= {name: array.shape for name, array in tensors.items()}.items()
        assert expected.items() <= fields.items()


def test_vocabulary_maps(tmp_path):
    save(make_draft("eagle3"), tmp_path, "eagle3")
    _, tensors = read(tmp_path)
    np.testing.assert_array_equal(tensors["d2t"], [0, 1, 1, 8, 8, 25, 41])
    np.testing.assert_array_equal(np.flatnonzero(tensors["t2d"]), IDS)


# ---- config.json -------------------------------------------------------------------------------


def test_fields_of_eagle_llama(tmp_path):
    target = make_target(dataclasses.replace(LLAMA, max_position=8192))
    draft = make_draft("eagle")
    architectures = {"vllm": "LlamaForCausalLM", "sglang": "LlamaForCausalLMEagle"}
    for engine, architecture in architectures.items():
        save(draft, tmp_path, f"eagle-llama-{engine}", target=target)
        fields, _ = read(tmp_path)
        assert fields == {
            "architectures": [architecture],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": 48,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bias": False,
            "max_position_embeddings": 8192,
            "eos_token_id": [1, 5],
            "torch_dtype": "float32",
            "rope_theta": 500000.0,
            "rope_scaling": SCALING,
            "rope_parameters": SCALING | {"rope_theta": 500000.0},
        }


SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def test_fields_of_eagle3(tmp_path):
    save(make_draft("eagle3"), tmp_path, "eagle3")
    fields, _ = read(tmp_path)
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "vocab_size": 48,
        "draft_vocab_size": 7,
        "num_aux_hidden_states": 3,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [0, 2, 3],
        },
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "rope_theta": 500000.0,
    }
    assert expected.items() <= {k: v for k, v in fields.items() if k in expected}.items()
    # The official code would look for an embedding in the draft's own file.
    assert "target_hidden_size" not in fields
    save(make_draft("eagle3-joint"), tmp_path, "eagle3")
    fields, tensors = read(tmp_path)
    assert fields["draft_vocab_size"] == 48 and not {"d2t", "t2d"} & set(tensors)


def test_fields_of_speculators(tmp_path):
    save(make_draft("eagle3-each"), tmp_path, "speculators")
    fields, _ = read(tmp_path)
    assert fields["architectures"] == ["Eagle3Speculator"]
    assert fields["speculators_model_type"] == "eagle3" and fields["norm_before_residual"] is True
    assert fields["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert (fields["draft_vocab_size"], fields["target_hidden_size"]) == (7, 32)
    assert fields["speculators_config"]["verifier"]["name_or_path"] == "name/of-target"
    assert fields["transformer_layer_config"]["intermediate_size"] == 56


def test_fields_of_eagle_llama4(tmp_path):
    save(make_draft("llama4"), tmp_path, "eagle-llama4")
    fields, _ = read(tmp_path)
    assert fields["model_type"] == "llama4_text" and fields["moe_layers"] == []
    assert fields["no_rope_layers"] == [1, 1] and fields["intermediate_size_mlp"] == 56
    assert fields["attention_chunk_size"] == 8192 and fields["use_qk_norm"] is True


@pytest.mark.parametrize(("profile", "name"), [("eagle3", "eagle3"), ("eagle-llama4", "llama4")])
def test_transformers_reads_the_same_rope(tmp_path, profile, name):
    save(make_draft(name), tmp_path, profile)
    fields, _ = read(tmp_path)
    rope = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert rope == SCALING | {"rope_theta": 500000.0} and fields["rope_scaling"] == SCALING


@EACH
@pytest.mark.parametrize("form", ["old", "new"])
def test_either_form_of_rope_is_enough(tmp_path, profile, name, form):
    draft = make_draft(name)
    save(draft, tmp_path, profile)

    def keep(fields):
        fields = fields.get("transformer_layer_config", fields)
        for key in ("rope_parameters",) if form == "old" else ("rope_theta", "rope_scaling"):
            del fields[key]

    rewrite_json(tmp_path / "config.json", keep)
    assert eagle.load(tmp_path, dtype="float32").config.layer.rope_scaling == LLAMA.rope_scaling
    assert eagle.load(tmp_path, dtype="float32").config.layer.rope_theta == 500000.0


# ---- round trips -------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tmp_path, profile, name, dtype):
    draft = make_draft(name, dtype=dtype)
    save(draft, tmp_path, profile)
    target = make_target(dataclasses.replace(DRAFTS[name][0], dtype=dtype))
    assert_same(load_draft(tmp_path, target), draft)


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("write", [eagle.save, orbax.save_draft], ids=["own", "orbax"])
def test_round_trip_of_our_own_forms(tmp_path, name, write):
    draft = make_draft(name)
    write(draft, tmp_path)
    assert_same(load_draft(tmp_path, make_target(DRAFTS[name][0])), draft)


def test_vocabulary_of_eagle_goes_beside_the_folder_or_is_left_out(tmp_path):
    draft = make_draft("eagle", **CUT)
    whole = draft.replace(
        draft_to_target=None, config=dataclasses.replace(draft.config, draft_vocab_size=None)
    )
    for engine in ("vllm", "sglang"):
        save(draft, tmp_path / engine, f"eagle-llama-{engine}")
        assert_same(load_draft(tmp_path / engine, make_target()), whole)
    assert not (tmp_path / "vllm" / "hot_token_id.pt").exists()
    # What torch.load reads: a zip of stored records under one folder, with the pickle in data.pkl.
    with zipfile.ZipFile(io.BytesIO((tmp_path / "sglang/hot_token_id.pt").read_bytes())) as file:
        assert file.read("hot_token_id/version") == b"3\n"
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
        assert pickle.loads(file.read("hot_token_id/data.pkl")) == list(IDS)


def test_embedding(tmp_path):
    """Stored on request; read back as what it is, the target's own."""
    target = make_target()
    for profile, name in (("eagle-llama-vllm", "eagle"), ("eagle3", "eagle3")):
        draft = make_draft(name)
        save(draft, tmp_path, profile, target=target, with_embedding=True)
        fields, tensors = read(tmp_path)
        np.testing.assert_array_equal(
            tensors["embed_tokens.weight"], target.params["embed"]["embedding"]
        )
        assert_same(load_draft(tmp_path, target), draft)
    assert fields["target_hidden_size"] == 32  # the official code reads the embedding from the file
    other = target.replace(params=random_params(init_params, LLAMA, 9))
    assert load_draft(tmp_path, other).config.own_embedding
    with one_line(ConfigError, "which target"):
        save(make_draft("eagle3"), tmp_path, "eagle3", with_embedding=True)
    with one_line(ConfigError, "no place in a draft with an embedding of its own"):
        save(make_draft("eagle3-own-width"), tmp_path, "eagle3", target=target, with_embedding=True)


def test_old_form_of_vllm(tmp_path):
    draft = make_draft("eagle")
    save(draft, tmp_path, "eagle-llama-vllm")
    fields, _ = read(tmp_path)
    nested = {"model_type": "eagle", "eagle_fc_bias": False, "model": fields}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert_same(load_draft(tmp_path, make_target()), draft)


# ---- numbers -----------------------------------------------------------------------------------


class Reference:
    """A draft in numpy and float64, from the tensors and fields of an official folder."""

    def __init__(self, fields, tensors):
        self.fields = fields.get("transformer_layer_config", {}) | fields
        self.tensors = {
            name.replace("layers.0.", "midlayer."): array.astype(np.float64)
            for name, array in tensors.items()
        }

    def weight(self, name):
        return self.tensors[f"{name}.weight"]

    def rms(self, x, name=None):
        x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + self.fields["rms_norm_eps"])
        return x if name is None else x * self.weight(name)

    def rope(self, x_TNH):
        T, _, H = x_TNH.shape
        angle = np.arange(T)[:, None] * self.fields["rope_theta"] ** (-np.arange(0, H, 2) / H)
        turn_T1C = np.exp(1j * angle)[:, None]
        if self.is_llama4:  # pairs side by side
            pairs = x_TNH[..., 0::2] + 1j * x_TNH[..., 1::2]
            turned = pairs * turn_T1C
            return np.stack([turned.real, turned.imag], -1).reshape(x_TNH.shape)
        turned = (x_TNH[..., : H // 2] + 1j * x_TNH[..., H // 2 :]) * turn_T1C
        return np.concatenate([turned.real, turned.imag], -1)

    @property
    def is_llama4(self):
        return self.fields["model_type"] == "llama4_text"

    def attention(self, x_TD, prefix):
        T, H = len(x_TD), self.fields["head_dim"]
        q, k, v = (
            (x_TD @ self.weight(f"{prefix}.self_attn.{n}_proj").T).reshape(T, -1, H) for n in "qkv"
        )
        q, k = self.rope(q), self.rope(k)
        if self.is_llama4:
            q, k = self.rms(q), self.rms(k)
        group = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H)
        scores = np.exp(np.where(np.tril(np.ones((T, T))), scores, -np.inf))
        probs = scores / scores.sum(-1, keepdims=True)
        out = np.einsum("nts,snh->tnh", probs, v).reshape(T, -1)
        return out @ self.weight(f"{prefix}.self_attn.o_proj").T

    def mlp(self, x, prefix):
        prefix += ".feed_forward" if self.is_llama4 else ".mlp"
        gate = x @ self.weight(f"{prefix}.gate_proj").T
        up = x @ self.weight(f"{prefix}.up_proj").T
        return gate / (1 + np.exp(-gate)) * up @ self.weight(f"{prefix}.down_proj").T

    def layer(self, x, h, prefix):
        x = x + self.attention(h, prefix)
        return x + self.mlp(self.rms(x, f"{prefix}.post_attention_layernorm"), prefix)

    def layers(self, x, first):
        for i in range(first, self.fields["num_hidden_layers"]):
            prefix = f"layers.{i}" if i else "midlayer"
            norm = f"{prefix}.input_layernorm"
            h = self.rms(x, norm) if f"{norm}.weight" in self.tensors else x
            x = self.layer(x, h, prefix)
        return x

    def eagle(self, embeds, features):
        """(next features, what the head takes) of EAGLE with Llama or Llama 4 layers."""
        x = np.concatenate([embeds, features], -1) @ self.weight("fc").T
        x = self.layers(x + self.tensors.get("fc.bias", 0.0), 0)
        x = self.rms(x, "norm") if self.is_llama4 else x
        return x, x

    def eagle3(self, embeds, features):
        """(next states, what the head takes) of EAGLE-3."""
        if self.fields.get("norm_before_fc"):
            features = self.rms(features, "input_norm")
        if self.fields.get("fc_norm"):
            parts = np.split(features, 3, -1)
            normed = [self.rms(part, f"fc_norm.{i}") for i, part in enumerate(parts)]
            features = np.concatenate(normed, -1)
        x = features @ self.weight("fc").T
        h = self.rms(x, "midlayer.hidden_norm")
        pair = np.concatenate([self.rms(embeds, "midlayer.input_layernorm"), h], -1)
        x = self.layer(h if self.fields["norm_before_residual"] else x, pair, "midlayer")
        x = self.layers(x, 1)
        normed = self.rms(x, "norm")
        return normed if self.fields["norm_output"] else x, normed


@pytest.mark.parametrize(("profile", "name"), [pair for pair in WRITES if pair[0] != "speculators"])
def test_numbers_of_a_folder(tmp_path, profile, name):
    """The draft that we run is the one that the format's readers would run."""
    T = 5
    config = dataclasses.replace(DRAFTS[name][0], rope_scaling=None)
    target, draft = make_target(config), make_draft(name)
    layer = dataclasses.replace(draft.config.layer, rope_scaling=None)
    draft = draft.replace(config=dataclasses.replace(draft.config, layer=layer))
    save(draft, tmp_path, profile)
    rng = np.random.default_rng(0)
    tokens_1T = jnp.asarray(rng.integers(0, V, (1, T)), jnp.int32)
    features_1TF = jnp.asarray(rng.standard_normal((1, T, draft.config.feature_width)), jnp.float32)
    position = jnp.arange(T, dtype=jnp.int32)[None]

    @jax.jit
    def run(draft, target, tokens_1T, features_1TF):
        state, _ = draft(target, tokens_1T, features_1TF, View(position=position))
        return state[0], draft.bind_head(target)(state)[0]

    given = run(load_draft(tmp_path, target), target, tokens_1T, features_1TF)
    reference = Reference(*read(tmp_path))
    embedding_VD = reference.tensors.get(
        "embed_tokens.weight", np.asarray(target.params["embed"]["embedding"], np.float64)
    )
    pass_ = reference.eagle3 if draft.config.is_eagle3 else reference.eagle
    state, x = pass_(embedding_VD[tokens_1T[0]], np.asarray(features_1TF[0], np.float64))
    head_DV = np.asarray(target.params["lm_head"]["kernel"], np.float64)
    head_DV = reference.tensors["lm_head.weight"].T if draft.config.own_head else head_DV
    np.testing.assert_allclose(given[0], state, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(given[1], x @ head_DV, rtol=2e-5, atol=1e-4)


# ---- reading what others wrote -----------------------------------------------------------------


def test_numbering_of_tapped_layers(tmp_path):
    """At the top of config.json the layer that is entered, in eagle_config the one that is left."""
    draft, target = make_draft("eagle3"), make_target()

    def taps(**options):
        return load_draft(tmp_path, target, **options).config.taps

    save(draft, tmp_path, "eagle3", numbering="enter")
    assert read(tmp_path)[0]["eagle_config"] == {"use_aux_hidden_state": True}
    assert taps() == (1, 3, 4) and taps(numbering="output") == (2, 4, 5)
    save(draft, tmp_path, "eagle3", numbering="output")
    assert "eagle_aux_hidden_state_layer_ids" not in read(tmp_path)[0]
    assert taps() == (1, 3, 4) and taps(numbering="enter") == (0, 2, 3)

    def alike(fields):
        fields["eagle_aux_hidden_state_layer_ids"] = [0, 2, 3]

    rewrite_json(tmp_path / "config.json", alike)
    with one_line(ConfigError, "say how they are numbered"):
        taps()
    assert taps(numbering="enter") == (0, 2, 3) and taps(numbering="output") == (1, 3, 4)
    for numbering in ("between", "both"):
        with one_line(ConfigError, "expected one of enter, output"):
            taps(numbering=numbering)
    with one_line(ConfigError, "expected one of enter, output, both"):
        save(draft, tmp_path, "eagle3", numbering="between")
    with one_line(ConfigError, "choices of eagle3"):
        save(draft, tmp_path, "speculators", numbering="enter")
    eagle.save(draft, tmp_path)
    with one_line(ConfigError, "a choice for EAGLE-3 folders of other programs"):
        taps(numbering="enter")


def test_tapped_layers_by_default(tmp_path):
    draft = make_draft("eagle3")
    save(draft, tmp_path, "eagle3", numbering="enter")
    rewrite_json(
        tmp_path / "config.json", lambda fields: fields.pop("eagle_aux_hidden_state_layer_ids")
    )
    deep = dataclasses.replace(LLAMA, num_layers=8)
    assert load_draft(tmp_path, make_target(deep)).config.taps == (2, 4, 5)
    with one_line(ConfigError, "load the draft with its target"):
        eagle.load(tmp_path, dtype="float32")


def test_embedding_tapped_has_no_number_of_a_layer_left(tmp_path):
    draft = make_draft("eagle3")
    draft = draft.replace(config=dataclasses.replace(draft.config, taps=(0, 3, 4)))
    with one_line(ConfigError, "only the numbering 'enter'"):
        save(draft, tmp_path, "eagle3")
    save(draft, tmp_path, "eagle3", numbering="enter")
    assert_same(load_draft(tmp_path, make_target()), draft)


def test_biases_are_told_by_the_tensors(tmp_path):
    """NVIDIA's exporter writes them, and "attention_bias" is not to be relied on."""
    draft = make_draft("eagle3-target-head")
    save(draft, tmp_path, "eagle3")
    sizes = {"fc": 32, **{f"midlayer.self_attn.{n}_proj": s for n, s in BIASES.items()}}
    rewrite(
        tmp_path / "model.safetensors",
        lambda tensors: tensors.update(
            {f"{name}.bias": np.ones(size, np.float32) for name, size in sizes.items()}
        ),
    )
    params = load_draft(tmp_path, make_target()).params
    assert params["fc"]["bias"].shape == (32,)
    assert params["layers_0"]["attention"]["k"]["bias"].shape == (2, 10)


BIASES = {"q": 40, "k": 20, "v": 20, "o": 32}


def test_head_of_the_target_cut_to_the_draft_vocabulary(tmp_path):
    draft = make_draft("eagle3")
    save(draft, tmp_path, "eagle3")
    rewrite(tmp_path / "model.safetensors", without("lm_head.weight", "t2d"))
    loaded = load_draft(tmp_path, make_target())
    assert not loaded.config.own_head and loaded.config.draft_vocab_size == 7
    np.testing.assert_array_equal(loaded.draft_to_target, IDS)


# ---- refusals ----------------------------------------------------------------------------------


def without(*names):
    def change(mapping):
        for name in names:
            del mapping[name]

    return change


@pytest.mark.parametrize(
    ("profile", "name", "changes", "reason"),
    [
        ("eagle-llama-vllm", "eagle", {"output_norm": True}, "no place for a norm behind the last"),
        ("eagle-llama-sglang", "eagle", {"input_norm": True}, "no place for a norm in front of"),
        ("eagle-llama-vllm", "eagle", {"own_head": True}, "no place for a head"),
        ("eagle-llama-vllm", "eagle", {"own_embedding": True}, "no place for an own embedding"),
        ("eagle-llama-vllm", "eagle-fc-bias", {}, "vLLM builds FC without a bias"),
        ("eagle-llama-vllm", "eagle3", {}, "this is an EAGLE-3 draft: choose eagle3"),
        ("eagle-llama-sglang", "llama4", {}, "Llama 4 blocks: choose eagle-llama4"),
        ("eagle-llama4", "eagle", {}, "a draft with Llama 3 blocks: choose eagle-llama-vllm"),
        ("eagle-llama4", "eagle3", {}, "an EAGLE-3 draft: choose eagle3"),
        ("eagle-llama4", "llama4", {"output_norm": False}, "norm behind the last layer, this"),
        ("eagle-llama4", "llama4", {"input_norm": False}, "norm in front of the first layer, this"),
        ("eagle-llama4", "llama4", {"fc_bias": True}, "vLLM builds FC without a bias"),
        ("eagle-llama4", "llama4-own-head", CUT, "the vocabulary map of an own head"),
        ("eagle3", "eagle", {}, "not an EAGLE-3 draft: choose an eagle-llama profile"),
        ("eagle3", "eagle3", {"fc_bias": True}, "readers build FC without a bias"),
        ("speculators", "eagle3-target-head", CUT, "it needs an own head"),
        ("eagle-llama", "eagle", {}, "expected one of own, eagle-llama-vllm, eagle-llama-sglang"),
    ],
)
def test_drafts_without_a_place(tmp_path, profile, name, changes, reason):
    with one_line(ConfigError, reason):
        save(make_draft(name, **changes), tmp_path / "new", profile)
    assert not (tmp_path / "new").exists()


def test_biases_have_no_place(tmp_path):
    draft = make_draft("eagle")
    layer = dataclasses.replace(draft.config.layer, mlp_bias=True)
    draft = draft.replace(config=dataclasses.replace(draft.config, layer=layer))
    with one_line(ConfigError, "no place for biases of attention and MLP"):
        save(draft, tmp_path, "eagle-llama-sglang")


@pytest.mark.parametrize("case", TABLES)
def test_any_missing_or_left_over_tensor_refuses(tmp_path, case):
    name, options, table = TABLES[case]
    save(make_draft(name), tmp_path, case.removesuffix("-layers"), **options)
    target, path = make_target(DRAFTS[name][0]), tmp_path / "model.safetensors"
    whole = safetensors.numpy.load_file(path)
    for missing in set(table) - {"fc.bias", "t2d", "lm_head.weight"}:
        safetensors.numpy.save_file({k: v for k, v in whole.items() if k != missing}, path)
        with one_line(CheckpointError, f"tensor {re.escape(missing)} is missing"):
            load_draft(tmp_path, target)
    spare = np.ones(3, np.float32)
    for extra in ("layers.2.mlp.up_proj.weight", "extra.weight", "layers.0.self_attn.sink"):
        safetensors.numpy.save_file(whole | {extra: spare}, path)
        with one_line(CheckpointError, "is not expected by the config"):
            load_draft(tmp_path, target)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("eagle3", "eagle_config", {"use_aux_hidden_state": False}, "expected tapped layers"),
        ("eagle3", "model_type", "qwen2", "unknown architecture qwen2"),
        ("eagle3", "draft_vocab_size", 8, "tensor lm_head.weight has shape .7, 32., expected .8"),
        ("eagle3", "target_hidden_size", 40, "fc.weight has shape .32, 96., expected .32, 120."),
        ("eagle3-joint", "fc_norm", True, "expected at most one"),
        ("eagle3-joint", "norm_before_fc", False, "input_norm.weight is not expected"),
        ("eagle3-each", "fc_norm", False, "fc_norm.2.weight are not expected"),
    ],
)
def test_eagle3_fields_that_do_not_fit(tmp_path, name, field, value, message):
    save(make_draft(name), tmp_path, "eagle3")
    rewrite_json(tmp_path / "config.json", lambda fields: fields.update({field: value}))
    with one_line(ValueError, message) as error:
        load_draft(tmp_path, make_target())
    assert str(tmp_path) in str(error.value)


def test_speculators_must_say_where_the_residual_begins(tmp_path):
    save(make_draft("eagle3"), tmp_path, "speculators")
    rewrite_json(tmp_path / "config.json", without("norm_before_residual"))
    with one_line(ConfigError, "lacks norm_before_residual, of which readers differ"):
        load_draft(tmp_path, make_target())


def test_vocabulary_maps_that_disagree(tmp_path):
    save(make_draft("eagle3"), tmp_path, "eagle3")
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors["t2d"].__setitem__(5, True))
    with one_line(CheckpointError, "t2d names other tokens than tensor d2t"):
        load_draft(tmp_path, make_target())


# ---- the program -------------------------------------------------------------------------------


def test_converting_a_folder(tmp_path, capsys):
    draft = make_draft("eagle3", dtype="bfloat16")
    eagle.save(draft, tmp_path / "own")
    export.main(out=tmp_path / "there", draft=str(tmp_path / "own"), profile="eagle3")
    assert "profile eagle3, bfloat16" in capsys.readouterr().out
    export.main(out=tmp_path / "back", draft=str(tmp_path / "there"), form="orbax")
    target = make_target(dataclasses.replace(LLAMA, dtype="bfloat16"))
    assert_same(load_draft(tmp_path / "back", target), draft)
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, "the folder of a run or --draft"),
        ({"draft": "none", "run": tmp_path}, "the folder of a run or --draft"),
        ({"run": tmp_path, "which": "first"}, "expected best or latest"),
        ({"draft": str(tmp_path / "own"), "form": "gguf"}, "expected safetensors or orbax"),
        ({"draft": "x", "form": "orbax", "profile": "eagle3"}, "is written as safetensors"),
        ({"draft": str(tmp_path / "own"), "profile": "speculators"}, "needs the name of the targ"),
    ]
    for options, message in bad:
        with one_line(ConfigError, message):
            export.main(out=tmp_path / "out", **options)
