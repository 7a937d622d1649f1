"""The comparison of draft recipes takes a run that is there only for what it was."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import ablations
from jax_eagle.config import ConfigError

BASE = Path("configs/smollm2_eagle_cpu.yaml")


@pytest.fixture
def finished_run(tmp_path) -> Path:
    """A run of the base variant that left its config and card."""
    folder = tmp_path / "base"
    (folder / "draft").mkdir(parents=True)
    config = yaml.safe_load(BASE.read_text())
    config |= {"run": str(folder), "output": str(folder / "draft")}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "draft" / "card.json").write_text(json.dumps({"tokens": 7}))
    return folder


def test_a_finished_run_is_taken(finished_run):
    assert ablations.variant(BASE, [], finished_run) == {"tokens": 7}


def test_a_run_with_other_settings_is_refused(finished_run):
    with pytest.raises(ConfigError, match="name another --where"):
        ablations.variant(BASE, ["loss.feature=l1"], finished_run)


def test_variants_differ_in_their_keys_alone(tmp_path):
    base = ablations.settings(100, "chats.jsonl", tmp_path, [])
    for keys in ablations.VARIANTS.values():
        own = ablations.settings(100, "chats.jsonl", tmp_path, keys)
        kept = [key for key in own if key not in keys]
        # EAGLE-3 drafts keep other features of the target.
        assert [x for x in kept if "features=" not in x] == [
            x for x in base if "features=" not in x
        ]
        assert ablations.load_config(BASE, own)


def test_figures_come_from_the_card():
    card = {
        "tokens": 7, "seconds": 3,
        "acceptance": {"acceptance_length/chain:3": 1.5, "joint/depth1": 0.4, "rank/depth1": 0.1},
    }  # fmt: skip
    expected = {"variant": "base", "tokens": 7, "seconds": 3, "acceptance_length/chain:3": 1.5}
    assert ablations.row("base", card) == expected
