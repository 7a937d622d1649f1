"""What a run is said to take before it starts: FLOPs by XLA's count, bytes by real arrays."""

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_eagle import Draft, Target
from jax_eagle.checkpoint import profiles
from jax_eagle.checkpoint.mapping import CheckpointError
from jax_eagle.config import ConfigError, DraftConfig, LlamaConfig
from jax_eagle.eagle import init_draft_params
from jax_eagle.llama import init_params
from train import init
from train.config import DataConfig, DraftSettings, LossConfig, OptimizerConfig, Source, TrainConfig
from train.plan import (
    Place,
    StepMemory,
    abstract_teacher,
    find_place,
    plan,
    verdict,
)
from train.start import empty_state
from train.step import Batch, make_optimizer, make_train_step
from train.throughput import Probe, measured_peak, step_flops

B, T = 4, 64
TARGET = LlamaConfig(
    vocab_size=1024, hidden_size=64, intermediate_size=192, num_layers=1, num_heads=4,
    num_kv_heads=2, head_dim=16,
)  # fmt: skip


def make_config(target="tiny", unroll: int = 1, start: str = "random", **draft: Any) -> TrainConfig:
    feature = "none" if draft.get("kind") == "eagle3" else "smooth_l1"
    return TrainConfig(
        target=str(target),
        run="unused",
        output="unused",
        data=DataConfig((Source("text", "unused", max_tokens=10_000),), length=T, batch=B),
        draft=DraftSettings(start=start, **draft),
        loss=LossConfig(feature=feature, unroll=unroll),
        optimizer=OptimizerConfig(ema=0.9),
    )


@pytest.mark.parametrize(
    "kept, settings",
    [
        (False, {"num_layers": 2}),
        (True, {"unroll": 2, "vocab_size": 256}),
        (True, {"kind": "eagle3", "unroll": 2}),
    ],
)
def test_flops_are_what_xla_counts(kept, settings):
    """Of targets of one layer: XLA counts the body of a scan once.

    XLA counts masked scores as well, and what is not a matrix product (a few percent here).
    """
    config = make_config(**settings)
    is_eagle3 = config.draft.kind == "eagle3"
    target = dataclasses.replace(TARGET, num_layers=8 if is_eagle3 else 1)
    draft = init.draft_config(config.draft, target)
    optimizer = make_optimizer(config, 10)
    width = draft.feature_width + is_eagle3 * target.hidden_size
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    features = jax.ShapeDtypeStruct((B, T, width), jnp.float16) if kept else None
    batch = Batch(ids, ids, ids, jax.ShapeDtypeStruct((B, T), jnp.float32), features)  # type: ignore
    train_step = make_train_step(config, optimizer)
    teacher = abstract_teacher(target, find_place(config, "here"))
    lowered = train_step.lower(empty_state(config, draft, optimizer), teacher, batch)  # type: ignore
    counted = lowered.compile().cost_analysis()["flops"]

    half = B * T * 2 * target.num_heads * target.head_dim * T  # of one layer's attention, forward
    masked = 0 if kept else half * target.num_layers
    for number in range(config.loss.unroll):  # pass j sees j + 1 texts side by side
        masked += 3 * draft.layer.num_layers * half * (2 * (number + 1) - 1)
    expected = step_flops(config, target, draft, kept=kept) + masked
    assert 1.0 < counted / expected < 1.1


def test_a_step_without_the_target_or_with_less_attention_is_less_work():
    config = make_config()
    draft = init.draft_config(config.draft, TARGET)
    whole, kept = (step_flops(config, TARGET, draft, kept=kept) for kept in (False, True))
    half = dataclasses.replace(config, data=dataclasses.replace(config.data, length=T // 2))
    attention = 4 * B * T * 2 * TARGET.hidden_size * T  # target's layer, draft's with its backward
    assert whole - kept == B * T * (2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192) + 2 * 64 * T)
    assert whole - 2 * step_flops(half, TARGET, draft, kept=False) == attention / 2


def test_the_peak_is_the_best_of_its_products():
    peak = measured_peak("float32")
    assert 1e8 < peak < 1e16
    assert Probe("float32")() < 3 * peak


# ---- the plan --------------------------------------------------------------------------------


@pytest.fixture
def target_folder(tmp_path):
    """A target by its shape alone."""
    (tmp_path / "config.json").write_text(json.dumps(TARGET.to_hf()))
    return tmp_path


def gigabytes(text: str) -> dict[str, float]:
    """Sizes in a line, by the word before or behind them, in bytes."""
    units = {"MB": 1e6, "GB": 1e9}
    return {name: float(x) * units[u] for name, x, u in re.findall(r"(\w+) ([\d.]+) (\wB)", text)}


def test_the_plan_needs_no_weights_and_tells_what_arrays_take(target_folder):
    config = make_config(target_folder, num_layers=2)
    lines = list(plan(config, topology="here"))
    text = "\n".join(lines)
    params = jax.tree.leaves(init_params(TARGET, jax.random.key(0)))
    target_bytes = sum(x.nbytes for x in params)
    assert f"{sum(x.size for x in params):,} parameters, float32" in lines[0]
    assert f"tokens a step: 4 x 64 = 256; steps: {-(-9900 // 256)} if" in text

    draft_params = init.random_params(init.draft_config(config.draft, TARGET), jax.random.key(0))
    masters = sum(x.nbytes for x in jax.tree.leaves(draft_params))
    sizes = gigabytes(text)
    expected = {
        "target": target_bytes,
        "masters": masters,
        "moments": 2 * masters,
        "average": masters,
        "gradients": masters,
        "arguments": target_bytes + 4 * masters + 4 * B * T * 4,
        "outputs": 4 * masters,
    }
    assert {name: sizes[name] for name in expected} == pytest.approx(expected, abs=0.06e6)
    in_place = re.search(r"\(([\d.]+) MB of them in place", text)
    assert in_place and float(in_place[1]) * 1e6 == pytest.approx(4 * masters, abs=0.06e6)
    assert sizes["peak"] > sizes["arguments"] + sizes["temporaries"] - 0.2e6
    assert lines[-2].endswith(": fits")


def test_a_plan_to_go_on_from_a_folder(tmp_path):
    """Of EAGLE-3 with a stored embedding: whether it is the target's, weights alone could tell."""
    deep = dataclasses.replace(TARGET, num_layers=8)
    (tmp_path / "config.json").write_text(json.dumps(deep.to_hf()))
    target = Target(init_params(deep, jax.random.key(0)), deep)
    draft_config = DraftConfig.eagle3_for_target(deep)
    draft = Draft(init_draft_params(draft_config, jax.random.key(1)), None, draft_config)
    start = str(tmp_path / "draft")
    profiles.save(draft, start, "eagle3", target=target, with_embedding=True)
    config = make_config(tmp_path, kind="eagle3", start=start)
    sizes = next(line for line in plan(config, topology="here") if line.startswith("draft"))
    count = sum(x.size for x in jax.tree.leaves(draft.params)) + TARGET.vocab_size * 64
    expected = f"1 layers and the embedding that its folder holds: {count:,} parameters, 1,024"
    assert expected in sizes
    with pytest.raises(ConfigError, match="num_layers is 2, but .* has 1"):
        next(plan(make_config(tmp_path, kind="eagle3", start=start, num_layers=2)))


def test_the_verdict(target_folder):
    memory = StepMemory(arguments=50, outputs=30, aliases=20, temporaries=30)
    assert memory.peak == 90
    place = find_place(make_config(target_folder), "here")

    def lines(size: float, described: bool = True) -> str:
        changed = Place("a device", place.mesh, size, described=described)
        return "\n".join(verdict(memory, changed))

    assert lines(200).endswith("fits")
    assert "fits\n" in lines(100) and "XLA_PYTHON_CLIENT_MEM_FRACTION" in lines(100)
    assert "XLA_PYTHON" not in lines(100, described=False)
    assert "does NOT fit: smaller batch" in lines(89)


def test_bad_names(target_folder):
    with pytest.raises(ConfigError, match="topology 'tpu': expected here or h100"):
        next(plan(make_config(target_folder), topology="tpu"))
    with pytest.raises(CheckpointError, match="no such file or folder"):
        next(plan(make_config(target_folder / "nothing"), topology="here"))
