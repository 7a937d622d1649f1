"""Floors beside a table that was worked out apart from this code, and what holds for all floors."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eagle.checkpoint import hf
from jax_eagle.config import DraftConfig, Llama4Attention, LlamaConfig, MoE
from jax_eagle.roofline import (
    H100,
    H200,
    Roofline,
    WeightBytes,
    Weights,
    distinct_experts,
    seen_tokens,
)

TARGETS = Path(__file__).parents[1] / "configs" / "targets"
CONFIGS = {path.name: hf.read_config(path, dtype="bfloat16") for path in TARGETS.iterdir()}
LLAMA_8B, LLAMA_70B = CONFIGS["llama-3.1-8b"], CONFIGS["llama-3.3-70b"]
SCOUT, MAVERICK = CONFIGS["llama-4-scout"], CONFIGS["llama-4-maverick"]
BF16, FP8, FP8_EXPERTS = WeightBytes(), WeightBytes(1, 1, 1, 2), WeightBytes(experts=1)
INT4 = WeightBytes(4.25 / 8, 4.25 / 8, 4.25 / 8, 2)
EIGHT_H100, ONE_H100, ONE_H200 = Roofline(H100, 8), Roofline(H100), Roofline(H200)


@pytest.mark.parametrize(
    "name, billions, active",
    [
        ("llama-3.1-8b", 8.03, 7.50),
        ("llama-3.3-70b", 70.55, 69.50),
        ("llama-4-scout", 107.77, 16.14),
        ("llama-4-maverick", 400.71, 16.15),
    ],
)
def test_weights_are_those_the_models_are_known_for(name, billions, active):
    config, count = CONFIGS[name], Weights.of(CONFIGS[name])
    embedding = count.head
    assert (count.every_token + count.experts + embedding) / 1e9 == pytest.approx(
        billions, abs=0.01
    )
    share = config.moe.experts_per_token / config.moe.num_experts if config.moe else 0
    assert (count.every_token + share * count.experts) / 1e9 == pytest.approx(active, abs=0.01)


@pytest.mark.parametrize(
    "config, weights, roofline, cells",
    [  # {(batch, nodes): milliseconds} at 8192 cached tokens
        (LLAMA_8B, BF16, EIGHT_H100, {(1, 1): 0.80, (1, 16): 0.93, (8, 4): 1.33, (64, 8): 4.97}),
        (LLAMA_8B, BF16, ONE_H100, {(1, 1): 4.80, (32, 1): 14.74, (256, 4): 97.63}),
        (LLAMA_8B, BF16, ONE_H200, {(1, 64): 3.84, (64, 1): 19.47}),
        (LLAMA_70B, BF16, EIGHT_H100, {(1, 1): 5.81, (32, 4): 10.66, (256, 4): 55.05}),
        (LLAMA_70B, FP8, EIGHT_H100, {(1, 1): 3.26, (1, 16): 3.86, (8, 4): 4.72, (64, 1): 10.66}),
        (SCOUT, INT4, ONE_H100, {(1, 1): 3.49, (1, 4): 6.02, (8, 1): 12.08, (64, 1): 47.91}),
        (SCOUT, FP8, EIGHT_H100, {(1, 1): 1.01, (1, 64): 4.85, (32, 4): 7.01, (64, 1): 8.63}),
        (SCOUT, FP8, ONE_H200, {(1, 1): 4.37, (1, 16): 17.44, (8, 4): 25.21}),
        (MAVERICK, FP8_EXPERTS, EIGHT_H100, {(1, 1): 1.46, (8, 1): 2.75, (64, 8): 22.25}),
        (MAVERICK, FP8, EIGHT_H100, {(1, 4): 1.39, (8, 4): 4.91, (64, 1): 10.89}),
    ],
)
def test_steps_take_what_the_table_says(config, weights, roofline, cells):
    for (batch, nodes), expected in cells.items():
        floor = roofline.step(config, batch=batch, nodes=nodes, context=8192, weights=weights)
        assert 1e3 * floor.seconds == pytest.approx(expected, rel=0.02), (batch, nodes)


@pytest.mark.parametrize(
    "config, weights, expected",
    [
        (LLAMA_8B, BF16, (0.83, 0.98, 1.46)),
        (LLAMA_70B, FP8, (3.45, 3.84, 5.04)),
        (SCOUT, FP8, (2.29, 2.39, 2.57)),
        (MAVERICK, FP8_EXPERTS, (2.28, 2.38, 2.56)),
    ],
)
def test_contexts_beyond_a_chunk(config, weights, expected):
    floors = [
        EIGHT_H100.step(config, batch=1, nodes=8, context=context, weights=weights)
        for context in (1024, 32768, 131072)
    ]
    assert [1e3 * floor.seconds for floor in floors] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "config, expected",
    [(LLAMA_8B, (0.20, 0.26, 0.91)), (LLAMA_70B, (0.52, 0.81, 3.57)), (SCOUT, (0.31, 0.41, 1.56))],
)
def test_all_reduces(config, expected):
    shapes = (1, 1), (1, 8), (64, 4)
    floors = [EIGHT_H100.step(config, batch=b, nodes=m, context=8192) for b, m in shapes]
    assert [1e3 * floor.collectives for floor in floors] == pytest.approx(expected, abs=0.006)
    assert ONE_H100.step(config, batch=64, nodes=4, context=8192).collectives == 0


@pytest.mark.parametrize(
    "config, weights, roofline, ffn, expected",
    [  # ms a token: a chain of 3 at acceptance length 2.5, a tree of 16 at 3.5
        (LLAMA_8B, BF16, EIGHT_H100, 14336, (0.38, 0.31)),
        (LLAMA_8B, BF16, ONE_H200, 14336, (1.72, 1.28)),
        (LLAMA_70B, FP8, EIGHT_H100, 28672, (1.48, 1.22)),
        (SCOUT, FP8, EIGHT_H100, 32768, (0.74, 1.03)),
        (MAVERICK, FP8_EXPERTS, EIGHT_H100, 32768, (0.82, 1.02)),
    ],
)
def test_rounds_with_an_eagle3_draft_of_one_layer(config, weights, roofline, ffn, expected):
    layer = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=ffn,
        num_layers=1, num_heads=config.num_heads, num_kv_heads=8, head_dim=128,
    )  # fmt: skip
    draft = DraftConfig(
        layer, 3 * config.hidden_size, taps=(2, 3, 4), draft_vocab_size=32000, own_head=True
    )
    found = []
    for nodes, gained, rows in ((4, 2.5, (2.5, 1, 1)), (16, 3.5, (3.5, 4, 4, 4))):
        at = {"batch": 1, "context": 8192}
        floor = roofline.step(config, nodes=nodes, weights=weights, **at)
        floor += roofline.drafting(draft, rows=rows, **at)
        found.append(1e3 * floor.seconds / gained)
    assert found == pytest.approx(expected, rel=0.02)


def test_the_fc_of_eagle_runs_in_every_pass_that_of_eagle3_in_the_first():
    layer = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
        num_kv_heads=4, head_dim=16,
    )  # fmt: skip
    passes = {}
    for draft in (DraftConfig(layer, 64), DraftConfig(layer, 192, taps=(1, 2, 3), own_head=True)):
        passes[draft.is_eagle3] = [
            ONE_H100.drafting(draft, batch=1, context=0, rows=(1,) * count).dense
            for count in (1, 2)
        ]
    dense = 2 * (4 * 64 * 64 + 3 * 64 * 128) + 64 * 256
    (one, two), seconds = passes[False], 2 / H100.bandwidth
    assert one == pytest.approx((dense + 128 * 64) * seconds) and two == pytest.approx(2 * one)
    one, two = passes[True]
    dense += 3 * 64 * 64  # q, k and v of the first layer read two states
    assert one == pytest.approx((dense + 192 * 64) * seconds)
    assert two == pytest.approx((2 * dense + 192 * 64) * seconds)


@given(st.integers(1, 4), st.integers(0, 5))
def test_distinct_experts_is_the_mean_over_all_draws(num_experts, num_tokens):
    draws = list(itertools.product(range(num_experts), repeat=num_tokens))
    mean = sum(len(set(draw)) for draw in draws) / len(draws)
    assert distinct_experts(num_experts, 1, num_tokens) == pytest.approx(mean)


def test_layers_in_chunks_see_no_more_than_one():
    layer = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=4, num_heads=2,
        num_kv_heads=2, head_dim=8, llama4=Llama4Attention(nope_layers=(3,), chunk=100),
    )  # fmt: skip
    assert [seen_tokens(layer, context) for context in (60, 100, 1000)] == [240, 400, 1300]


@given(st.integers(1, 64), st.integers(1, 32), st.integers(0, 20000), st.sampled_from((1, 2, 8)))
def test_more_work_never_takes_less_time(batch, nodes, context, devices):
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_layers=4, num_heads=8,
        num_kv_heads=4, head_dim=16, llama4=Llama4Attention(nope_layers=(3,), chunk=512),
        moe=MoE(num_experts=8, experts_per_token=2, layers=(1, 3), intermediate_size=64),
    )  # fmt: skip
    roofline = Roofline(H100, devices)

    def seconds(**changes):
        return roofline.step(
            config, **{"batch": batch, "nodes": nodes, "context": context} | changes
        )

    least = seconds()
    assert least.seconds <= seconds(nodes=nodes + 1).seconds
    assert least.seconds <= seconds(batch=batch + 1).seconds
    assert least.seconds <= seconds(context=context + 1).seconds
    assert seconds(weights=WeightBytes(1, 1, 1, 1)).seconds <= least.seconds
    whole = Roofline(H100).step(config, batch=batch, nodes=nodes, context=context)
    assert least.dense == pytest.approx(whole.dense / devices)
    if devices <= 4:  # or two devices hold the same KV head
        assert least.attention == pytest.approx(whole.attention / devices)
