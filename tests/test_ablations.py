"""Comparisons of drafts: runs are taken only for what they were, prompts at even distances."""

import itertools
import json
from pathlib import Path

import pytest

from benchmarks import ablations, speed
from jax_eagle.config import ConfigError
from train.checkpoint import save_config
from train.config import load_config

BASE = Path("configs/smollm2_eagle_cpu.yaml")


@pytest.fixture
def finished_run(tmp_path) -> Path:
    """A run of the base variant that left its config and card."""
    folder = tmp_path / "base"
    (folder / "draft").mkdir(parents=True)
    own = [f"run={folder}", f"output={folder / 'draft'}"]
    save_config(load_config(BASE, own), folder)
    (folder / "draft" / "card.json").write_text(json.dumps({"tokens": 7}))
    return folder


def test_a_finished_run_is_taken(finished_run):
    assert ablations.variant(BASE, [], finished_run) == {"tokens": 7}


def test_a_run_with_other_settings_is_refused(finished_run):
    with pytest.raises(ConfigError, match="loss.feature was 'smooth_l1', not 'l1'"):
        ablations.variant(BASE, ["loss.feature=l1"], finished_run)


def test_every_variant_is_another_run(tmp_path):
    configs = [
        load_config(BASE, ablations.settings(100, "chats.jsonl", tmp_path, keys))
        for keys in ablations.VARIANTS.values()
    ]
    assert all(a != b for a, b in itertools.combinations(configs, 2))


def test_figures_come_from_the_card():
    card = {
        "tokens": 7, "seconds": 3,
        "acceptance": {"acceptance_length/chain:3": 1.5, "joint/depth1": 0.4, "rank/depth1": 0.1},
    }  # fmt: skip
    expected = {"variant": "base", "tokens": 7, "seconds": 3, "acceptance_length/chain:3": 1.5}
    assert ablations.row("base", card) == expected


def test_prompts_are_taken_at_even_distances():
    texts = list("abcdefgh")
    assert speed.spread(texts, 4) == ["a", "c", "e", "g"]
    assert speed.spread(texts, 5) == ["a", "b", "d", "e", "g"]
    assert speed.spread(texts, 99) == texts
