"""A draft of the official EAGLE code against what that code makes of it (`make_draft_goldens`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_eagle import Draft, Target, load_draft
from jax_eagle.cache import init_cache
from jax_eagle.checkpoint.profiles import save
from jax_eagle.config import LlamaConfig
from jax_eagle.draft import Sync
from jax_eagle.llama import init_params
from jax_eagle.tree import parse_tree
from jax_eagle.unroll import Text, unroll
from tests.golden import GOLDENS

pytestmark = pytest.mark.usefixtures("quick_compiler")

FOLDER = GOLDENS / "eagle1"
PREFIX = 40
"""Tokens before the official tree, its root included."""
TARGET = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=256, tie_embeddings=False, dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "expected.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def target(expected) -> Target:
    """Some target with the embedding and the head that the official code had."""
    params = init_params(TARGET, jax.random.key(0))
    embedding = load_file(FOLDER / "model.safetensors")["embed_tokens.weight"]
    own = {
        "embed": {"embedding": jnp.asarray(embedding)},
        "lm_head": {"kernel": jnp.asarray(expected["lm_head"].T)},
    }
    return Target(params | own, TARGET)


@pytest.fixture(scope="module")
def draft(target) -> Draft:
    return load_draft(FOLDER, target)


def test_states_are_those_of_the_official_code(target, draft, expected):
    tokens = jnp.asarray(expected["tokens"])
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    text = Text(tokens, jnp.ones_like(tokens), position)
    [first] = unroll(draft, target, text, jnp.asarray(expected["features"]), 1)
    assert np.abs(expected["states"]).max() > 1
    # Row i holds token i: the official row i - 1.
    np.testing.assert_allclose(first.state[:, 1:], expected["states"], atol=2e-5)


def test_the_official_tree_gets_the_same_tokens(target, draft, expected):
    B, layer = 2, draft.config.layer
    cache = init_cache(layer, jnp.array([[1, 2, 3], [4, 5, 6]]), num_pages=7, page_size=16)
    features = jnp.roll(jnp.asarray(expected["features"]), 1, axis=1)[:, :PREFIX]
    sync = Sync(jnp.asarray(expected["tokens"][:, :PREFIX]), features, jnp.full(B, PREFIX))
    tree = parse_tree("static:eagle-26")
    _, proposal = draft.expand(target, draft.bind_head(target), tree, cache, sync, None)
    np.testing.assert_array_equal(proposal.tokens[:, 1:], expected["tree_tokens"])


def test_an_export_is_the_official_state_dict(target, draft, tmp_path):
    save(draft, tmp_path, "eagle-llama-vllm", target=target, with_embedding=True)
    written, official = (load_file(each / "model.safetensors") for each in (tmp_path, FOLDER))
    assert written.keys() == official.keys()  # the official code loads strictly
    for name, value in official.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    again = load_draft(tmp_path, target)
    assert dataclasses.replace(again.config, layer=draft.config.layer) == draft.config
