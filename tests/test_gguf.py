"""GGUF files: the same model as the Hugging Face folder they came from, and their tokenizer."""

import dataclasses
import re

import gguf
import jax
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from jax_eagle import load_target
from jax_eagle.checkpoint.files import write_json, write_safetensors
from jax_eagle.checkpoint.mapping import CheckpointError, file_shapes, target_entries
from jax_eagle.config import ConfigError, LlamaConfig, RopeScaling
from jax_eagle.tokenizer import Tokenizer

TIED = LlamaConfig(
    vocab_size=48, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, rope_theta=500000.0, tie_embeddings=True, stop_token_ids=(1, 5),
)  # fmt: skip
WITH_BIASES = dataclasses.replace(
    TIED, tie_embeddings=False, head_dim=10, attention_bias=True, mlp_bias=True,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
)  # fmt: skip


def random_tensors(config):
    """A tensor of random numbers for each name of a Hugging Face file."""
    rng = np.random.default_rng(0)
    shapes = file_shapes(target_entries(config))
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def load_from_folder(folder, config, tensors):
    """The same model through a Hugging Face folder."""
    write_json(folder / "config.json", config.to_hf())
    write_safetensors(folder / "model.safetensors", tensors)
    return load_target(folder, dtype="float32")


def one_line(match):
    """pytest.raises for an error of one line; `match` is plain text."""
    return pytest.raises(ValueError, match=rf"\A[^\n]*{re.escape(match)}[^\n]*\Z")


def interleaved(rows, heads):
    """Half-split to interleaved rotary rows, as the converter of llama.cpp writes them."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write_gguf(path, config, tensors, *, arch="llama", quantised=(), extra=None):
    c = config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_vocab_size(c.vocab_size)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_layers)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_context_length(c.max_position)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_eos_token_id(c.stop_token_ids[0])
    writer.add_eot_token_id(c.stop_token_ids[1])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_layers)
    for name, array in (tensors | (extra or {})).items():
        if "q_proj" in name or "k_proj" in name:
            array = interleaved(array, c.num_heads if "q_proj" in name else c.num_kv_heads)
        own = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if own in quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(own, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(own, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("config", [TIED, WITH_BIASES], ids=["tied", "biases"])
def test_gguf_equals_the_folder(tmp_path, config):
    tensors = random_tensors(config)
    extra = {"rope_freqs.weight": rope_divisors(config)} if config.rope_scaling else {}
    write_gguf(tmp_path / "m.gguf", config, tensors, extra=extra)
    given = load_target(tmp_path / "m.gguf", dtype="float32")
    expected = load_from_folder(tmp_path, config, tensors)
    assert given.config == expected.config == config
    assert given.tokenizer is None
    jax.tree.map(np.testing.assert_array_equal, given.params, expected.params)


def rope_divisors(config):
    """What each rotary frequency is divided by: unchanged, blended, or the whole factor."""
    s = config.rope_scaling
    frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    divisors = []
    for wavelength in 2 * np.pi / frequency:
        if wavelength < s.original_max_position / s.high_freq_factor:
            divisors.append(1.0)
        elif wavelength > s.original_max_position / s.low_freq_factor:
            divisors.append(s.factor)
        else:
            turns = s.original_max_position / wavelength
            smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            divisors.append(1 / ((1 - smooth) / s.factor + smooth))
    return np.asarray(divisors, np.float32)


def test_gguf_is_dequantised(tmp_path):
    tensors = random_tensors(TIED)
    write_gguf(tmp_path / "m.gguf", TIED, tensors, quantised=["blk.0.ffn_down.weight"])
    given = load_target(tmp_path / "m.gguf", dtype="float32").params["layers_0"]["mlp"]["down"]
    exact = tensors["model.layers.0.mlp.down_proj.weight"]
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = gguf.quants.dequantize(gguf.quants.quantize(exact, kind), kind)
    np.testing.assert_array_equal(given["kernel"], stored.T)
    assert np.abs(stored - exact).max() > 0


def test_gguf_errors(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, TIED, random_tensors(TIED), arch="gpt2")
    with one_line("m.gguf: architecture 'gpt2' is not supported"):
        load_target(path)
    write_gguf(
        path, TIED, random_tensors(TIED), extra={"rope_freqs.weight": np.full(4, 3, np.float32)}
    )
    with one_line("tensor rope_freqs.weight is not Llama 3 scaling"):
        load_target(path)
    write_gguf(path, TIED, random_tensors(TIED), extra={"surplus": np.ones(3, np.float32)})
    with one_line("m.gguf: tensor surplus is not expected"):
        load_target(path)
    write_gguf(path, TIED, random_tensors(TIED))
    whole = path.read_bytes()
    for length in (0, 3, 200, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:length])
        with one_line("m.gguf: truncated, or not a GGUF file"):
            load_target(path)


# ---- tokenizer ---------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<|im|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"


def tokenizer_metadata(pre="smollm", **changes):
    """Bytes, three merges and two special tokens; ids: specials 0 and 1, then the bytes."""
    tokens = ["<|end|>", "<|im|>", *sorted(ByteLevel.alphabet()), "he", "12", "\u0120he"]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": ["h e", "1 2", "\u0120 he"],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (metadata | changes).items()} | {
        "tokenizer.chat_template": TEMPLATE
    }


def pieces(tokenizer, text):
    return [tokenizer.decode([index]) for index in tokenizer.encode(text)]


TEXT = "he he 12\n\n1 w\u00f6rld \u65e5 \U0001f642"


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "gpt-2"])
def test_text_survives_encoding(pre):
    tokenizer = Tokenizer.from_gguf(tokenizer_metadata(pre))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    # Llama 3 puts its BOS in front; smollm splits digits one by one.
    assert (ids[0] == tokenizer.bos_token_id) == (pre == "llama-bpe")
    assert ("12" in pieces(tokenizer, TEXT)) == (pre != "smollm")


def test_special_tokens_are_matched_in_the_text():
    tokenizer = Tokenizer.from_gguf(tokenizer_metadata())
    assert tokenizer.encode("<|im|>he<|end|>")[::2] == [1, 0]
    assert tokenizer.decode([1, 0], skip_special_tokens=True) == ""
    assert tokenizer.special_ids == (0, 1)


def test_chat_template():
    tokenizer = Tokenizer.from_gguf(tokenizer_metadata())
    messages = [{"role": "user", "content": "he"}]
    ids = tokenizer.apply_chat_template(messages)
    assert tokenizer.decode(ids) == "<|im|>user: he"
    assert ids[0] == 1


def test_equal_files_give_equal_tokenizers(tmp_path):
    tokenizer = Tokenizer.from_gguf(tokenizer_metadata())
    tokenizer.save(tmp_path)
    for other in (Tokenizer.from_gguf(tokenizer_metadata()), Tokenizer.from_folder(tmp_path)):
        assert other == tokenizer and hash(other) == hash(tokenizer)
        assert other.encode(TEXT) == tokenizer.encode(TEXT)
    assert Tokenizer.from_gguf(tokenizer_metadata("gpt-2")) != tokenizer


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ConfigError, match="pre-tokenizer 'qwen2' is not supported"):
        Tokenizer.from_gguf(tokenizer_metadata("qwen2"))
    with pytest.raises(ConfigError, match="tokenizer model 'llama' is not supported"):
        Tokenizer.from_gguf(tokenizer_metadata(model="llama"))
    without_merges = tokenizer_metadata()
    del without_merges["tokenizer.ggml.merges"]
    with pytest.raises(CheckpointError, match="tokenizer.ggml.merges' is missing"):
        Tokenizer.from_gguf(without_merges)
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
