"""A training run, from configuration to exported draft; read `run` first.

The host prepares batches and hands them to the device; it looks at what a step returned only when
`_LAG` more are under way, so the device never waits. Everything that a run depends on is in its
checkpoints and its corpus: killed at any step and resumed, it ends bit-identical.
"""

import collections
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_eagle import Target, load_draft, load_target
from jax_eagle.config import DraftConfig
from jax_eagle.sharding import make_mesh, named_sharding

from . import checkpoint, init
from .checkpoint import Checkpoints, Progress
from .config import TrainConfig
from .corpus import Corpus, build_corpus
from .evaluate import Evaluation, Evaluator, evaluation_prompts
from .export import export
from .features import FeatureStore, fingerprint
from .feed import Feed
from .log import Log
from .loss import Mean
from .plot import plot
from .report import Effort, write_card
from .step import (
    RUNNING,
    Batch,
    StepOutput,
    TrainState,
    make_optimizer,
    make_train_step,
    pack_teaching,
    step_shardings,
)
from .stopping import StopSignal
from .teacher import Teacher
from .throughput import measured_peak, step_flops

_LAG = 2
"""Steps that are under way while the host reads what an earlier one returned."""


class TrainingError(RuntimeError):
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
    with Trainer(config, target=target, resume=resume) as trainer:
        return trainer.finish() if trainer.train(stop_at) else {}


@dataclasses.dataclass
class Pending:
    """A step under way."""

    number: int
    before: tuple[dict[str, Any], int]
    """Position of the feed and tokens seen before the step."""
    tokens: int
    batch: dict[str, np.ndarray]
    output: StepOutput
    new_features: bool


class Trainer:
    """What a run works with; use it as a context manager."""

    def __init__(self, config: TrainConfig, *, target: Target | None, resume: bool):
        self.config, self.folder = config, Path(config.run)
        self._open_folder(resume)
        target = load_target(config.target, dtype=config.dtype) if target is None else target
        self._tokenizer = target.require_tokenizer()
        self.corpus = _corpus(config, target, self.folder)
        self.target = _placed(config, target)
        self.teacher = Teacher.of(self.target)
        self.feed = Feed(
            self.corpus, config.data, seed=config.seed,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
        self.num_steps = self.feed.num_batches
        self.optimizer = make_optimizer(config, self.num_steps)
        self.checkpoints = Checkpoints(self.folder, config.checkpoint)
        self.seconds, self.tokens = 0.0, 0
        self.state = self._restored() if self._resumes else self._first_state()
        self.store = self._feature_store()
        self.evaluator = self._evaluator()
        self.train_step = make_train_step(config, self.optimizer, **self._jit_options())
        self.log = self._log()
        self._position = self.feed.state()
        self._window: dict[str, Mean] = {}

    def __enter__(self) -> "Trainer":
        self.log.__enter__()
        for line in self.corpus.summary():
            self.log.say(line)
        return self

    def __exit__(self, *reason: Any) -> None:
        self.log.__exit__(*reason)
        self.checkpoints.close()
        if self.store is not None:
            self.store.close()

    # ---- beginning ------------------------------------------------------------------------------

    def _open_folder(self, resume: bool) -> None:
        begun = (self.folder / "config.yaml").is_file()
        folders = (self.folder / "checkpoints").glob("*")
        saved = any(path.name.isdigit() for path in folders)  # others were not finished
        if resume and begun:
            checkpoint.check_config(self.config, self.folder)
        elif saved:
            raise checkpoint.ConfigError(
                f"{self.folder}: holds a run already; --resume it, or name another folder"
            )
        else:
            checkpoint.save_config(self.config, self.folder)
        self._resumes = resume and saved

    def _restored(self) -> TrainState:
        progress = self.checkpoints.progress()
        if progress.corpus != self.corpus.fingerprint:
            raise checkpoint.ConfigError(
                f"{self.folder}: begun with other data; the sources, tokenizer or template changed"
            )
        config = _for_dtype(DraftConfig.from_dict(progress.draft), self.target)
        like = jax.eval_shape(lambda: self._empty_state(config))
        state, progress = self.checkpoints.restore(self._sharded(like))
        self.feed.restore(progress.feed)
        self.seconds, self.tokens = progress.seconds, progress.tokens
        return state

    def _empty_state(self, config: DraftConfig) -> TrainState:
        U = config.draft_vocab_size
        ids = None if U is None else jnp.zeros(U, jnp.int32)
        scale = jnp.zeros(config.feature_width + config.layer.hidden_size * (not config.taps))
        params = init.random_params(config, jax.random.key(0))
        return self._state(config, params, scale, ids)

    def _first_state(self) -> TrainState:
        settings = self.config.draft
        if settings.start in ("ridge", "random"):
            config = init.draft_config(settings, self.target.config)
            ids, given = self._draft_vocabulary(config.draft_vocab_size), None
        else:
            given = load_draft(settings.start, self.target, dtype="float32")
            config, ids = given.config, given.draft_to_target
            if settings.vocab_size is not None and not config.own_head:
                # The head is the target's: any cut of it will do.
                ids = self._draft_vocabulary(settings.vocab_size)
                config = dataclasses.replace(config, draft_vocab_size=settings.vocab_size)
        config = _for_dtype(config, self.target)
        key = jax.random.key(self.config.seed)
        batches = list(self._with_features(config)) if self._looks_at_data(config) else []
        scale = init.input_scale(config, self.target, batches)
        if given is not None:
            params = init.params_of(given, scale)
        elif settings.start == "random":
            params = init.random_params(config, key)
        else:
            params = init.ridge_params(config, self.target, ids, scale, batches, key)
        state = self._state(config, params, scale, ids)
        return jax.device_put(state, jax.tree.map(lambda x: x.sharding, self._sharded(state)))

    def _looks_at_data(self, config: DraftConfig) -> bool:
        return self.config.draft.start == "ridge" or config.is_eagle3

    def _draft_vocabulary(self, size: int | None) -> jax.Array | None:
        """The tokens that the data asks for most often."""
        if size is None:
            return None
        return jnp.asarray(self.corpus.draft_vocabulary(size))

    def _with_features(self, config: DraftConfig) -> Iterator[Batch]:
        """The first batches of the run with the target's features."""
        count = max(1, self.config.draft.start_rows // self.config.data.batch)
        for number in range(min(count, self.num_steps)):
            batch = self._on_device(self.feed.batch(number), None)
            teaching = _teach(self.teacher, batch.text, config.taps)
            kept = pack_teaching(config, teaching).astype(jnp.float16)
            yield batch.replace(features=kept)

    def _state(self, config: DraftConfig, params, scale, ids) -> TrainState:
        return init.make_state(
            config, params, scale, ids, self.optimizer,
            seed=self.config.seed, with_average=self.config.optimizer.ema is not None,
        )  # fmt: skip

    def _sharded(self, state: TrainState) -> Any:
        """Shapes of a state with the devices where its arrays belong."""
        if self.target.backend.mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            places = jax.tree.map(lambda _: device, state)
        else:
            places = init.state_shardings(state, self.optimizer, self.target.backend.mesh)
        return jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, places
        )

    def _jit_options(self) -> dict[str, Any]:
        mesh = self.target.backend.mesh
        return {} if mesh is None else {"out_shardings": step_shardings(self.state, mesh)}

    def _feature_store(self) -> FeatureStore | None:
        data, draft = self.config.data, self.state.config
        if not data.keep_features_gb:
            return None
        folder = Path(data.features) if data.features else self.folder / "features"
        extra = self.target.config.hidden_size if draft.is_eagle3 else 0
        return FeatureStore(
            folder,
            self.corpus.num_tokens,
            draft.feature_width + extra,
            max_bytes=int(data.keep_features_gb * 1e9),
            fingerprint=fingerprint(self.target, self.corpus.fingerprint, draft.taps),
        )

    def _evaluator(self) -> Evaluator:
        settings = self.config.evaluation
        questions = self.corpus.validation_questions
        prompts = evaluation_prompts(settings, self._tokenizer, questions)
        return Evaluator(self.teacher.unstacked, prompts, settings)

    def _log(self) -> Log:
        flops = step_flops(
            self.config, self.target.config, self.state.config, kept=self.store is not None
        )
        return Log(
            self.folder,
            self.num_steps,
            step=int(self.state.step),
            flops_per_token=flops / (self.config.data.batch * self.config.data.length),
            peak_flops=measured_peak(self.target.config.dtype) * jax.device_count(),
        )

    # ---- the loop -------------------------------------------------------------------------------

    def train(self, stop_at: int | None = None) -> bool:
        """Steps until the end, `stop_at`, `max_minutes` or SIGTERM; whether it came to its end."""
        config = self.config
        end = self.num_steps if stop_at is None else min(stop_at, self.num_steps)
        self._begun, self._saved = time.monotonic() - self.seconds, time.monotonic()
        self._pending: collections.deque[Pending] = collections.deque()
        step = int(self.state.step)
        with StopSignal() as stop:
            if step == 0:  # the first point of the curve; and a tree that cannot be shows here
                self._evaluate_and_save()
            while step < end and not stop.received and not self._is_out_of_time():
                self._one_step(step)
                step += 1
                if step % config.evaluation.every == 0 and step < self.num_steps:
                    self._evaluate_and_save()
                elif self._save_is_due(step):
                    self._save()
            self._drain()
            self.seconds = self._now()
            finished = not stop.received and (step == self.num_steps or self._is_out_of_time())
            if not finished:
                self._save()
                self.checkpoints.wait()
                self.log.say(f"stopped at step {step}; --resume goes on from there")
        return finished

    def _one_step(self, step: int) -> None:
        before = self._position, self.tokens
        rows = next(self.feed)
        self._position = self.feed.state()
        kept = None if self.store is None else self.store.read(rows["index"])
        self.tokens += int((rows["segment"] > 0).sum())
        batch = self._on_device(rows, kept)
        self.state, output = self.train_step(self.state, self.teacher, batch)
        jax.tree.map(lambda x: x.copy_to_host_async(), output[:2])
        self._pending.append(Pending(step + 1, before, self.tokens, rows, output, kept is None))
        if len(self._pending) > _LAG:
            self._finish_step(self._pending.popleft())

    def _finish_step(self, done: Pending) -> None:
        """What the host does with a step's results: keep features, look for failures, log."""
        if int(done.output.failed) != RUNNING:
            self._stop_at_failure(done)
        if self.store is not None and done.new_features:
            self.store.write(done.batch["index"], np.asarray(done.output.features))
        here = jax.tree.map(np.asarray, done.output.metrics)
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
        segments = np.unique(done.batch["index"][done.batch["segment"] > 0])
        self._save()
        self.checkpoints.wait()
        raise TrainingError(
            f"step {done.number}: the loss or its gradient is not finite. The state before it is "
            f"saved in {self.folder}. Its batch holds the corpus tokens {segments[0]} to "
            f"{segments[-1]}; a lower learning rate, a longer warm-up or other data may help"
        )

    def _on_device(self, rows: dict[str, np.ndarray], features: np.ndarray | None) -> Batch:
        mesh = self.target.backend.mesh
        place = None if mesh is None else named_sharding(mesh, "batch")

        def put(x):
            if place is None:
                return jnp.asarray(x)
            return jax.make_array_from_process_local_data(place, x)

        names = "tokens", "segment", "position", "weight"
        kept = None if features is None else put(features)
        return Batch(**{name: put(rows[name]) for name in names}, features=kept)

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

    def _save(self, evaluation: Evaluation | None = None) -> None:
        """A checkpoint of the state as it is: the feed stands behind the last batch given."""
        self._drain()
        progress = Progress(
            seconds=self._now(),
            tokens=self.tokens,
            feed=self._position,
            draft=self.state.config.to_dict(),
            corpus=self.corpus.fingerprint,
            tokenizer=self.corpus.tokenizer_hash,
        )
        best = None if evaluation is None else evaluation.acceptance_length
        self.checkpoints.save(self.state, progress, best)
        self._saved = time.monotonic()

    def _evaluate_and_save(self) -> Evaluation:
        self._drain()
        begin = time.monotonic()
        evaluation = self.evaluator(self.state.draft())
        self._begun += time.monotonic() - begin  # the seconds are those of training
        self.log.evaluation(int(self.state.step), self.tokens, evaluation)
        self._save(evaluation)
        return evaluation

    # ---- the end --------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Evaluates, exports the best checkpoint with its card, and draws the plot."""
        evaluation = self._evaluate_and_save()
        self.checkpoints.wait()
        best = self.state.draft()
        if self.checkpoints.best_step() != int(self.state.step):
            best = checkpoint.load_draft(self.folder, which="best", dtype=best.config.layer.dtype)
            evaluation = self.evaluator(best)
        export(best, Path(self.config.output), "safetensors")
        plot([self.folder], self.folder / "acceptance.png")
        effort = Effort(
            steps=int(self.state.step),
            tokens=self.tokens,
            seconds=self.seconds,
            distinct_tokens=self.corpus.num_tokens,
            source_tokens=[figures["tokens"] for figures in self.corpus.figures],
        )
        return write_card(self.config, best.config, effort, evaluation)


def _corpus(config: TrainConfig, target: Target, folder: Path) -> Corpus:
    return build_corpus(
        config.data,
        target.require_tokenizer(),
        vocab_size=target.config.vocab_size,
        stop_token_ids=target.config.stop_token_ids,
        folder=folder / "corpus",
    )


def _placed(config: TrainConfig, target: Target) -> Target:
    """The target on the config's mesh; attention kernels have no gradient."""
    backend = dataclasses.replace(target.backend, attention="reference")
    target = target.replace(backend=backend)
    m = config.mesh
    if m.data * m.fsdp * m.tensor == 1 or backend.mesh is not None:
        return target
    return target.spread(make_mesh(m.tensor, data=m.data, fsdp=m.fsdp))


def _for_dtype(draft: DraftConfig, target: Target) -> DraftConfig:
    """The same draft for passes in the target's dtype."""
    layer = dataclasses.replace(draft.layer, dtype=target.config.dtype)
    return dataclasses.replace(draft, layer=layer)


@jax.jit(static_argnums=2)
def _teach(teacher: Teacher, text, taps: tuple[int, ...]):
    return teacher(text, taps)


def _figures(metrics: dict[str, Mean]) -> dict[str, float]:
    """Means by name; those of unrolled passes behind the first are NAME/passJ."""
    figures = {}
    for name, value in metrics.items():
        means = np.atleast_1d(value.sum / np.maximum(value.count, 1e-6))
        figures |= {f"{name}/pass{j}" if j else name: float(x) for j, x in enumerate(means)}
    return figures
