"""Loading and saving: bit-equal round trips of tiny models, and one clear line for bad input."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jax_eagle import Draft, Target, load_draft, load_target
from jax_eagle.checkpoint import eagle, hf, orbax
from jax_eagle.checkpoint.files import fingerprint
from jax_eagle.checkpoint.mapping import draft_entries, target_entries, to_tensors
from jax_eagle.config import DraftConfig, LlamaConfig, RopeScaling

LLAMA3_ROPE = RopeScaling(8.0, 1.0, 4.0, 8192)
TIED = LlamaConfig(
    vocab_size=48, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, rope_theta=500000.0, tie_embeddings=True, stop_token_ids=(1, 5),
)  # fmt: skip
WITH_BIASES = dataclasses.replace(
    TIED, tie_embeddings=False, head_dim=10, attention_bias=True, mlp_bias=True,
    rope_scaling=LLAMA3_ROPE,
)  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [TIED, WITH_BIASES], ids=["tied", "biases"])
DRAFTS = pytest.mark.parametrize(
    "options",
    [{}, {"input_norm": True, "fc_bias": True, "draft_vocab_size": 7, "num_layers": 2}],
    ids=["plain", "reduced-vocabulary"],
)


def random_params(entries, dtype="float32"):
    """A parameter tree with other random numbers in every tensor."""
    rng = np.random.default_rng(0)
    params = {}
    for entry in entries:
        node = params
        for key in entry.path[:-1]:
            node = node.setdefault(key, {})
        node[entry.path[-1]] = jnp.asarray(rng.normal(size=entry.shape), dtype)
    return params


def make_target(config=TIED):
    return Target(params=random_params(target_entries(config), config.dtype), config=config)


def make_draft(target=None, *, draft_vocab_size=None, **options):
    layer = (target or make_target()).config
    config = DraftConfig.for_target(layer, draft_vocab_size=draft_vocab_size, **options)
    ids = None
    if draft_vocab_size is not None:
        ids = jnp.asarray([0, 2, 3, 11, 12, 30, 47][:draft_vocab_size], jnp.int32)
    return Draft(params=random_params(draft_entries(config)), draft_to_target=ids, config=config)


def assert_same(given, expected):
    """Same static fields, same tree, same dtypes, same bits."""
    assert given.config == expected.config
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def rewrite(path: Path, change) -> None:
    """Changes the tensors of a safetensors file."""
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def rewrite_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def one_line(match: str):
    """pytest.raises for an error of one line; `match` is plain text."""
    return pytest.raises(ValueError, match=rf"\A[^\n]*{re.escape(match)}[^\n]*\Z")


# ---- round trips -------------------------------------------------------------------------------


@CONFIGS
@pytest.mark.parametrize("shard_bytes", [2**30, 9000], ids=["single", "sharded"])
def test_hugging_face_round_trip(tmp_path, config, shard_bytes):
    target = make_target(config)
    hf.save(target, tmp_path, max_shard_bytes=shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes < 2**30)
    assert_same(load_target(tmp_path, dtype="float32"), target)


@CONFIGS
def test_orbax_round_trip(tmp_path, config):
    target = make_target(config)
    orbax.save_target(target, tmp_path / "model")
    assert_same(load_target(tmp_path / "model", dtype="float32"), target)
    orbax.save_target(target, tmp_path / "model")  # again: replaced


@pytest.mark.parametrize("save", [hf.save, orbax.save_target], ids=["hf", "orbax"])
def test_bfloat16_is_kept_bit_equal_and_widened_on_request(tmp_path, save):
    target = make_target(dataclasses.replace(TIED, dtype="bfloat16"))
    save(target, tmp_path)
    assert_same(load_target(tmp_path, dtype=jnp.bfloat16), target)
    wide = load_target(tmp_path, dtype="float32")
    assert wide.config == TIED
    expected = target.params["norm"]["scale"].astype(jnp.float32)
    np.testing.assert_array_equal(wide.params["norm"]["scale"], expected)


@DRAFTS
@pytest.mark.parametrize("save", [eagle.save, orbax.save_draft], ids=["eagle", "orbax"])
def test_draft_round_trip(tmp_path, options, save):
    target = make_target()
    draft = make_draft(target, **options)
    save(draft, tmp_path)
    assert_same(load_draft(tmp_path, target), draft)


def test_d2t_holds_offsets(tmp_path):
    draft = make_draft(draft_vocab_size=7)
    eagle.save(draft, tmp_path)
    d2t = safetensors.numpy.load_file(tmp_path / "model.safetensors")["d2t"]
    assert d2t.dtype == np.int64
    np.testing.assert_array_equal(d2t + np.arange(7), draft.draft_to_target)


def test_official_eagle_1_folder(tmp_path):
    """A plain Llama config; no first norm, no last norm, embedding repeated, bias by the file."""
    target = make_target()
    draft = make_draft(target, output_norm=False, fc_bias=True)
    tensors = to_tensors(draft_entries(draft.config), draft.params)
    tensors["embed_tokens.weight"] = np.asarray(target.params["embed"]["embedding"])
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(draft.config.layer.to_hf()))
    assert_same(load_draft(tmp_path, target), draft)


def test_tensor_layout(tmp_path):
    """What the mapping means, spelt out for one kernel of each kind."""
    target = make_target(WITH_BIASES)
    hf.save(target, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    attention = target.params["layers_1"]["attention"]
    c = target.config
    q, o = np.asarray(attention["q"]["kernel"]), np.asarray(attention["o"]["kernel"])
    at = "model.layers.1.self_attn."
    np.testing.assert_array_equal(
        tensors[at + "q_proj.weight"], q.reshape(c.hidden_size, -1).T
    )  # rows: head by head
    np.testing.assert_array_equal(tensors[at + "o_proj.weight"], o.reshape(-1, c.hidden_size).T)
    np.testing.assert_array_equal(
        tensors[at + "k_proj.bias"], np.asarray(attention["k"]["bias"]).reshape(-1)
    )
    np.testing.assert_array_equal(
        tensors["lm_head.weight"], np.asarray(target.params["lm_head"]["kernel"]).T
    )


# ---- config forms ------------------------------------------------------------------------------


def test_old_rope_form_and_ignored_tensors(tmp_path):
    target = make_target(dataclasses.replace(TIED, rope_scaling=LLAMA3_ROPE))
    hf.save(target, tmp_path)

    def to_old_form(config):
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope | {"type": rope.pop("rope_type")}
        del config["head_dim"]

    def add_old_tensors(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite_json(tmp_path / "config.json", to_old_form)
    rewrite(tmp_path / "model.safetensors", add_old_tensors)
    assert_same(load_target(tmp_path, dtype="float32"), target)


def test_stop_tokens_of_generation_config_are_added(tmp_path):
    hf.save(make_target(), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert load_target(tmp_path).config.stop_token_ids == (1, 5, 9)


# ---- bad input ---------------------------------------------------------------------------------


def without(name):
    return lambda mapping: mapping.pop(name)


def with_tensor(name, shape=(3,)):
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


def with_field(name, value):
    return lambda config: config.update({name: value})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(UP), f"tensor {UP} is missing"),
        (with_tensor("model.layers.2.mlp.up_proj.weight"), "up_proj.weight is not expected"),
        (with_tensor(UP), f"tensor {UP} has shape [3], expected [64, 32]"),
        (dict.clear, "and 17 more are missing"),
    ],
    ids=["missing", "left-over", "shape", "empty"],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    hf.save(make_target(), tmp_path)
    rewrite(tmp_path / "model.safetensors", change)
    with one_line(message) as error:
        load_target(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_field("architectures", ["MistralForCausalLM"]), "unknown architecture Mistral"),
        (with_field("rope_parameters", {"rope_type": "yarn"}), "RoPE type 'yarn'"),
        (without("vocab_size"), "lacks the field 'vocab_size'"),
        (with_field("tie_word_embeddings", False), "tensor lm_head.weight is missing"),
    ],
    ids=["architecture", "rope", "field", "untied"],
)
def test_configs_that_do_not_fit(tmp_path, change, message):
    hf.save(make_target(), tmp_path)
    rewrite_json(tmp_path / "config.json", change)
    with one_line(message) as error:
        load_target(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_missing_and_truncated_files(tmp_path):
    hf.save(make_target(), tmp_path, max_shard_bytes=9000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        shard.write_bytes(whole[:length])
        with one_line(f"{shard}: truncated, or not a safetensors file"):
            load_target(tmp_path)
    shard.unlink()
    with one_line(f"{shard}: no such file"):
        load_target(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with one_line("has no weight_map"):
        load_target(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size":')
    with one_line("config.json: cannot be read as JSON"):
        load_target(tmp_path)
    (tmp_path / "config.json").unlink()
    with one_line("config.json: no such file"):
        load_target(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_not_tied_to_the_mapped_file(tmp_path, dtype):
    target = make_target(dataclasses.replace(TIED, dtype=dtype))
    hf.save(target, tmp_path)
    loaded = load_target(tmp_path, dtype=dtype)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(bytes((tmp_path / "model.safetensors").stat().st_size))
    assert_same(loaded, target)


def test_a_dtype_that_is_not_known(tmp_path):
    hf.save(make_target(), tmp_path)

    def to_complex(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.complex64)

    rewrite(tmp_path / "model.safetensors", to_complex)
    with one_line("model.safetensors: tensor model.norm.weight has dtype C64, expected one of"):
        load_target(tmp_path)


def test_damaged_orbax_folder(tmp_path):
    orbax.save_target(make_target(), tmp_path)
    rewrite_json(tmp_path / "config.json", with_field("intermediate_size", 65))
    with one_line("mlp/down/kernel has shape [64, 32], expected [65, 32]"):
        load_target(tmp_path)
    rewrite_json(tmp_path / "config.json", with_field("num_hidden_layers", 3))
    with one_line("layers_2/attention/k/kernel"):
        load_target(tmp_path)
    (tmp_path / "orbax" / "_METADATA").unlink()
    with one_line("truncated, or not whole"):
        load_target(tmp_path)


@DRAFTS
@pytest.mark.parametrize("save", [eagle.save, orbax.save_draft], ids=["eagle", "orbax"])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 16, "its feature width is 16, this target needs 32"),
        ("vocab_size", 47, "its vocabulary size is 47, this target needs 48"),
    ],
)
def test_draft_of_another_target(tmp_path, options, save, field, value, message):
    other = make_target(dataclasses.replace(TIED, **{field: value}))
    save(make_draft(other, **options), tmp_path)
    with one_line(message):
        load_draft(tmp_path, make_target())


def test_feature_width_of_another_target(tmp_path):
    target = make_target()
    config = DraftConfig(layer=target.config, feature_width=96)
    draft = Draft(params=random_params(draft_entries(config)), draft_to_target=None, config=config)
    eagle.save(draft, tmp_path)
    with one_line("its feature width is 96, this target needs 32"):
        load_draft(tmp_path, target)


@pytest.mark.parametrize("ids", [[-1, 2, 3], [0, 2, 48], [4, 4, 5]])
def test_draft_vocabulary_out_of_bounds(tmp_path, ids):
    draft = make_draft(draft_vocab_size=3).replace(draft_to_target=jnp.asarray(ids, jnp.int32))
    eagle.save(draft, tmp_path)
    with one_line("expected distinct ids in 0..47"):
        load_draft(tmp_path, make_target())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("d2t"), "tensor d2t is missing"),
        (without("fc.weight"), "tensor fc.weight is missing"),
        (with_tensor("midlayer.hidden_norm.weight"), "midlayer.hidden_norm.weight is not expected"),
        (with_tensor("d2t"), "tensor d2t has shape [3], expected [7]"),
    ],
    ids=["d2t", "fc", "left-over", "d2t-shape"],
)
def test_draft_tensors_that_do_not_fit(tmp_path, change, message):
    eagle.save(make_draft(draft_vocab_size=7), tmp_path)
    rewrite(tmp_path / "model.safetensors", change)
    with one_line(message):
        load_draft(tmp_path, make_target())


def test_folders_of_another_kind(tmp_path):
    target = make_target()
    hf.save(target, tmp_path / "target")
    with one_line("not an EAGLE draft: tensor fc.weight is missing"):
        load_draft(tmp_path / "target", target)
    eagle.save(make_draft(target), tmp_path / "draft")
    with one_line("unknown architecture EagleLlamaForCausalLM"):
        load_target(tmp_path / "draft")
    (tmp_path / "draft" / "model.safetensors").rename(tmp_path / "draft" / "pytorch_model.bin")
    with one_line("pytorch_model.bin: pickled weights are not read; convert the file to"):
        load_draft(tmp_path / "draft", target)


def test_options_that_are_not_supported(tmp_path):
    hf.save(make_target(), tmp_path)
    with one_line("dtype int8 is not supported, expected one of float32, bfloat16"):
        load_target(tmp_path, dtype="int8")
    with one_line("attention 'fast': expected one of reference, triton"):
        load_target(tmp_path, attention="fast")
    with one_line("a draft is a folder"):
        load_draft(tmp_path / "config.json", make_target())
    with one_line("config.json: truncated, or not a GGUF file"):
        load_target(tmp_path / "config.json")


def test_fingerprints_tell_checkpoints_apart(tmp_path):
    def write(name: str, **files: bytes) -> Path:
        for file, content in files.items():
            path = tmp_path / name / "inner" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / name

    long = bytes(200_000)
    one = fingerprint(write("one", a=long, b=b"b"))
    write("one", **{".when": b"downloaded"})
    assert one == fingerprint(tmp_path / "one")
    assert one == fingerprint(write("same", b=b"b", a=long))
    others = [
        write("renamed", a=long, c=b"b"),
        write("shorter", a=long[1:], b=b"b"),
        write("begins otherwise", a=b"1" + long[1:], b=b"b"),
        write("ends otherwise", a=long[1:] + b"1", b=b"b"),
        write("another middle", a=long[:100_000] + b"1" * 50_000 + long[:50_000], b=b"b"),
        write("one file", a=long),
    ]
    assert len({one, *map(fingerprint, others)}) == 1 + len(others)
    file = tmp_path / "one" / "inner" / "a"
    assert fingerprint(file) == fingerprint(tmp_path / "same" / "inner" / "a")
