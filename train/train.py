"""`python -m train.train --config configs/X.yaml`: distils an EAGLE draft from a frozen target.

The run itself is in `trainer`. A run's folder holds its configuration, its corpus and its
checkpoints, so that `--resume` goes on exactly where it stopped; `metrics.jsonl` there has every
logged figure.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jax_eagle import load_target
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.program import run_program

from .batch_view import show_batch
from .config import TrainConfig, load_config
from .feed import Feed
from .plan import plan
from .trainer import corpus_of, run


def main(
    config: Annotated[Path, typer.Option(help="YAML file; configs/ has examples.")],
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest checkpoint, or begin if there is none.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value over the file, as in optimizer.learning_rate=1e-3."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show-batch", help="Print the first batch, trained tokens coloured.")
    ] = False,
    plan_only: Annotated[
        bool,
        typer.Option("--plan", help="Print memory, steps and FLOPs of the run, from shapes alone."),
    ] = False,
    plan_topology: Annotated[
        str | None, typer.Option(help="Plan for: here, or h100 (described, no GPU needed).")
    ] = None,
) -> None:
    """Trains a draft.

    Stop it with Ctrl-C or SIGTERM: it saves a checkpoint first, and `--resume` goes on from there,
    bit for bit as if it had never stopped. The best checkpoint by acceptance length is exported.
    """
    settings = load_config(config, overrides or ())
    if plan_only:
        for line in plan(settings, topology=plan_topology):
            print(line)
    elif show:
        _show_first_batch(settings)
    else:
        enable_compilation_cache()
        run(settings, resume=resume)


def _show_first_batch(config: TrainConfig) -> None:
    target = load_target(config.target, dtype=config.dtype)
    feed = Feed(corpus_of(config, target), config.data, seed=config.seed)
    show_batch(next(feed), target.require_tokenizer(), Console())


if __name__ == "__main__":
    run_program(main, "train.train")
