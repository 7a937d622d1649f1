"""Checkpoints of a run: everything that a run killed at any moment goes on from.

config.yaml   the resolved configuration
checkpoints/  Orbax, one folder a step, the newest ones: `state` (arrays) and `progress` (JSON)
best/         the same for the drafts with the greatest acceptance lengths, without their moments

Checkpoints are written in the background and get their name when they are complete, so a kill or a
full disk costs at most the one that was being written.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import yaml

from jax_eagle import Draft
from jax_eagle.checkpoint.mapping import CheckpointError, one_line
from jax_eagle.config import ConfigError, DraftConfig

from .config import CheckpointConfig, TrainConfig, from_tree, to_tree
from .step import TrainState

LATEST, BEST = "checkpoints", "best"
_METRIC = "acceptance_length"
_MAY_CHANGE = {
    "output", "run", "evaluation", "checkpoint", "mesh", "log_every", "max_minutes", "card",
}  # fmt: skip
"""Keys of a config that a resumed run may have otherwise; paths of its data too."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands besides its arrays: JSON."""

    seconds: float
    """Of training, over all starts."""
    tokens: int
    """Real tokens seen, padding not counted."""
    feed: dict[str, Any]
    """What `Feed.restore` takes."""
    draft: dict[str, Any]
    """`DraftConfig.to_dict`."""
    corpus: str
    """`Corpus.fingerprint`."""
    tokenizer: str
    """Hash of tokenizer and chat template."""
    target: str
    """Hash of the target's weights."""


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, run: Path, config: CheckpointConfig):
        self._folder, self._broken = run / LATEST, False
        self._latest = _manager(run, LATEST, max_to_keep=config.keep_last)
        self._best = _manager(run, BEST, max_to_keep=config.keep_best)

    def latest_step(self) -> int | None:
        """The newest whole checkpoint; None if there is none."""
        return self._latest.latest_step()

    def save(self, state: TrainState, progress: Progress) -> None:
        """Begins to write a checkpoint; the state may be donated as soon as this returns.

        Raises:
          CheckpointError: this one or the one before could not be written (disk full).
        """
        self._guarded(lambda: _save(self._latest, state, progress))

    def save_best(self, state: TrainState, progress: Progress, acceptance_length: float) -> None:
        """Writes the draft of an evaluated state if it is among the best; raises as `save`."""
        state = state.replace(opt_state=None)
        self._guarded(lambda: _save(self._best, state, progress, {_METRIC: acceptance_length}))
        self._guarded(self._best.wait_until_finished)

    def wait(self) -> None:
        """Until all checkpoints are complete; raises what `save` does."""
        self._guarded(self._latest.wait_until_finished)

    def _guarded(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except (OSError, ValueError) as error:
            self._broken = True
            # Orbax leaves a future behind for each array, and each would print a trace of its own.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            last = self._latest.latest_step()
            kept = "there is none before it" if last is None else f"that of step {last} stays"
            raise CheckpointError(
                f"{self._folder}: a checkpoint could not be written ({one_line(error)}); {kept}"
            ) from error

    def restore(self, like: TrainState) -> tuple[TrainState, Progress]:
        """The newest checkpoint in the form and on the devices of `like`, which is not read."""
        step = self._latest.latest_step()
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(_arrays(like)), progress=ocp.args.JsonRestore()
        )
        found = self._latest.restore(step, args=items)
        return dataclasses.replace(like, **found["state"]), Progress(**found["progress"])

    def progress(self) -> Progress:
        """That of the newest checkpoint."""
        return _progress(self._latest, self._latest.latest_step())

    def best_step(self) -> int | None:
        """The step with the greatest acceptance length; None before an evaluation."""
        return self._best.best_step()

    def close(self) -> None:
        """Waits, and ends the managers' threads; raises what `save` does, if it has not yet."""
        for manager in self._latest, self._best:
            if self._broken:
                with contextlib.suppress(OSError, ValueError):
                    manager.close()
            else:
                self._guarded(manager.close)


def _save(manager: ocp.CheckpointManager, state: TrainState, progress: Progress, metrics=None):
    step = int(state.step)
    if step in manager.all_steps():
        return
    arrays = _arrays(state)
    if jax.default_backend() == "cpu":  # what is written there would be the donated arrays
        arrays = jax.tree.map(jnp.copy, arrays)
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(arrays),
        progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
    )
    manager.save(step, args=items, metrics=metrics)


def load_draft(run: Path, *, which: str = "best", dtype: str = "float32") -> Draft:
    """The draft of one of a run's checkpoints.

    Args:
      which: "best" by acceptance length (the newest if none was evaluated) or "latest".

    Raises:
      ConfigError: the folder holds no run, or the run has no checkpoint yet.
    """
    names = (BEST, LATEST) if which == "best" else (LATEST,)
    if not (run / LATEST).is_dir():
        raise ConfigError(f"{run}: not the folder of a run ({LATEST}/ is missing)")
    for name in names:
        with _manager(run, name) as manager:
            step = manager.best_step() if name == BEST else manager.latest_step()
            if step is None:
                continue
            stored = manager.item_metadata(step)["state"]
            items = ocp.args.Composite(state=ocp.args.StandardRestore(_here(stored)))
            tree = manager.restore(step, args=items)["state"]
            config = DraftConfig.from_dict(_progress(manager, step).draft, dtype=dtype)
            break
    else:
        raise ConfigError(f"{run}: no checkpoint yet")
    state = TrainState(
        step=tree["step"],
        failed=tree["failed"],
        rng=tree["rng"],
        params=tree["params"],
        average=tree.get("average"),
        opt_state=None,
        input_scale=tree["input_scale"],
        draft_to_target=tree.get("draft_to_target"),
        config=config,
    )
    return state.draft()


def save_config(config: TrainConfig, run: Path) -> None:
    """Writes the resolved configuration of a new run."""
    run.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(json.loads(json.dumps(to_tree(config))), sort_keys=False)
    (run / "config.yaml").write_text(text, "utf-8")


def check_config(config: TrainConfig, run: Path) -> None:
    """Raises ConfigError unless `config` goes on with what the run began with."""
    for key, (its, ours) in changed_keys(config, run).items():
        # A run may have moved: its corpus names its data, not the paths that these came from.
        is_path = key.endswith(".path") or key == "data.features"
        if not is_path and key.split(".")[0] not in _MAY_CHANGE:
            raise ConfigError(
                f"{run}: begun with {key} {its!r}, the config says {ours!r}; "
                "change it back, or begin another run"
            )


def changed_keys(config: TrainConfig, run: Path) -> dict[str, tuple[Any, Any]]:
    """The keys of which a run's config and `config` differ: (the run's value, the other).

    Raises:
      ConfigError: the folder holds no config.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run}: nothing to resume")
    begun = from_tree(TrainConfig, yaml.safe_load(path.read_text("utf-8")), str(path))
    its, ours = _flat(to_tree(begun)), _flat(to_tree(config))
    pairs = {key: (its.get(key), ours.get(key)) for key in sorted(ours.keys() | its.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted name."""
    if not isinstance(tree, dict | list):
        return {prefix.removesuffix("."): tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        name: leaf for key, value in items for name, leaf in _flat(value, f"{prefix}{key}.").items()
    }


def _manager(run: Path, name: str, **options: Any) -> ocp.CheckpointManager:
    if name == BEST:
        options["best_fn"] = lambda metrics: metrics[_METRIC]
    return ocp.CheckpointManager(
        (run / name).absolute(),
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(cleanup_tmp_directories=True, **options),
    )


def _progress(manager: ocp.CheckpointManager, step: int | None) -> Progress:
    items = ocp.args.Composite(progress=ocp.args.JsonRestore())
    return Progress(**manager.restore(step, args=items)["progress"])


def _here(tree: Any) -> Any:
    """What to restore arrays as: their shape and dtype, on this process's first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def _arrays(state: TrainState) -> dict[str, Any]:
    """The state's arrays by field; fields without any are left out."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    del fields["config"]
    return {name: value for name, value in fields.items() if jax.tree.leaves(value)}
