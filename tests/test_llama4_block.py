"""Dense Llama 4 layers: against a slow float64 reference, and trees against whole texts.

Chunks of 8 positions and query factors that change every 4: texts of 30 tokens cross both.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import Llama4TextConfig

from jax_eagle import generate
from jax_eagle.attention import View
from jax_eagle.cache import commit, init_cache
from jax_eagle.checkpoint import hf
from jax_eagle.checkpoint.mapping import draft_entries, target_entries, to_tensors
from jax_eagle.config import ConfigError, DraftConfig, Llama4Attention, LlamaConfig, RopeScaling
from jax_eagle.draft import Draft, Sync
from jax_eagle.llama import Llama
from jax_eagle.sharding import Backend
from jax_eagle.tree import Tree, chain_tree

pytestmark = pytest.mark.usefixtures("quick_compiler")

BLOCK = Llama4Attention(nope_layers=(0,), chunk=8, floor_scale=4)
MODEL = {
    "head_dim": 16, "rope_theta": 100.0, "rope_scaling": RopeScaling(16.0, 1.0, 1.0, 32),
    "attention_bias": True, "max_position": 64, "llama4": BLOCK,
}  # fmt: skip
ROWS, NODES, SPLIT, LONGEST, STEP = 3, 6, 3, 21, 5
WIDTH = 30


@pytest.fixture(scope="module")
def target(make_target):
    return make_target(seed=3, **MODEL)


# ---- the whole forward -------------------------------------------------------------------------


def reference_logits(tensors, c: LlamaConfig, tokens_T):
    """Logits [T, V] in float64, from the tensors of a Hugging Face file, as they lie there."""
    w = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    position_T = np.arange(len(tokens_T))
    x_TD = w["model.embed_tokens.weight"][tokens_T]
    for i in range(c.num_layers):
        at = f"model.layers.{i}."
        h_TD = rms(x_TD, c) * w[at + "input_layernorm.weight"]
        x_TD = x_TD + reference_attention(w, at + "self_attn.", c, i, h_TD, position_T)
        h_TD = rms(x_TD, c) * w[at + "post_attention_layernorm.weight"]
        gate_TF, up_TF = (h_TD @ w[f"{at}feed_forward.{n}_proj.weight"].T for n in ("gate", "up"))
        inner_TF = gate_TF / (1 + np.exp(-gate_TF)) * up_TF
        x_TD = x_TD + inner_TF @ w[at + "feed_forward.down_proj.weight"].T
    return rms(x_TD, c) * w["model.norm.weight"] @ w["lm_head.weight"].T


def reference_attention(w, at, c: LlamaConfig, layer, x_TD, position_T):
    T, own = len(x_TD), c.llama4

    def project(name, heads):
        y = x_TD @ w[f"{at}{name}_proj.weight"].T + w[f"{at}{name}_proj.bias"]
        return y.reshape(T, heads, c.head_dim)

    q, k, v = project("q", c.num_heads), project("k", c.num_kv_heads), project("v", c.num_kv_heads)
    chunk_T = position_T // (own.chunk or len(x_TD))
    seen_TT = position_T[:, None] >= position_T[None, :]
    if layer in own.nope_layers:
        floors_T = (
            0 * position_T if own.floor_scale is None else (position_T + 1) // own.floor_scale
        )
        q = q * (1 + own.attn_scale * np.log1p(floors_T))[:, None, None]
    else:
        q, k = rotate_pairs(q, c, position_T), rotate_pairs(k, c, position_T)
        if own.qk_norm:
            q, k = rms(q, c), rms(k, c)
        seen_TT = seen_TT & (chunk_T[:, None] == chunk_T[None, :])
    k, v = (np.repeat(a, c.num_heads // c.num_kv_heads, axis=1) for a in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(c.head_dim)
    weights = np.exp(scores - scores.max()) * seen_TT
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("nts,snh->tnh", weights, v).reshape(T, -1)
    return out @ w[at + "o_proj.weight"].T + w[at + "o_proj.bias"]


def rotate_pairs(x, c: LlamaConfig, position_T):
    """Pairs (2i, 2i+1) as complex numbers; long wavelengths are stretched, with no band between."""
    frequency = c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
    s = c.rope_scaling
    stretched = 2 * np.pi / frequency > s.original_max_position / s.low_freq_factor
    assert stretched.any() and not stretched.all()
    angle = position_T[:, None] * np.where(stretched, frequency / s.factor, frequency)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None, :]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def rms(x, c: LlamaConfig):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + c.rms_norm_eps)


@pytest.mark.parametrize(
    "changes",
    [{}, {"nope_layers": (1,), "chunk": 11, "qk_norm": False, "floor_scale": None}],
    ids=str,
)
def test_full_forward_equals_the_reference(target, changes):
    target = target.replace(config=with_block(target.config, **changes))
    tokens_BT = np.random.default_rng(0).integers(0, 6, (2, WIDTH))
    tensors = to_tensors(target_entries(target.config), target.params)
    for tokens_T, logits_TV in zip(tokens_BT, np.asarray(target.logits(tokens_BT)), strict=True):
        expected_TV = reference_logits(tensors, target.config, tokens_T)
        bound = 1e-4 + 2e-5 * np.abs(expected_TV).max()
        np.testing.assert_allclose(logits_TV, expected_TV, rtol=0, atol=bound)


@pytest.mark.parametrize(
    "change",
    [{"nope_layers": ()}, {"chunk": 9}, {"chunk": None}, {"qk_norm": False}, {"floor_scale": 5},
     {"floor_scale": None}, {"attn_scale": 0.2}],
    ids=str,
)  # fmt: skip
def test_each_field_would_show(target, change):
    tokens_T = np.random.default_rng(0).integers(0, 6, WIDTH)
    tensors = to_tensors(target_entries(target.config), target.params)
    ours, other = (
        reference_logits(tensors, config, tokens_T)
        for config in (target.config, with_block(target.config, **change))
    )
    assert np.abs(ours - other).max() > 0.01


def with_block(config: LlamaConfig, **changes) -> LlamaConfig:
    return dataclasses.replace(config, llama4=dataclasses.replace(config.llama4, **changes))


# ---- trees, drafts and packed rows see what whole texts see --------------------------------------


@jax.jit
def whole_states(target, tokens_BT):
    return target(tokens_BT, chain_tree(*tokens_BT.shape), cache=None).x


def prefill(target, tokens_BT, length_B):
    """A cache that holds the first `length` tokens of each row, written STEP at a time."""
    R = -(-LONGEST // 8)
    table_BR = jnp.arange(1, ROWS * R + 1, dtype=jnp.int32).reshape(ROWS, R)
    cache = init_cache(target.config, table_BR, num_pages=ROWS * R + 1, page_size=8)
    for start in range(0, LONGEST, STEP):
        count_B = np.clip(length_B - start, 0, STEP)
        cache = prefill_step(target, tokens_BT[:, start : start + STEP], cache, count_B)
    return cache


@jax.jit
def prefill_step(target, tokens_BA, cache, count_B):
    tree = chain_tree(*tokens_BA.shape)
    return commit(cache, target(tokens_BA, tree, cache).new_kv, tree.depth, count_B)


@jax.jit
def tree_states(target, cache, nodes_BM, depth_BM, mask_BMM):
    """States of the nodes of a tree: in one forward, and in two (the first nodes are scratch)."""
    tree = Tree(jnp.zeros_like(depth_BM), depth_BM, jnp.zeros_like(depth_BM), mask_BMM)
    at_once = target(nodes_BM, tree, cache).x
    position_BM = cache.length[:, None] + depth_BM
    parts, scratch = [], None
    for part in (slice(0, SPLIT), slice(SPLIT, NODES)):
        view = View(position_BM[:, part], mask_BMM[:, part, : part.stop], cache, scratch=scratch)
        model = Llama(target.config, target.backend)
        x, _, scratch = model.apply({"params": target.params}, nodes_BM[:, part], view)
        parts.append(x)
    return at_once, jnp.concatenate(parts, axis=1)


def check_tree(target, reference, lengths, parents, seed):
    """Compares each node with the last token of the text that leads to it."""
    rng = np.random.default_rng(seed)
    tokens_BT = rng.integers(0, 6, (ROWS, WIDTH), np.int32)
    nodes_BM = rng.integers(0, 6, (ROWS, NODES), np.int32)
    mask_BMM = np.tile(np.eye(NODES, dtype=bool), (ROWS, 1, 1))
    for b, m in np.ndindex(ROWS, NODES):
        mask_BMM[b, m] |= mask_BMM[b, parents[b][m]]
    depth_BM = mask_BMM.sum(axis=2, dtype=np.int32) - 1
    cache = prefill(target, tokens_BT, np.asarray(lengths, np.int32))
    given = tree_states(target, cache, nodes_BM, depth_BM, mask_BMM)

    texts = np.repeat(tokens_BT, NODES, axis=0)
    last = (np.asarray(lengths)[:, None] + depth_BM).ravel()
    for text, end, (b, m) in zip(texts, last, np.ndindex(ROWS, NODES), strict=True):
        text[lengths[b] : end + 1] = nodes_BM[b, mask_BMM[b, m]]
    expected = np.asarray(whole_states(reference, texts))[np.arange(len(texts)), last]
    for x_BMD in given:
        np.testing.assert_allclose(np.reshape(x_BMD, expected.shape), expected, rtol=0, atol=1e-4)


trees = st.tuples(st.just(0), *(st.integers(0, i - 1) for i in range(1, NODES)))


@given(
    lengths=st.tuples(*[st.integers(0, LONGEST)] * ROWS),
    parents=st.tuples(*[trees] * ROWS),
    seed=st.integers(0, 99),
)
def test_nodes_of_a_tree_equal_the_ends_of_whole_texts(target, lengths, parents, seed):
    check_tree(target, target, lengths, parents, seed)


def test_kernels_do_the_same_across_the_border_of_a_chunk(target):
    kernels = target.replace(backend=Backend(attention="triton", interpret=True))
    parents = (0, 0, 1, 1, 3, 4), (0, 0, 0, 1, 2, 3), (0, 0, 1, 2, 3, 4)
    check_tree(kernels, target, (5, 15, 8), parents, seed=0)


@given(st.lists(st.integers(1, WIDTH - 1), max_size=4, unique=True), st.integers(0, 99))
def test_packed_rows_equal_their_segments_alone(target, borders, seed):
    tokens_T = np.random.default_rng(seed).integers(0, 6, WIDTH, np.int32)
    starts = [0, *sorted(borders)]
    segment_T = np.searchsorted(starts, np.arange(WIDTH), side="right") - 1
    position_1T = (np.arange(WIDTH) - np.take(starts, segment_T)).astype(np.int32)[None]
    mask_1TT = np.tril(segment_T[:, None] == segment_T[None, :])[None]
    packed_TD = packed_states(target, tokens_T[None], position_1T, mask_1TT)[0]
    alone = np.zeros((ROWS * NODES, WIDTH), np.int32)  # as many as `check_tree` compiles
    for row, part in zip(alone, np.split(tokens_T, starts[1:]), strict=False):
        row[: len(part)] = part
    expected_TD = np.asarray(whole_states(target, alone))[segment_T, position_1T[0]]
    np.testing.assert_allclose(packed_TD, expected_TD, rtol=0, atol=1e-4)


@jax.jit
def packed_states(target, tokens_BT, position_BT, mask_BTT):
    zeros = jnp.zeros_like(position_BT)
    return target(tokens_BT, Tree(zeros, position_BT, zeros, mask_BTT), cache=None).x


def test_a_draft_that_extends_its_cache_equals_one_pass_along_the_text(target, make_draft):
    draft = make_draft(layers=2, **MODEL)
    rng, T = np.random.default_rng(5), 20
    tokens_1T = rng.integers(0, 6, (1, T), np.int32)
    features_1TF = rng.normal(size=(1, T, 32)).astype(np.float32)
    position_1T = np.arange(T, dtype=np.int32)[None]
    mask_1TT = np.eye(T, dtype=bool)[None] | np.tril(np.broadcast_to(position_1T > 0, (1, T, T)))
    view = View(jnp.asarray(position_1T), jnp.asarray(mask_1TT))
    expected_1TD, _ = jax.jit(Draft.__call__)(draft, target, tokens_1T, features_1TF, view)

    table_1R = jnp.asarray([[1, 2, 3]], jnp.int32)
    cache = init_cache(draft.config.layer, table_1R, num_pages=4, page_size=8)
    parts, extend = [], jax.jit(Draft.extend)
    for start in range(0, T, STEP):
        part = slice(start, start + STEP)
        sync = Sync(tokens_1T[:, part], features_1TF[:, part], jnp.asarray([STEP], jnp.int32))
        cache, x_1AD = extend(draft, target, cache, sync)
        parts.append(x_1AD)
    given_1TD = jnp.concatenate(parts, axis=1)
    # Slot 0 has no feature.
    np.testing.assert_allclose(given_1TD[:, 1:], expected_1TD[:, 1:], rtol=0, atol=1e-4)


def test_the_target_drafting_for_itself_is_always_right(target, make_oracle, ragged_prompts):
    config = DraftConfig(layer=target.config, feature_width=target.config.hidden_size)
    oracle, prompts = make_oracle().replace(config=config), ragged_prompts(ROWS)
    result = generate(target, oracle, prompts, tree="chain:3", max_new_tokens=21, stop_token_ids=[])
    assert result.rounds == [5] * ROWS  # the first token, then four a round
    for prompt, new in zip(prompts, result.tokens, strict=True):
        text = prompt + new
        logits_TV = target.logits([text + [0] * (WIDTH - len(text))])[0]
        assert new == np.argmax(logits_TV, axis=-1)[len(prompt) - 1 : len(text) - 1].tolist()


# ---- files ---------------------------------------------------------------------------------------


def test_a_folder_is_read_back_bit_equal(target, tmp_path):
    hf.save(target, tmp_path)
    again = hf.load(tmp_path, dtype="float32")
    assert again.config == target.config
    assert jax.tree.structure(again.params) == jax.tree.structure(target.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, target.params)


def test_files_have_interleaved_queries_and_keys(target, tmp_path):
    hf.save(target, tmp_path)
    tensors, attention = load_file(tmp_path / "model.safetensors"), "model.layers.0.self_attn."
    own = target.params["layers_0"]["attention"]
    for name, heads in (("q", 4), ("k", 2)):
        rows = tensors[f"{attention}{name}_proj.weight"].reshape(heads, 8, 2, 32)
        for i, b in np.ndindex(8, 2):  # pair i of a head, its real and its imaginary part
            np.testing.assert_array_equal(rows[:, i, b].T, own[name]["kernel"][:, :, 8 * b + i])
        bias = tensors[f"{attention}{name}_proj.bias"].reshape(heads, 8, 2)
        np.testing.assert_array_equal(bias.swapaxes(1, 2).reshape(heads, 16), own[name]["bias"])
    np.testing.assert_array_equal(
        tensors[attention + "v_proj.weight"].T, own["v"]["kernel"].reshape(32, -1)
    )


def test_draft_files_have_the_names_of_llama4():
    config = DraftConfig.for_target(TINY, num_layers=1, input_norm=True)
    names = {entry.name for entry in draft_entries(config)}
    assert {f"layers.0.feed_forward.{n}_proj.weight" for n in ("gate", "up", "down")} <= names
    assert not any(".mlp." in name for name in names)
    assert DraftConfig.from_dict(config.to_dict()) == config


# ---- configurations ------------------------------------------------------------------------------


TINY = LlamaConfig(
    vocab_size=48, hidden_size=32, intermediate_size=64, num_layers=5, num_heads=4,
    num_kv_heads=2, head_dim=8, llama4=Llama4Attention(nope_layers=(1, 3)),
)  # fmt: skip


def tiny(**changes) -> LlamaConfig:
    return dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        tiny(llama4=Llama4Attention((), chunk=None, qk_norm=False, floor_scale=None)),
        tiny(llama4=Llama4Attention((0, 4), 64, False, 16, 0.25), num_layers=7),
        tiny(rope_scaling=RopeScaling(16.0, 1.0, 1.0, 8192), attention_bias=True),
    ],
)
def test_the_form_of_hugging_face_is_read_back_equal(config):
    fields = config.to_hf()
    assert LlamaConfig.from_hf(fields) == config
    theirs = Llama4TextConfig(**fields)  # whose class checks types and fills in the rest
    assert LlamaConfig.from_hf(theirs.to_dict()) == config


def test_what_a_file_leaves_out_is_as_in_the_class_of_hugging_face():
    sizes = {
        "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 9, "num_attention_heads": 8,
        "intermediate_size_mlp": 64, "moe_layers": [], "eos_token_id": 2,
    }  # fmt: skip
    config = LlamaConfig.from_hf(sizes | {"model_type": "llama4_text"})
    assert config == LlamaConfig.from_hf(Llama4TextConfig(**sizes).to_dict())
    assert config.llama4 == Llama4Attention(nope_layers=(3, 7))
    assert (config.head_dim, config.rope_theta, config.intermediate_size) == (128, 5e5, 64)


def test_other_spellings_of_published_files():
    fields = TINY.to_hf() | {"no_rope_layers": [], "attn_temperature_tuning": 4}
    assert LlamaConfig.from_hf(fields).llama4 == Llama4Attention(nope_layers=(3,))
    del fields["model_type"]
    assert LlamaConfig.from_hf(fields).llama4 is not None
    full = {"layer_types": ["full_attention"] * TINY.num_layers}
    assert LlamaConfig.from_hf(fields | full | {"attention_chunk_size": None}).llama4 is not None
    with pytest.raises(ConfigError, match="layer_types: expected chunked"):
        LlamaConfig.from_hf(fields | full)


def test_fewer_layers_keep_their_kind():
    config = dataclasses.replace(TINY, num_layers=2)
    assert [config.uses_rope(i) for i in range(2)] == [True, False]
    assert config == dataclasses.replace(tiny(llama4=Llama4Attention((1,))), num_layers=2)


@pytest.mark.parametrize(
    "change, message",
    [({"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 5 layers"),
     ({"layer_types": ["full_attention"] * 5}, "layer_types: expected chunked attention in"),
     ({"attention_chunk_size": 0}, "chunk 0: expected a number of positions"),
     ({"floor_scale": -1}, "floor_scale -1: expected a number of positions"),
     ({"model_type": "mllama"}, "Llama4ForCausalLM: expected LlamaForCausalLM or Llama4")],
)  # fmt: skip
def test_what_cannot_be_run_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_hf(TINY.to_hf() | change)
