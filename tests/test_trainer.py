"""Runs of the trainer on a tiny model with real files: their results; killed, resumed, refused."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jax_eagle import generate, load_draft, load_target
from jax_eagle.config import ConfigError
from jax_eagle.program import run_program
from tests.serving import ROOT
from tests.training import save_chats, save_tiny_target
from train import checkpoint
from train.config import TrainConfig, from_tree, load_config, to_tree
from train.evaluate import Evaluator
from train.log import read_metrics
from train.throughput import step_flops
from train.train import main
from train.trainer import TrainingError, run

pytestmark = pytest.mark.usefixtures("quick_compiler")

STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A target and chats to learn.

    Runs are compared bit by bit with those of other processes: no program is one of other tests.
    """
    jax.clear_caches()
    folder = tmp_path_factory.mktemp("training")
    save_tiny_target(folder / "target")
    save_chats(folder / "chats.jsonl", 60)
    return folder


@pytest.fixture(autouse=True, scope="module")
def known_peak():
    """Of the machine; to measure it takes a second of each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.trainer.measured_peak", lambda dtype: 1e11)
        yield


def settings(folder: Path, run: str, **changes) -> dict:
    """A run of ten steps, as YAML would give it; `changes` by dotted key with _ for the dot."""
    tree = {
        "target": str(folder / "target"),
        "run": str(folder / run),
        "output": str(folder / run / "draft"),
        "data": {
            "sources": [{"kind": "chat", "path": str(folder / "chats.jsonl")}],
            "length": 64, "batch": 2, "validation_share": 0.1, "keep_features_gb": 0.01,
        },
        "draft": {"vocab_size": 120, "start": "random"},
        "loss": {"unroll": 2, "chunk": 16, "feature_noise": 0.1},
        "optimizer": {"learning_rate": 2e-3, "ema": 0.9},
        "evaluation": {
            "num_prompts": 3, "max_new_tokens": 8, "depth": 2, "trees": ["chain:2"], "every": 1000,
        },
        "checkpoint": {"steps": 2, "keep_last": 20},
        "log_every": 1,
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("_")
        if name and section in tree and isinstance(tree[section], dict):
            tree[section] = {**tree[section], name: value}
        else:
            tree[key] = value
    return tree


def config(folder: Path, run: str, **changes) -> TrainConfig:
    return from_tree(TrainConfig, settings(folder, run, **changes), "test")


def command(folder: Path, run: str, *options: str, **changes) -> list[str]:
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(settings(folder, run, **changes)))
    return [sys.executable, "-m", "train.train", "--config", str(path), *options]


def state_of(run: Path, step: int | None = None) -> dict:
    """Arrays and progress of a checkpoint; seconds differ from run to run."""
    with checkpoint._manager(run, checkpoint.LATEST) as manager:
        step = manager.latest_step() if step is None else step
        stored = manager.item_metadata(step)["state"]
        restore = checkpoint.ocp.args.StandardRestore(checkpoint._here(stored))
        items = checkpoint.ocp.args.Composite(state=restore)
        arrays = jax.tree.map(np.asarray, manager.restore(step, args=items)["state"])
        progress = dataclasses.asdict(checkpoint._progress(manager, step))
    del progress["seconds"]
    return {"arrays": arrays, "progress": progress}


def assert_same_state(one: dict, other: dict) -> None:
    assert one["progress"] == other["progress"]
    jax.tree.map(np.testing.assert_array_equal, one["arrays"], other["arrays"])


KINDS = {
    "eagle": {},
    "eagle3": {  # online, from the closed form, in parts
        "draft": {"kind": "eagle3", "vocab_size": 120, "taps": [0, 1], "start_rows": 4},
        "loss": {"feature": "none", "logits": "kl", "unroll": 2, "chunk": 16},
        "data_keep_features_gb": 0.0,
        "optimizer_accumulate": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """A run that nobody interrupted."""
    card = run(config(folder, "whole"))
    assert card["steps"] >= STEPS
    return folder / "whole"


def test_a_run_leaves_what_a_user_wants(folder, whole):
    target = load_target(folder / "target")
    draft = load_draft(whole / "draft", target)
    prompts = [[1, 2, 3] * 12, [4], [5, 6]]  # as many and as long as in the evaluation
    text = generate(target, draft, prompts, max_new_tokens=8, tree="chain:2")
    assert text.tokens == generate(target, None, prompts, max_new_tokens=8).tokens
    card = json.loads((whole / "draft" / "card.json").read_text())
    assert card["acceptance"]["acceptance_length/chain:2"] >= 1
    assert (whole / "acceptance.png").stat().st_size > 1000
    assert any((whole / "tensorboard").iterdir())
    records = [r for r in read_metrics(whole) if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, card["steps"] + 1))
    losses = [r["loss"] for r in records]
    assert np.median(losses[-8:]) < np.median(losses[:8])
    assert {"loss/pass1", "agreement", "gradient_norm", "tokens_per_second"} <= set(records[0])


@pytest.mark.parametrize("kind", ["eagle", pytest.param("eagle3", marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bit_identical(folder, whole, kind):
    """kill -9 at a moment that differs from run to run, and once more; then to the end."""
    changes, name = KINDS[kind], f"killed-{kind}"
    if changes:
        whole = folder / f"whole-{kind}"
        run(config(folder, whole.name, **changes))
    waits = sorted(map(int, np.random.default_rng().integers(1, STEPS - 2, 2)))
    print(f"killed after steps {waits}")
    for wait in waits:
        kill_after(folder, name, wait, **changes)
    run(config(folder, name, **changes), resume=True)
    last = state_of(whole)["progress"]["feed"]["given"]
    for step in (last, last - 1):
        assert_same_state(state_of(folder / name, step), state_of(whole, step))
    steps = [r["step"] for r in read_metrics(folder / name) if "loss" in r]
    assert steps == sorted(set(steps))


def kill_after(folder: Path, name: str, step: int, **changes) -> None:
    """Starts or resumes a run and kills it when its log shows a step."""
    process = subprocess.Popen(
        command(folder, name, "--resume", **changes), cwd=ROOT, stdout=subprocess.DEVNULL
    )  # fmt: skip
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        path = folder / name / "metrics.jsonl"
        if path.exists() and any(r["step"] >= step for r in read_metrics(folder / name)):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_sigterm_saves_and_ends_with_0(folder, whole):
    process = subprocess.Popen(command(folder, "stopped"), cwd=ROOT)
    path = folder / "stopped" / "metrics.jsonl"
    end = time.monotonic() + 300
    while time.monotonic() < end and not (path.exists() and '"loss"' in path.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    reached = state_of(folder / "stopped")
    step = reached["progress"]["feed"]["given"]
    assert 0 < step < STEPS
    run(config(folder, "stopped"), resume=True)
    assert_same_state(state_of(folder / "stopped"), state_of(whole))


def test_begun_and_stopped_in_one_process(folder, whole):
    """With the features that the other run kept: the target does not run, the state is the same."""
    changes = {"data_features": str(whole / "features"), "evaluation_every": None}
    halves = config(folder, "halves", **changes)
    run(halves, stop_at=5)
    with pytest.raises(ConfigError, match="holds a run already; --resume it"):
        run(halves)
    run(halves, resume=True)
    assert_same_state(state_of(folder / "halves"), state_of(whole))
    evaluated = [r["step"] for r in read_metrics(folder / "halves") if "chains" in r]
    assert evaluated == [state_of(whole)["progress"]["feed"]["given"]]
    target, draft = load_target(folder / "target").config, checkpoint.load_draft(whole).config
    for name, kept in ("whole", False), ("halves", True):
        flops = step_flops(halves, target, draft, kept=kept) / (2 * 64)  # batch, length
        told = [r["flops_per_token"] for r in read_metrics(folder / name) if "loss" in r]
        assert told == pytest.approx([flops] * len(told), rel=1e-6)


def test_the_best_draft_is_exported_not_the_last(folder, monkeypatch):
    """Evaluations as scripted: the second is the best; the eighth is of the exported draft."""
    lengths = iter([1.0, 1.5, 1.2, 1.1, 1.05, 1.04, 1.03, 1.5])
    found = Evaluator.__call__

    def scripted(self, draft):
        evaluation = found(self, draft)
        name = f"acceptance_length/{evaluation.trees[0]}"
        return dataclasses.replace(
            evaluation, figures=evaluation.figures | {name: next(lengths)}
        )  # fmt: skip

    monkeypatch.setattr(Evaluator, "__call__", scripted)
    changes = {"evaluation_every": 5, "checkpoint_steps": 1, "checkpoint_keep_last": 3}
    card = run(config(folder, "best", **changes))
    assert card["acceptance"]["acceptance_length/chain:2"] == 1.5
    kept = sorted(int(p.name) for p in (folder / "best" / "checkpoints").glob("[0-9]*"))
    assert kept == [card["steps"] - 2, card["steps"] - 1, card["steps"]]
    assert [p.name for p in (folder / "best" / "best").iterdir() if p.name.isdigit()] == ["5"]
    wanted = checkpoint.load_draft(folder / "best", which="best")
    target = load_target(folder / "target")
    given = load_draft(folder / "best" / "draft", target)
    jax.tree.map(np.testing.assert_array_equal, given.params, wanted.params)
    latest = checkpoint.load_draft(folder / "best", which="latest")
    assert not np.array_equal(latest.params["fc"]["kernel"], wanted.params["fc"]["kernel"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer_learning_rate": 1e-3}, "optimizer.learning_rate 0.002, the config says 0.001"),
        ({"data_batch": 4}, "begun with data.batch 2, the config says 4"),
        ({"seed": 5}, "begun with seed 0, the config says 5"),
    ],
)
def test_resumed_with_another_config(folder, whole, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(config(folder, "whole", **changes), resume=True)


def test_loss_that_is_not_finite(folder):
    broken = config(folder, "nan", optimizer_learning_rate=1e30, optimizer_clip=1e30)
    with pytest.raises(TrainingError, match=r"step \d+: the loss or its gradient is not finite"):
        run(broken)
    kept = state_of(folder / "nan")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept["arrays"]["params"]))
    assert kept["progress"]["feed"]["given"] == kept["arrays"]["step"]
    with pytest.raises(TrainingError):  # nothing was lost, and nothing is hidden
        run(broken, resume=True)


def test_disk_full_while_saving(folder):
    """Files may not grow beyond a limit from some step on: the checkpoint before it stays."""
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from train import checkpoint\n"
        "from train.config import load_config\n"
        "from train.trainer import run\n"
        "save, count = checkpoint.Checkpoints.save, 0\n"
        "def full(self, *args):\n"
        "    global count\n"
        "    count += 1\n"
        "    self.wait()\n"
        "    if count == 2:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))\n"
        "    save(self, *args)\n"
        "checkpoint.Checkpoints.save = full\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "run(load_config(Path(sys.argv[1])))\n"
    )
    path = command(folder, "full")[-1]
    done = subprocess.run(
        [sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "a checkpoint could not be written" in done.stderr
    assert "that of step 2 stays" in done.stderr
    assert state_of(folder / "full")["arrays"]["step"] == 2


def test_bad_input_ends_with_a_line(folder, capsys):
    chats = folder / "broken.jsonl"
    chats.write_text((folder / "chats.jsonl").read_text() + '{"messages": [\n')
    source = [{"kind": "chat", "path": str(chats)}]
    with pytest.raises(SystemExit) as end:
        run_program(main, "train.train", command(folder, "broken", data_sources=source)[3:])
    text = capsys.readouterr().err
    assert end.value.code == 2
    assert f"{chats}:61: " in text and "Traceback" not in text


def test_config_round_trip(folder):
    given = config(folder, "round")
    assert from_tree(TrainConfig, to_tree(given), "again") == given
    for path in sorted((ROOT / "configs").glob("*_eagle*.yaml")):
        read = load_config(path)
        assert from_tree(TrainConfig, to_tree(read), str(path)) == read
