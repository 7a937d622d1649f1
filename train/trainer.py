"""A training run, from configuration to exported draft; read `run` first.

The host prepares batches and hands them to the device; it looks at what a step returned only when
`_LAG` more are under way, so the device never waits. Everything that a run depends on is in its
checkpoints and its corpus: killed at any step and resumed, it ends bit-identical.

One process trains, on all the devices of the config's mesh.
"""

import collections
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_eagle import Target, load_target
from jax_eagle.config import ConfigError, DraftConfig
from jax_eagle.prompts import SUITES
from jax_eagle.sharding import check_divides, make_mesh

from . import checkpoint, init
from .checkpoint import Checkpoints, Progress
from .config import TrainConfig
from .corpus import Corpus, build_corpus
from .evaluate import Evaluation, Evaluator, evaluation_prompts
from .export import export
from .features import FeatureStore, fingerprint
from .feed import Feed
from .log import Log, read_metrics
from .loss import Mean
from .plot import PLOT, plot
from .report import Effort, write_card
from .start import empty_state, first_state, for_dtype, placed
from .step import (
    RUNNING,
    Batch,
    StepOutput,
    TrainState,
    make_optimizer,
    make_train_step,
    put_batch,
    step_shardings,
    teach,
)
from .stopping import StopSignal
from .teacher import Teacher
from .throughput import measured_peak, step_flops

_LAG = 2
"""Steps that are under way while the host reads what an earlier one returned."""


class TrainingError(ValueError):
    """A run that cannot go on; what was reached is saved."""


def run(
    config: TrainConfig,
    *,
    target: Target | None = None,
    resume: bool = False,
    stop_at: int | None = None,
) -> dict[str, Any]:
    """Trains and exports; returns the figures of the card (none if it was stopped early).

    Args:
      target: already loaded, with a tokenizer; None: the config's.
      resume: go on from the newest checkpoint of the run's folder, or begin if there is none.
      stop_at: leave after this step with a checkpoint and without an export (as if interrupted).

    Raises:
      ConfigError, CheckpointError: what is given cannot be used, or a checkpoint not written.
      TrainingError: a loss that is not finite; the last good state is saved.
    """
    with StopSignal() as stop, Trainer(config, target=target, resume=resume, stop=stop) as trainer:
        return trainer.finish() if trainer.train(stop_at) else {}


@dataclasses.dataclass
class Pending:
    """A step under way."""

    number: int
    before: tuple[dict[str, Any], int]
    """Position of the feed and tokens seen before the step."""
    tokens: int
    rows: dict[str, np.ndarray]
    output: StepOutput
    features: jax.Array | None
    """Of the rows, if they are to be kept."""


class Trainer:
    """What a run works with; use it as a context manager."""

    def __init__(
        self, config: TrainConfig, *, target: Target | None, resume: bool, stop: StopSignal
    ):
        self.config, self.folder, self._stop = config, Path(config.run), stop
        resumes = self._open_folder(resume)
        target = load_target(config.target, dtype=config.dtype) if target is None else target
        init.check_target(config, target.config)
        self._tokenizer = target.require_tokenizer()
        self.corpus = corpus_of(config, target)
        self._target_hash = fingerprint(target, self.corpus.fingerprint)
        self.teacher = Teacher.of(_placed(config, target))
        del target  # its layers are stacked in the teacher: one copy is enough
        self.feed = Feed(self.corpus, config.data, seed=config.seed)
        self.num_steps = self.feed.num_batches
        self.optimizer = make_optimizer(config, self.num_steps)
        self.checkpoints = Checkpoints(self.folder, config.checkpoint)
        self.seconds, self.tokens = 0.0, 0
        self.state = self._restored() if resumes else self._first_state()
        self.store = self._feature_store()
        self.evaluator = self._evaluator()
        self.train_step = self._train_step()
        self.log = self._log()
        self._position = self.feed.state()
        self._window: dict[str, Mean] = {}
        self._pending: collections.deque[Pending] = collections.deque()

    def __enter__(self) -> "Trainer":
        self.log.__enter__()
        for line in self.corpus.summary():
            self.log.say(line)
        return self

    def __exit__(self, *reason: Any) -> None:
        self.log.__exit__(*reason)
        self.feed.close()
        if self.store is not None:
            self.store.close()
        self.checkpoints.close()

    # ---- beginning ------------------------------------------------------------------------------

    def _open_folder(self, resume: bool) -> bool:
        """Whether the run goes on from a checkpoint."""
        folders = (self.folder / checkpoint.LATEST).glob("*")
        saved = any(path.name.isdigit() for path in folders)  # others were not finished
        if resume and (self.folder / "config.yaml").is_file():
            checkpoint.check_config(self.config, self.folder)
        elif saved:
            raise ConfigError(
                f"{self.folder}: holds a run already; --resume it, or name another folder"
            )
        else:
            checkpoint.save_config(self.config, self.folder)
        return resume and saved

    def _first_state(self) -> TrainState:
        return first_state(self.config, self.teacher, self.corpus, self.feed, self.optimizer)

    def _restored(self) -> TrainState:
        progress = self.checkpoints.progress()
        for what, here in self._identity().items():
            if getattr(progress, what) != here:
                raise ConfigError(f"{self.folder}: begun with another {what}; begin another run")
        base = self.teacher.base
        draft = for_dtype(DraftConfig.from_dict(progress.draft), base.config.dtype)
        like = empty_state(self.config, draft, self.optimizer)
        places = placed(like, self.optimizer, base.backend.mesh)
        state, progress = self.checkpoints.restore(places)
        self.feed.restore(progress.feed)
        self.seconds, self.tokens = progress.seconds, progress.tokens
        return state

    def _feature_store(self) -> FeatureStore | None:
        data, draft = self.config.data, self.state.config
        if not data.keep_features_gb:
            return None
        folder = Path(data.features) if data.features else self.folder / "features"
        extra = self.teacher.base.config.hidden_size if draft.is_eagle3 else 0
        return FeatureStore(
            folder,
            self.corpus.num_tokens,
            draft.feature_width + extra,
            max_bytes=int(data.keep_features_gb * 1e9),
            fingerprint=f"{self._target_hash} {draft.taps}",
        )

    def _evaluator(self) -> Evaluator:
        settings = self.config.evaluation
        questions = self.corpus.validation_questions
        prompts = evaluation_prompts(settings, self._tokenizer, questions)
        return Evaluator(self.teacher.unstacked, prompts, settings)

    def _train_step(self) -> Any:
        mesh = self.teacher.base.backend.mesh
        options = {} if mesh is None else {"out_shardings": step_shardings(self.state, mesh)}
        return make_train_step(self.config, self.optimizer, **options)

    def _log(self) -> Log:
        base = self.teacher.base
        mesh = base.backend.mesh
        return Log(
            self.folder,
            self.num_steps,
            step=int(self.state.step),
            peak_flops=measured_peak(base.config.dtype) * (1 if mesh is None else mesh.size),
        )

    # ---- the loop -------------------------------------------------------------------------------

    def train(self, stop_at: int | None = None) -> bool:
        """Steps until the end, `stop_at`, `max_minutes` or SIGTERM; whether it came to its end.

        However it ends, the state is saved.
        """
        end = self.num_steps if stop_at is None else min(stop_at, self.num_steps)
        self._begun, self._saved = time.monotonic() - self.seconds, time.monotonic()
        step = int(self.state.step)
        if self._evaluation_is_due(step) and not self._was_evaluated(step):
            self._evaluate()  # the first point of the curve; or killed before this was done
        while step < end and not self._stop.received and not self._is_out_of_time():
            self._one_step(step)
            step += 1
            evaluate = self._evaluation_is_due(step) and step < self.num_steps
            if evaluate or self._save_is_due(step):
                self._save()
            if evaluate:
                self._evaluate()
        self._save()
        self.checkpoints.wait()
        self.seconds = self._now()
        finished = step == self.num_steps or self._is_out_of_time()
        if self._stop.received or not finished:
            self.log.say(f"stopped at step {step}; --resume goes on from there")
            return False
        return True

    def _one_step(self, step: int) -> None:
        before = self._position, self.tokens
        rows = next(self.feed)
        self._position = self.feed.state()
        self.tokens += int((rows["segment"] > 0).sum())
        batch, new_features = self._on_device(rows)
        self.state, output = self.train_step(self.state, self.teacher, batch)
        jax.tree.map(lambda x: x.copy_to_host_async(), output)
        done = Pending(step + 1, before, self.tokens, rows, output, new_features)
        self._pending.append(done)
        if len(self._pending) > _LAG:
            self._finish_step(self._pending.popleft())

    def _on_device(self, rows: dict[str, np.ndarray]) -> tuple[Batch, jax.Array | None]:
        """The batch, with its features if the run keeps them; and those that are not kept yet."""
        mesh = self.teacher.base.backend.mesh
        if self.store is None:
            return put_batch(rows, mesh), None
        kept = self.store.read(rows["index"])
        batch = put_batch(rows, mesh, kept)
        if kept is not None:
            return batch, None
        features = teach(self.teacher, self.state.config, batch)
        return batch.replace(features=features), features

    def _flops_per_token(self, *, kept: bool) -> float:
        config, target = self.config, self.teacher.base.config
        flops = step_flops(config, target, self.state.config, kept=kept)
        return flops / (config.data.batch * config.data.length)

    def _finish_step(self, done: Pending) -> None:
        """What the host does with a step's results: look for failures, keep features, log."""
        if int(done.output.failed) != RUNNING:
            self._stop_at_failure(done)
        if self.store is not None and done.features is not None:
            self.store.write(done.rows["index"], np.asarray(done.features))
        here = jax.tree.map(np.asarray, done.output.metrics)
        tokens = done.tokens - done.before[1]
        kept = self.store is not None and done.features is None
        flops: Any = self._flops_per_token(kept=kept) * tokens, tokens
        here["flops_per_token"] = Mean(*flops)
        self._window = {
            name: value + self._window[name] if name in self._window else value
            for name, value in here.items()
        }
        if done.number % self.config.log_every == 0 or done.number == self.num_steps:
            self.log.step(done.number, done.tokens, _figures(self._window))
            self._window = {}

    def _drain(self) -> None:
        while self._pending:
            self._finish_step(self._pending.popleft())

    def _stop_at_failure(self, done: Pending) -> None:
        """Saves the last good state, as it was before the step that failed."""
        self._pending.clear()
        self._position, self.tokens = done.before
        self.state = self.state.replace(failed=jnp.full_like(self.state.failed, RUNNING))
        self._save()
        self.checkpoints.wait()
        index = done.rows["index"][done.rows["segment"] > 0]
        segments = np.unique(np.searchsorted(self.corpus.start_S, index, side="right") - 1)
        files = {self.corpus.sources[i].path for i in self.corpus.source_S[segments]}
        raise TrainingError(
            f"step {done.number}: the loss or its gradient is not finite, on segments "
            f"{', '.join(map(str, segments[:8]))}{' ...' if len(segments) > 8 else ''} of "
            f"{', '.join(sorted(files))}. The state before it is saved in {self.folder}: export it "
            "with `train.export --which latest`, and begin another run with draft.start and "
            "a lower learning rate or other data"
        )

    def _now(self) -> float:
        """Seconds of training, over all starts."""
        return time.monotonic() - self._begun

    def _is_out_of_time(self) -> bool:
        limit = self.config.max_minutes
        return limit is not None and self._now() > 60 * limit

    def _save_is_due(self, step: int) -> bool:
        every = self.config.checkpoint.steps
        by_time = time.monotonic() - self._saved > 60 * self.config.checkpoint.minutes
        return by_time or (every is not None and step % every == 0)

    def _identity(self) -> dict[str, str]:
        """What must be the same when the run is resumed."""
        corpus = self.corpus
        return {
            "corpus": corpus.fingerprint,
            "tokenizer": corpus.tokenizer_hash,
            "target": self._target_hash,
        }

    def _progress(self) -> Progress:
        return Progress(
            seconds=self._now(),
            tokens=self.tokens,
            feed=self._position,
            draft=self.state.config.to_dict(),
            **self._identity(),
        )

    def _save(self) -> None:
        """A checkpoint of the state as it is: the feed stands behind the last batch given."""
        self._drain()
        self.checkpoints.save(self.state, self._progress())
        self._saved = time.monotonic()

    def _evaluation_is_due(self, step: int) -> bool:
        every = self.config.evaluation.every
        return every is not None and step % every == 0

    def _was_evaluated(self, step: int) -> bool:
        name = f"acceptance_length/{self.config.evaluation.trees[0]}"
        return any(r["step"] == step and name in r for r in read_metrics(self.folder))

    def _evaluate(self) -> Evaluation:
        self._drain()
        begin = time.monotonic()
        evaluation = self.evaluator(self.state.draft())
        self._begun += time.monotonic() - begin  # the seconds are those of training
        self.checkpoints.save_best(self.state, self._progress(), evaluation.acceptance_length)
        self.log.evaluation(int(self.state.step), self.tokens, evaluation)
        return evaluation

    # ---- the end --------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Evaluates, exports the best draft with its card, and draws the plot."""
        evaluation = self._evaluate()
        best = self.state.draft()
        if self.checkpoints.best_step() != int(self.state.step):
            best = checkpoint.load_draft(self.folder, which="best", dtype=best.config.layer.dtype)
            mesh = self.teacher.base.backend.mesh
            best = best if mesh is None else best.spread(mesh)
            evaluation = self.evaluator(best)
        export(best, Path(self.config.output), "safetensors")
        plot([self.folder], self.folder / PLOT)
        effort = Effort(
            steps=int(self.state.step),
            tokens=self.tokens,
            seconds=self.seconds,
            distinct_tokens=self.corpus.num_training_tokens,
            source_tokens=self.corpus.source_training_tokens,
        )
        return write_card(self.config, best.config, effort, evaluation)


def corpus_of(config: TrainConfig, target: Target) -> Corpus:
    """The run's corpus, in its folder; suites that it is evaluated on are held out."""
    return build_corpus(
        config.data,
        target.require_tokenizer(),
        vocab_size=target.config.vocab_size,
        stop_token_ids=target.config.stop_token_ids,
        folder=Path(config.run) / "corpus",
        held_out=[name for name in config.evaluation.prompts if name in SUITES],
    )


def _placed(config: TrainConfig, target: Target) -> Target:
    """The target on the config's mesh; attention kernels have no gradient."""
    backend = dataclasses.replace(target.backend, attention="reference")
    target = target.replace(backend=backend)
    m = config.mesh
    if m.data * m.fsdp * m.tensor == 1 or backend.mesh is not None:
        return target
    mesh = make_mesh(m.tensor, data=m.data, fsdp=m.fsdp)
    check_divides(target.config, mesh)  # `spread` would repeat KV heads, and the draft's with them
    return target.spread(mesh)


def _figures(metrics: dict[str, Mean]) -> dict[str, float]:
    """Means by name; those of unrolled passes behind the first are NAME/passJ."""
    figures = {}
    for name, value in metrics.items():
        means = np.atleast_1d(value.sum / np.maximum(value.count, 1e-6))
        figures |= {f"{name}/pass{j}" if j else name: float(x) for j, x in enumerate(means)}
    return figures
