"""What a run shows while it trains: a progress bar, metrics.jsonl and TensorBoard.

All figures come as floats of the host, so nothing here waits for the device. A run that goes on
from a checkpoint first forgets what it had logged behind it: no training step stands there twice.
"""

import datetime
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from .evaluate import Evaluation

METRICS = "metrics.jsonl"


class Log:
    """One log of a run; a context manager, in which the progress bar is shown."""

    def __init__(
        self,
        folder: Path,
        num_steps: int,
        *,
        step: int = 0,
        peak_flops: float | None = None,
        console: Console | None = None,
    ):
        """Opens the log, or goes on with it.

        Args:
          folder: of the run; it must exist.
          num_steps: of the whole run.
          step: the last one that is done; later records are cut off.
          peak_flops: floating-point operations a second that this machine can do at best; None:
            no share of it is shown.
        """
        self._path = folder / METRICS
        before = _cut(self._path, step)
        self._begin = time.monotonic() - before.get("seconds", 0.0)
        self._mark = int(before.get("tokens", 0)), time.monotonic()
        self._peak_flops = peak_flops
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1, filename_suffix=f".{step}"
        )  # the suffix: two starts within a second would write to one file
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            # Steps of a large run are minutes apart; rich keeps the last thousand calls of `step`.
            speed_estimate_period=math.inf,
        )
        self._task = self._progress.add_task("", total=num_steps, completed=step)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._file.close()
        self._board.close()

    def step(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Metrics of training at a step, among them `loss` and `flops_per_token`.

        Args:
          tokens: trained on since the run began; the speed is that since the last call.
        """
        (last_tokens, last), now = self._mark, time.monotonic()
        self._mark = tokens, now
        speed = (tokens - last_tokens) / max(now - last, 1e-9)
        figures = {"tokens_per_second": speed}
        shown = f"{tokens:,} tokens, loss {metrics['loss']:.4f}, {speed:,.0f} tokens/s"
        if self._peak_flops is not None:
            figures["peak_share"] = speed * metrics["flops_per_token"] / self._peak_flops
            shown += f", {figures['peak_share']:.0%} of peak"
        self._progress.update(self._task, completed=step, description=shown)
        if not self._progress.console.is_terminal:  # where a bar would not be seen
            left = self._progress.tasks[self._task].time_remaining
            ending = f", {datetime.timedelta(seconds=left)} left" if left else ""
            self.say(f"step {step}: {shown}{ending}")
        self._write(step, tokens, {**figures, **metrics})

    def evaluation(self, step: int, tokens: int, evaluation: Evaluation) -> None:
        """An evaluation's figures, and a line of the main ones. Its time is not training time."""
        self.say(f"step {step}: {evaluation.line()}")
        self._write(step, tokens, evaluation.figures)
        self._mark = tokens, time.monotonic()

    def say(self, text: str) -> None:
        """One line above the progress bar."""
        self._progress.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _write(self, step: int, tokens: int, figures: Mapping[str, float]) -> None:
        seconds = round(time.monotonic() - self._begin, 3)
        record = {"step": step, "tokens": tokens, "seconds": seconds, **figures}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a run's metrics.jsonl; a last line that was cut while written is left out.

    Raises:
      ValueError: another line that is not JSON.
    """
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):
                message = f"{folder / METRICS}:{number}: not JSON; delete the line to go on"
                raise ValueError(message) from None


def _cut(path: Path, step: int) -> dict[str, Any]:
    """Leaves only the records up to a step in the file; returns the last of them."""
    if not path.exists():
        return {}
    kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(part, path)
    return kept[-1] if kept else {}
