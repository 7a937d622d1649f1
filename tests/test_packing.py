"""Weights in column blocks: the same products, beside the kernels they repeat."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st

from jax_eagle import Draft, Target, bench, generate, packing
from jax_eagle.config import DraftConfig, LlamaConfig
from jax_eagle.eagle import abstract_draft_params, init_draft_params
from jax_eagle.llama import abstract_params, init_params
from jax_eagle.packing import BLOCKS, column_blocks, matmul

pytestmark = pytest.mark.usefixtures("quick_compiler")

CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=32, max_position=64, tie_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(init_params(CONFIG, jax.random.key(0)), CONFIG)


@pytest.fixture(scope="module")
def draft() -> Draft:
    config = DraftConfig.for_target(CONFIG, draft_vocab_size=64)
    ids = jnp.arange(64, dtype=jnp.int32) * 2
    return Draft(init_draft_params(config, jax.random.key(1)), ids, config)


MEASURE = packing.few_rows_pay.__wrapped__
"""As it is outside of tests (`blocks_serve`), without the memory of an earlier call."""


@given(seed=st.integers(0, 2**16), rows=st.sampled_from([1, 2, 3, 8, 9]))
def test_product_in_blocks(seed, rows):
    rng = np.random.default_rng(seed)
    x, kernel = rng.standard_normal((rows, 20)), rng.standard_normal((20, 128))
    blocks = column_blocks(jnp.float32(kernel))
    assert blocks is not None and blocks.shape == (2, 20, 64)
    # The kernel itself is NaN wherever the blocks must do.
    wrong = jnp.full((20, 128), jnp.nan) if rows <= 8 else jnp.float32(kernel)
    y = matmul(jnp.float32(x).reshape(1, rows, 20), wrong, blocks)
    np.testing.assert_allclose(y[0], x @ kernel, rtol=1e-5, atol=1e-5)


def test_columns_that_fill_no_block_stay_as_they_are():
    assert column_blocks(jnp.ones((4, 96))) is None


@given(seed=st.integers(0, 2**16), rows=st.sampled_from([1, 4, 9]))
def test_tied_head_is_the_product_with_the_table_turned(seed, rows):
    rng = np.random.default_rng(seed)
    x, table = rng.standard_normal((rows, 20)), rng.standard_normal((2048, 20))
    for blocks in (None, column_blocks(jnp.float32(table.T))):
        y = packing.tied_head(jnp.float32(x).reshape(rows, 1, 20), jnp.float32(table), blocks)
        np.testing.assert_allclose(y[:, 0], x @ table.T, rtol=1e-5, atol=1e-5)
    # Sums of bfloat16 are made and given out in float32, as asked.
    halved = jnp.bfloat16(x), jnp.bfloat16(table)
    y = packing.tied_head(*halved, None, jnp.float32)
    expected = np.float32(halved[0]) @ np.float32(halved[1]).T
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_the_table_is_not_turned_on_a_cpu():
    head = jax.jit(functools.partial(packing.tied_head, blocks=None))
    compiled = head.lower(jnp.ones((4, 20)), jnp.ones((2048, 20))).compile().as_text()
    [result] = re.findall(r"= (\S+) dot\(", compiled)
    assert result.startswith("f32[2048,4]")


def test_only_blocks_that_serve_are_made(target, monkeypatch):
    wide = jnp.ones((8, 2048))
    assert packing.useful_blocks(wide) is not None
    monkeypatch.setattr(packing, "few_rows_pay", lambda: False)
    assert packing.useful_blocks(wide) is None
    assert packing.useful_blocks(wide[:, :1024]) is not None  # one row takes them
    several, wrong = jnp.ones((2, 20)), jnp.full((2, 20, 64), jnp.nan)
    assert bool(jnp.all(packing.matmul(several, jnp.ones((20, 128)), wrong) == 20))


def test_the_faster_way_is_taken(monkeypatch):
    seconds = {packing._by_kernels: 3.0, packing._by_blocks: 2.0}
    monkeypatch.setattr(packing, "_seconds", lambda chain, x, weights: seconds[chain])
    assert MEASURE() is True
    seconds[packing._by_blocks] = 2.9
    assert MEASURE() is False  # not by enough


def test_the_machine_is_measured_under_a_trace_too(monkeypatch):
    monkeypatch.setattr(packing, "_PROBE_KERNELS", ((64, 64),) * 2)
    jax.jit(lambda x: (MEASURE(), x)[1])(1.0)


def test_shapes_alone_measure_nothing(monkeypatch):
    def refuse():
        raise AssertionError("measured")

    monkeypatch.setattr(packing, "few_rows_pay", refuse)
    wide = dataclasses.replace(CONFIG, intermediate_size=2048)
    abstract_params(wide)
    abstract_draft_params(DraftConfig.for_target(wide))
    with pytest.raises(AssertionError, match="measured"):
        Target(init_params(wide, jax.random.key(0)), wide).pack()


def test_both_ways_compute_the_same():
    kernels = [jnp.eye(64) * 2, jnp.ones((64, 128))]
    x = jnp.arange(4 * 64, dtype=jnp.float32).reshape(4, 64)
    by_blocks = packing._by_blocks(x, [column_blocks(kernel) for kernel in kernels])
    np.testing.assert_allclose(packing._by_kernels(x, kernels), by_blocks, rtol=1e-6)


def test_every_kernel_with_whole_blocks_is_packed(target, draft):
    packed = target.pack()
    flat = traverse_util.flatten_dict(packed.params)
    modules = {path[:-1] for path in flat if path[-1] in ("kernel", "embedding")}
    narrow = {path for path in modules if path[-1] in "kv"}  # 32 columns
    assert {path[:-1] for path in flat if path[-1] == BLOCKS} == modules - narrow
    assert packed.packed and not target.packed
    assert bench.weight_bytes(packed) == bench.weight_bytes(target)
    assert ("fc", BLOCKS) in traverse_util.flatten_dict(draft.pack().params)


def test_new_parameters_leave_the_blocks_behind(target):
    other = Target(init_params(CONFIG, jax.random.key(5)), CONFIG)
    prompt = [[3, 1, 4, 1, 5]]
    swapped = target.pack().replace(params=other.params)
    expected = generate(other, None, prompt, max_new_tokens=8).tokens
    assert generate(swapped, None, prompt, max_new_tokens=8).tokens == expected


@pytest.mark.slow  # test_smollm2 does it with the real model
def test_packed_models_give_the_same_text(target, draft):
    tree = "static:4"
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    options = {"max_new_tokens": 24, "stop_token_ids": [], "tree": tree}
    plain = generate(target, None, prompts, **options)
    packed = generate(target.pack(), draft.pack(), prompts, **options)
    assert packed.tokens == plain.tokens
    assert packed.rounds == generate(target, draft, prompts, **options).rounds
