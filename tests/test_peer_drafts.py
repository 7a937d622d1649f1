"""Drafts that other people's code made, against what that code makes of them (make_draft_goldens).

The official code (EAGLE-1) and speculators (EAGLE-3): their folders are read, give the same states
and proposals, and are what an export writes, tensor for tensor.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
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

PREFIX = 40
"""Tokens before the official tree, its root included."""
TARGET = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=64, num_layers=6, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=256, tie_embeddings=False, dtype="float32",
)  # fmt: skip
PROFILES = {
    "eagle1": ("eagle-llama-vllm", {}),
    "eagle3": ("speculators", {"verifier": "tiny"}),
}
"""The form of each folder, and what its export needs."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A golden draft with some target that has its embedding (and its head, if it has none)."""

    target: Target
    draft: Draft
    expected: dict[str, np.ndarray]

    @classmethod
    def load(cls, name: str) -> "Peer":
        with np.load(GOLDENS / name / "expected.npz") as file:
            expected = dict(file)
        params = init_params(TARGET, jax.random.key(0))
        embedding = load_file(GOLDENS / name / "model.safetensors")["embed_tokens.weight"]
        params |= {"embed": {"embedding": jnp.asarray(embedding)}}
        if "lm_head" in expected:
            params |= {"lm_head": {"kernel": jnp.asarray(expected["lm_head"].T)}}
        target = Target(params, TARGET)
        return cls(target, load_draft(GOLDENS / name, target), expected)

    def states(self, draft: Draft) -> jax.Array:
        """Row i holds token i and the feature before it: the row i - 1 of others."""
        tokens = jnp.asarray(self.expected["tokens"])
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        text = Text(tokens, jnp.ones_like(tokens), position)
        [first] = unroll(draft, self.target, text, jnp.asarray(self.expected["features"]), 1)
        return first.state[:, 1:]


@pytest.fixture(scope="module", params=PROFILES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def eagle1() -> Peer:
    return Peer.load("eagle1")


@pytest.fixture(scope="module")
def eagle3() -> Peer:
    return Peer.load("eagle3")


def check(actual: jax.Array, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_states_are_those_of_the_official_code(eagle1):
    check(eagle1.states(eagle1.draft), eagle1.expected["states"])


def test_the_official_tree_gets_the_same_tokens(eagle1):
    B, layer, expected = 2, eagle1.draft.config.layer, eagle1.expected
    cache = init_cache(layer, jnp.array([[1, 2, 3], [4, 5, 6]]), num_pages=7, page_size=16)
    features = jnp.roll(jnp.asarray(expected["features"]), 1, axis=1)[:, :PREFIX]
    sync = Sync(jnp.asarray(expected["tokens"][:, :PREFIX]), features, jnp.full(B, PREFIX))
    head, tree = eagle1.draft.bind_head(eagle1.target), parse_tree("static:eagle-26")
    _, proposal = eagle1.draft.expand(eagle1.target, head, tree, cache, sync, None)
    np.testing.assert_array_equal(proposal.tokens[:, 1:], expected["tree_tokens"])


@pytest.mark.parametrize("before", [True, False])
def test_states_and_logits_are_those_of_speculators(eagle3, before):
    draft, behind = eagle3.draft, "" if before else "_after"
    assert draft.config.norm_before_residual and draft.config.taps == (2, 4, 5)
    config = dataclasses.replace(draft.config, norm_before_residual=before)
    draft = draft.replace(config=config)
    states = eagle3.states(draft)
    check(states, eagle3.expected["states" + behind])
    logits = draft.bind_head(eagle3.target)(states)
    check(logits, eagle3.expected["logits" + behind])


def test_an_export_is_what_the_other_code_saved(name, tmp_path):
    peer, (profile, options) = Peer.load(name), PROFILES[name]
    save(peer.draft, tmp_path, profile, target=peer.target, with_embedding=True, **options)
    written, theirs = (load_file(each / "model.safetensors") for each in (tmp_path, GOLDENS / name))
    assert written.keys() == theirs.keys()  # they load strictly
    for key, value in theirs.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
        assert written[key].dtype == value.dtype, key
    assert load_draft(tmp_path, peer.target).config == peer.draft.config
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses others
