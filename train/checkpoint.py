"""Checkpoints of a run: the whole state, the seconds it took, and the draft that it would export.

run.json      the draft's config and the number of steps
config.yaml   the resolved configuration
data.npz      the packed rows: a resumed run sees the same ones, whatever was written since
checkpoints/  Orbax, one folder a step
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_eagle import Draft
from jax_eagle.checkpoint.files import read_json
from jax_eagle.config import ConfigError, DraftConfig

from .data import Data, Rows
from .step import TrainState


class Checkpoints:
    """The checkpoints folder of a run."""

    def __init__(self, run: Path, max_to_keep: int = 2):
        self._manager = _manager(run, max_to_keep)

    def latest_step(self) -> int | None:
        """The newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, seconds: float) -> None:
        """Writes a checkpoint and waits for it: the next step donates the state."""
        tree = {"state": _arrays(state), "seconds": np.asarray(seconds)}
        step = int(state.step)
        if step != self.latest_step():
            self._manager.save(step, args=ocp.args.StandardSave(tree))
            self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> tuple[TrainState, float]:
        """The newest checkpoint in the form of `like`, whose arrays are not read."""
        tree = _here({"state": _arrays(like), "seconds": np.zeros(())})
        step = self._manager.latest_step()
        found = self._manager.restore(step, args=ocp.args.StandardRestore(tree))
        return dataclasses.replace(like, **found["state"]), float(found["seconds"])

    def close(self) -> None:
        """Ends the manager's threads."""
        self._manager.close()


def load_draft(run: Path, *, dtype: str = "float32") -> Draft:
    """The draft of a run's newest checkpoint.

    Raises:
      ConfigError: the folder holds no run, or the run has no checkpoint yet.
    """
    if not (run / "run.json").is_file():
        raise ConfigError(f"{run}: not the folder of a run (run.json is missing)")
    config = DraftConfig.from_dict(read_json(run / "run.json")["draft"], dtype=dtype)
    with _manager(run) as manager:
        step = manager.latest_step()
        if step is None:
            raise ConfigError(f"{run}: no checkpoint yet")
        stored = manager.item_metadata(step)
        tree = manager.restore(step, args=ocp.args.StandardRestore(_here(stored)))["state"]
    state = TrainState(
        step=tree["step"],
        params=tree["params"],
        average=tree.get("average"),
        opt_state=None,
        input_scale=tree["input_scale"],
        draft_to_target=tree.get("draft_to_target"),
        config=config,
    )
    return state.draft()


def _manager(run: Path, max_to_keep: int | None = None) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        (run / "checkpoints").absolute(),
        item_handlers=ocp.StandardCheckpointHandler(),
        options=ocp.CheckpointManagerOptions(max_to_keep=max_to_keep),
    )


def _here(tree: Any) -> Any:
    """What to restore arrays as: their shape and dtype, on this process's first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def save_data(data: Data, path: Path) -> None:
    """Writes the packed rows."""
    columns = {
        f"{part}_{field.name}": getattr(rows, field.name)
        for part, rows in (("train", data.train), ("validation", data.validation))
        for field in dataclasses.fields(Rows)
    }
    np.savez_compressed(path, counts=data.counts, **columns)


def load_data(path: Path) -> Data:
    """Reads what `save_data` wrote."""
    with np.load(path) as file:
        train, validation = (
            Rows(*(file[f"{part}_{field.name}"] for field in dataclasses.fields(Rows)))
            for part in ("train", "validation")
        )
        return Data(train, validation, file["counts"])


def _arrays(state: TrainState) -> dict[str, Any]:
    """The state's arrays by field; fields without any are left out."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    del fields["config"]
    return {name: value for name, value in fields.items() if jax.tree.leaves(value)}
