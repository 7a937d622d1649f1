"""`python -m train.train --config configs/X.yaml`: distils an EAGLE draft from a frozen target.

Read `run` first. A run's folder holds its configuration, its data and its checkpoints, so that
`--resume` goes on exactly where it stopped; `metrics.jsonl` there has every logged figure.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
import yaml

from jax_eagle import Target, load_draft, load_target
from jax_eagle.checkpoint.files import read_json, write_json
from jax_eagle.config import ConfigError, DraftConfig
from jax_eagle.program import run_program

from . import checkpoint, data, init
from .config import TrainConfig, load_config
from .evaluate import evaluate
from .export import export
from .features import FeatureStore
from .feed import Feed
from .log import Log
from .report import write_card
from .step import Batch, TrainState, make_optimizer, make_train_step, target_features


@dataclasses.dataclass
class Run:
    """What a run works with; only the state changes, and that is passed along."""

    config: TrainConfig
    folder: Path
    target: Target
    counts: np.ndarray
    """Weighted occurrences of each token, for the draft vocabulary."""
    feed: Feed
    validation: Feed
    optimizer: optax.GradientTransformation
    num_steps: int
    checkpoints: checkpoint.Checkpoints


def run(
    config: TrainConfig,
    *,
    target: Target | None = None,
    resume: bool = False,
    stop_at: int | None = None,
) -> dict[str, Any]:
    """Trains and exports; returns the figures of the card.

    Args:
      target: already loaded; None: the config's.
      resume: go on from the newest checkpoint of the run's folder.
      stop_at: leave after this step with a checkpoint and without an export (as if interrupted).

    Raises:
      ConfigError, CheckpointError: what is given cannot be used.
    """
    target = load_target(config.target, dtype=config.dtype) if target is None else target
    # The draft runs on its target's backend, and the attention kernels have no gradient.
    backend = dataclasses.replace(target.backend, attention="reference")
    work = _prepare(config, target.replace(backend=backend), resume)
    try:
        if resume and work.checkpoints.latest_step() is not None:
            state, seconds = work.checkpoints.restore(_shapes(work))
        else:
            state, seconds = _first_state(work), 0.0
        state, seconds = _train(work, state, seconds, stop_at)
        work.checkpoints.save(state, seconds)
        if stop_at is not None and int(state.step) < work.num_steps:
            return {}
        figures = _validate(work, state)
        export(state.draft(), Path(config.output), "safetensors")
        return write_card(config, work.feed, state, seconds, figures)
    finally:
        work.checkpoints.close()
        if work.feed.store is not None:
            work.feed.store.close()


def _prepare(config: TrainConfig, target: Target, resume: bool) -> Run:
    """Opens the run's folder and reads the data."""
    folder = Path(config.run)
    packed = _packed_rows(config, folder, target, resume)
    store = None
    if config.keep_features:
        where = Path(config.features) if config.features else folder / "features"
        store = FeatureStore(where, target, length=config.length, width=target.config.hidden_size)
    feed = Feed(packed.train, store, batch=config.batch, seed=config.seed)
    if not feed.steps_per_epoch:
        raise ConfigError(f"{len(feed.rows)} rows of text are less than a batch of {config.batch}")
    num_steps = config.epochs * feed.steps_per_epoch
    return Run(
        config=config,
        folder=folder,
        target=dataclasses.replace(target, tokenizer=None),
        counts=packed.counts,
        feed=feed,
        validation=Feed(packed.validation, store, batch=config.batch),
        optimizer=make_optimizer(config, num_steps),
        num_steps=num_steps,
        checkpoints=checkpoint.Checkpoints(folder, config.max_to_keep),
    )


def _packed_rows(config: TrainConfig, folder: Path, target: Target, resume: bool) -> data.Data:
    """The rows of a new run, or those that the run began with."""
    if resume:
        if not (folder / "data.npz").is_file():
            raise ConfigError(f"{folder}: nothing to resume")
        return checkpoint.load_data(folder / "data.npz")
    if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
        raise ConfigError(f"{folder}: holds a run already; --resume it, or name another folder")
    packed = data.load_data(
        config.sources,
        target.tokenizer,
        vocab_size=target.config.vocab_size,
        length=config.length,
        validation_share=config.validation_share,
    )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_data(packed, folder / "data.npz")
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    return packed


def _first_state(work: Run) -> TrainState:
    """The state of step 0."""
    config = work.config
    if config.start in ("ridge", "random"):
        draft_config, ids = _new_draft(work)
        params = _first_params(work, draft_config)
    else:
        draft = load_draft(config.start, work.target, dtype="float32")
        draft_config, ids = draft.config, draft.draft_to_target
        if config.draft_vocab_size is not None:  # the head is the target's: any cut of it will do
            ids = _draft_vocabulary(work, config.draft_vocab_size)
            draft_config = dataclasses.replace(draft_config, draft_vocab_size=len(ids))
        params = init.scaled_params(draft.params, init.input_scale(work.target))
    draft_config = _for_dtype(draft_config, work.target)
    write_json(work.folder / "run.json", {"draft": draft_config.to_dict(), "steps": work.num_steps})
    return _state(work, draft_config, params, ids)


def _shapes(work: Run) -> TrainState:
    """The form of the run's state, to restore a checkpoint into."""
    draft_config = DraftConfig.from_dict(read_json(work.folder / "run.json")["draft"])
    draft_config = _for_dtype(draft_config, work.target)

    def build():
        params = init.random_params(draft_config, jax.random.key(0))
        U = draft_config.draft_vocab_size
        return _state(work, draft_config, params, None if U is None else jnp.zeros(U, jnp.int32))

    return jax.eval_shape(build)


def _state(work: Run, draft_config: DraftConfig, params: Any, ids: jax.Array | None) -> TrainState:
    return init.make_state(
        draft_config,
        params,
        init.input_scale(work.target),
        ids,
        work.optimizer,
        with_average=work.config.ema is not None,
    )


def _for_dtype(draft: DraftConfig, target: Target) -> DraftConfig:
    """The same draft for passes in the target's dtype."""
    layer = dataclasses.replace(draft.layer, dtype=target.config.dtype)
    return dataclasses.replace(draft, layer=layer)


def _new_draft(work: Run) -> tuple[DraftConfig, jax.Array | None]:
    """The config of a draft from scratch, and its vocabulary from the counts of the data."""
    config, U = work.config, work.config.draft_vocab_size
    draft_config = DraftConfig.for_target(
        work.target.config,
        num_layers=config.num_layers,
        input_norm=config.input_norm,
        output_norm=config.output_norm,
        draft_vocab_size=U,
    )
    return draft_config, None if U is None else _draft_vocabulary(work, U)


def _draft_vocabulary(work: Run, U: int) -> jax.Array:
    """The U tokens that the data asks for most often."""
    target = work.target.config
    if U > target.vocab_size:
        raise ConfigError(f"draft_vocab_size {U}: the target has {target.vocab_size} tokens")
    return jnp.asarray(data.draft_vocabulary(work.counts, U, target.stop_token_ids))


def _first_params(work: Run, draft_config: DraftConfig) -> Any:
    key = jax.random.key(work.config.seed)
    if work.config.start == "random":
        return init.random_params(draft_config, key)
    batch = work.config.batch
    count = max(1, min(work.config.start_rows // batch, work.feed.steps_per_epoch))
    batches = (_with_features(work, step) for step in range(count))
    return init.ridge_params(draft_config, work.target, batches, key)


_features = jax.jit(target_features)


def _with_features(work: Run, step: int) -> Batch:
    numbers = work.feed.row_numbers(step)
    batch = work.feed.batch(numbers)
    if batch.features is None:
        features = _features(work.target, batch).astype(jnp.float16)
        work.feed.keep(numbers, features)
        batch = dataclasses.replace(batch, features=features)
    return batch


def _train(
    work: Run, state: TrainState, seconds: float, stop_at: int | None
) -> tuple[TrainState, float]:
    """The loop; returns the last state and the seconds of the whole run."""
    config, log = work.config, Log(work.config, work.num_steps)
    train_step = make_train_step(config, work.optimizer)
    end = work.num_steps if stop_at is None else min(stop_at, work.num_steps)
    begin, saved = time.monotonic() - seconds, time.monotonic()
    with log.progress:
        for step in range(int(state.step), end):
            numbers = work.feed.row_numbers(step)
            batch = work.feed.batch(numbers)
            state, metrics, features = train_step(state, work.target, batch)
            if batch.features is None:
                work.feed.keep(numbers, features)
            seconds = time.monotonic() - begin
            if (step + 1) % config.log_every == 0 or step + 1 == end:
                log.step(step + 1, seconds, {k: float(v) for k, v in vars(metrics).items()})
            if (step + 1) % config.validate_every == 0:
                log.validation(step + 1, _validate(work, state))
            if time.monotonic() - saved > 60 * config.checkpoint_minutes:
                work.checkpoints.save(state, seconds)
                saved = time.monotonic()
            if config.max_minutes is not None and seconds > 60 * config.max_minutes:
                log.say(f"stopped after {config.max_minutes:g} minutes")
                break
    return state, time.monotonic() - begin


def _validate(work: Run, state: TrainState) -> dict[str, dict[str, float]]:
    names = [f"{i}-{source.kind}" for i, source in enumerate(work.config.sources)]
    # Evenly spread over the rows, which come source by source.
    count = min(work.config.validation_rows, len(work.validation.rows))
    rows = np.linspace(0, len(work.validation.rows), count, endpoint=False).astype(np.int64)
    return evaluate(state.draft(), work.target, work.validation, rows, names)


def main(
    config: Annotated[Path, typer.Option(help="YAML file.")],
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the file, repeatable.")
    ] = None,
) -> None:
    """Trains a draft."""
    run(load_config(config, overrides or ()), resume=resume)


if __name__ == "__main__":
    run_program(main, "train.train")
