"""Settings of a training run that cannot be, refused before anything is read or computed."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eagle.config import ConfigError
from tests.training import CONFIG
from train import init
from train.config import DraftSettings, TrainConfig, from_tree, to_tree

TREE: dict[str, Any] = {
    "target": "a", "run": "b", "output": "c",
    "data": {"sources": [{"kind": "text", "path": "d"}]},
}  # fmt: skip


def config(**sections: Any) -> TrainConfig:
    """The defaults, with `data.length=9` given as `data={"length": 9}`."""
    tree = TREE | sections
    tree["data"] = TREE["data"] | tree["data"]
    return from_tree(TrainConfig, tree, "run.yaml")


def test_defaults_are_read_back():
    assert from_tree(TrainConfig, to_tree(config()), "run.yaml") == config()


@pytest.mark.parametrize(
    "low, section, names",
    [
        (1, "data", ["batch", "epochs", "overlap_words"]),
        (8, "data", ["length"]),
        (0, "data", ["keep_features_gb"]),
        (1, "draft", ["num_layers", "start_rows", "vocab_size"]),
        (1, "loss", ["chunk", "top_k"]),
        (0, "loss", ["feature_noise", "decay", "feature_weight", "logits_weight"]),
        (1, "optimizer", ["accumulate"]),
        (1, "mesh", ["data", "fsdp", "tensor"]),
        (1, "evaluation", ["num_prompts", "depth", "every"]),
        (2, "evaluation", ["max_new_tokens"]),
        (0, "checkpoint", ["minutes"]),
        (1, "checkpoint", ["steps", "keep_last", "keep_best"]),
    ],
)
def test_bounds(low, section, names):
    for name in names:
        message = f"run.yaml: {section}: {name} {low - 1}(.0)?: expected at least {low}"
        with pytest.raises(ConfigError, match=message):
            config(**{section: {name: low - 1}})
        assert getattr(getattr(config(**{section: {name: low}}), section), name) == low


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"log_every": 0}, "log_every 0: expected at least 1"),
        ({"max_minutes": float("nan")}, "max_minutes nan: expected at least 0"),
        ({"data": {"validation_share": 1.5}}, "validation_share 1.5: expected 0 or more"),
        ({"data": {"validation_share": float("nan")}}, "validation_share nan: expected"),
        ({"data": {"sources": []}}, "sources: expected at least one"),
        (
            {"data": {"sources": [{"kind": "text", "path": "d", "answer_weight": -1}]}},
            "answer_weight -1.0: expected at least 0",
        ),
        ({"draft": {"taps": [1, 2, 3]}}, "taps .1, 2, 3.: a setting of kind 'eagle3', not eagle"),
        ({"draft": {"kind": "eagle3", "taps": []}}, "taps ..: expected layers, or null"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@given(st.lists(st.integers(-2, CONFIG.num_layers + 1), min_size=2, max_size=4))
def test_taps_are_distinct_layers_of_the_target_low_to_high(taps):
    settings = DraftSettings(kind="eagle3", taps=tuple(taps))
    if taps == [i for i in range(CONFIG.num_layers) if i in taps]:
        assert init.draft_config(settings, CONFIG).taps == tuple(taps)
    else:
        with pytest.raises(ConfigError, match=r"draft.taps .*low to high, in 0\.\.7"):
            init.draft_config(settings, CONFIG)


def test_what_a_target_has_not():
    target = dataclasses.replace(CONFIG, max_position=64)
    init.check_target(config(data={"length": 64}), target)
    with pytest.raises(ConfigError, match="data.length 65: the target reads 64 positions"):
        init.check_target(config(data={"length": 65}), target)
    for top_k, vocab_size in ((41, None), (25, 24)):
        loss, draft = {"logits": "top_k_kl", "top_k": top_k}, {"vocab_size": vocab_size}
        with pytest.raises(ConfigError, match=f"top_k {top_k}: the draft knows {top_k - 1} tokens"):
            init.check_target(config(loss=loss, draft=draft, data={"length": 64}), target)
        fewer = loss | {"top_k": top_k - 1}
        init.check_target(config(loss=fewer, draft=draft, data={"length": 64}), target)
