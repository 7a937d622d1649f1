"""`python -m train.plot RUN [RUN ...] --out FILE.png`: acceptance over tokens trained on.

One panel for each tree that was evaluated, one for the conditional acceptance by depth. Bands are
the 95 % intervals over prompts.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

from jax_eagle.config import ConfigError
from jax_eagle.program import run_program

from .log import METRICS, read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # noqa: E402

PLOT = "acceptance.png"
"""Its name in the folder of a run."""
_LENGTH, _CONDITIONAL = "acceptance_length", "conditional"


def plot(runs: Sequence[Path], out: Path) -> None:
    """Draws the evaluations of runs into an image file.

    Raises:
      ConfigError: a folder without evaluations, or a file type that cannot be written.
    """
    # By name where that tells them apart.
    short = len({run.resolve().name for run in runs}) == len(runs)
    histories = {run.resolve().name if short else str(run): _evaluations(run) for run in runs}
    every = [record for history in histories.values() for record in history]
    trees = [key for key in _keys(every, _LENGTH) if key.count("/") == 0]
    figure, axes = pyplot.subplots(
        1, len(trees) + 1, figsize=(5 * len(trees) + 5, 4), squeeze=False
    )
    try:
        for axis, tree in zip(axes[0, :-1], trees, strict=True):
            axis.set_title(f"{tree}, T = 0")
            axis.set_ylabel("acceptance length (bonus token counted)")
            for run, history in histories.items():
                _curve(axis, history, _LENGTH, tree, label=run)
        _by_depth(axes[0, -1], histories, _keys(every, _CONDITIONAL))
        for axis in axes[0]:
            axis.set_xlabel("tokens trained on")
            axis.xaxis.set_major_formatter(ticker.EngFormatter())
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
        axes[0, -1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        figure.tight_layout()
        figure.savefig(out, dpi=120)
    except ValueError as error:
        raise ConfigError(f"{out}: {error}") from None
    finally:
        pyplot.close(figure)


def _evaluations(run: Path) -> list[dict[str, Any]]:
    if not (run / METRICS).is_file():
        raise ConfigError(f"{run}: not the folder of a run, it has no {METRICS}")
    found = [record for record in read_metrics(run) if _keys([record], _LENGTH)]
    if not found:
        raise ConfigError(f"{run / METRICS}: holds no evaluation yet")
    return found


def _keys(records: list[dict[str, Any]], name: str) -> list[str]:
    """What stands behind `name/` in the records, in their order."""
    names = dict.fromkeys(key for record in records for key in record)
    return [key.partition("/")[2] for key in names if key.startswith(f"{name}/")]


def _by_depth(axis, histories: dict[str, list[dict[str, Any]]], depths: list[str]) -> None:
    axis.set_title("by depth of the drafted token, T = 0")
    axis.set_ylabel("conditional acceptance")
    axis.set_ylim(0, 1)
    styles = itertools.cycle(("-", "--", ":", "-."))
    for style, (run, history) in zip(styles, histories.items(), strict=False):
        for number, depth in enumerate(depths):
            label = depth.replace("depth", "depth ") + (f", {run}" if len(histories) > 1 else "")
            color = f"C{number}"
            _curve(axis, history, _CONDITIONAL, depth, label=label, color=color, linestyle=style)


def _curve(axis, history: list[dict[str, Any]], name: str, key: str, **style: str) -> None:
    records = [record for record in history if f"{name}/{key}" in record]
    if not records:
        return
    tokens = [record["tokens"] for record in records]
    value, low, high = (
        [record[f"{name}{end}/{key}"] for record in records] for end in ("", "_low", "_high")
    )
    (line,) = axis.plot(tokens, value, marker=".", **style)
    axis.fill_between(tokens, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[Path, typer.Option(help="Image to write; its ending says the form.")],
) -> None:
    """Draws acceptance over tokens for one run or several."""
    plot(runs, out)


if __name__ == "__main__":
    run_program(main, "train.plot")
