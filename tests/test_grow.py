"""A grown model is the same function in a larger shape."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.grow import grow_draft, grow_target
from jax_eagle import Draft, Target, generate
from jax_eagle.config import DraftConfig, LlamaConfig, RopeScaling
from jax_eagle.eagle import init_draft_params
from jax_eagle.llama import init_params

pytestmark = pytest.mark.usefixtures("quick_compiler")

SMALL = LlamaConfig(
    vocab_size=11, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=6, num_kv_heads=2,
    head_dim=8, max_position=64, tie_embeddings=True, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 32),
)  # fmt: skip
LARGE = LlamaConfig(
    vocab_size=25, hidden_size=40, intermediate_size=56, num_layers=3, num_heads=12,
    num_kv_heads=3, head_dim=32, max_position=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def pair():
    """(small target, its draft), random but for norm weights that are not all one."""
    key = jax.random.key(0)
    params = init_params(SMALL, key)
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(key, x.shape) if x.ndim == 1 else x, params
    )
    config = DraftConfig.for_target(SMALL, draft_vocab_size=7)
    draft = Draft(init_draft_params(config, key), jnp.arange(4, 11, dtype=jnp.int32), config)
    return Target(params, SMALL), draft


def test_logits_are_equal(pair):
    small, _ = pair
    large = grow_target(small, LARGE)
    tokens = np.arange(26).reshape(2, 13) % SMALL.vocab_size
    before, after = np.asarray(small.logits(tokens)), np.asarray(large.logits(tokens))
    bound = 1e-4 + 2e-5 * np.abs(before).max()
    np.testing.assert_allclose(after[..., :11], before, rtol=0, atol=bound)
    np.testing.assert_array_equal(after[..., 11:22], after[..., :11])  # copies
    np.testing.assert_array_equal(after.argmax(-1), before.argmax(-1))


def test_text_and_acceptance_are_equal(pair):
    small, draft = pair
    large = grow_target(small, LARGE)
    prompts = [[1, 2, 3], [10, 9]]
    options = {"max_new_tokens": 16, "tree": "paths:[[0],[1],[2],[3]]", "stop_token_ids": []}
    before = generate(small, draft, prompts, **options)
    after = generate(large, grow_draft(draft, large), prompts, **options)
    assert before.tokens == after.tokens
    assert before.rounds == after.rounds
    assert sum(before.rounds) < 2 * 15, "no drafted token was accepted: nothing was compared"


def test_every_weight_of_the_larger_shape_is_there(pair):
    small, draft = pair
    large = grow_target(small, LARGE)
    gate = large.params["layers_2"]["mlp"]["gate"]["kernel"]
    assert gate.shape == (40, 56) and np.asarray(gate).all()
    assert not np.asarray(large.params["layers_2"]["mlp"]["down"]["kernel"]).any()


@pytest.mark.parametrize(
    "change, message",
    [({"hidden_size": 16}, "hidden_size 16"), ({"head_dim": 12}, "head_dim 12"),
     ({"num_heads": 6}, "fewer query heads")],
)  # fmt: skip
def test_shapes_that_do_not_hold_the_model_are_refused(pair, change, message):
    with pytest.raises(ValueError, match=message):
        grow_target(pair[0], dataclasses.replace(LARGE, **change))
