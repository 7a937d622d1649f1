"""What a run shows while it trains: a progress bar, metrics.jsonl, and TensorBoard if asked for."""

import json
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .config import TrainConfig


class Log:
    """One log of a run; `progress` is a context manager."""

    def __init__(self, config: TrainConfig, num_steps: int):
        columns = (
            "{task.fields[tokens]:,} tokens",
            "loss {task.fields[loss]:.3f}",
            "top-1 {task.fields[top1]:.3f}",
            "{task.fields[speed]:.0f} tok/s",
        )
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            *map(TextColumn, columns),
            TimeRemainingColumn(),
        )
        self._task = self.progress.add_task(
            "train", total=num_steps, tokens=0, loss=0.0, top1=0.0, speed=0.0
        )
        self._step_tokens = config.batch * config.length
        self._last: tuple[int, float] | None = None
        self._file = Path(config.run) / "metrics.jsonl"
        self._board = None
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(Path(config.run) / "tensorboard"))

    def step(self, step: int, seconds: float, figures: dict[str, float]) -> None:
        """The training metrics of one step; the speed is that since the last call."""
        last_step, last_seconds = self._last or (step, seconds)
        speed = (step - last_step) * self._step_tokens / max(seconds - last_seconds, 1e-9)
        self._last = step, seconds
        tokens = step * self._step_tokens
        shown = {"tokens": tokens, "speed": speed, "loss": figures["loss"], "top1": figures["top1"]}
        self.progress.update(self._task, completed=step, **shown)
        self._write(step, {"seconds": seconds, "tokens": tokens, "speed": speed, **figures})

    def validation(self, step: int, figures: dict[str, dict[str, float]]) -> None:
        """Validation figures by source."""
        for name, values in figures.items():
            text = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            self.say(f"step {step}: validation {name}: {text}")
        flat = {f"validation/{n}/{k}": v for n, of in figures.items() for k, v in of.items()}
        self._write(step, flat)

    def say(self, text: str) -> None:
        """One line above the progress bar."""
        self.progress.console.print(text, highlight=False, soft_wrap=True)

    def _write(self, step: int, figures: dict[str, float]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
