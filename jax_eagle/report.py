"""`jax-eagle bench`: prompts in, a table or JSON out. The measuring is in `bench`."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from . import terminal
from .bench import (
    PROMPTS,
    Floor,
    Run,
    bandwidth_probe,
    floor,
    measure,
    summarise,
    warm_up,
)
from .draft import Draft
from .llama import Target
from .machine import describe_machine


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What is measured; written into the JSON as it is."""

    model: str
    draft: str | None
    trees: list[str]
    batch_size: int
    max_new_tokens: int
    repetitions: int


def bench(
    target: Target,
    draft: Draft | None,
    prompts: list[list[int]],
    options: BenchOptions,
    *,
    as_json: bool,
) -> None:
    """Measures and prints; progress goes to stderr."""
    err, size = Console(stderr=True), options.batch_size
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    arguments = (target, draft, batches, options.trees)
    with terminal.timed_step(err, "Compiling (kept for the next start)"):
        warm_up(*arguments, max_new_tokens=options.max_new_tokens)
    probe = bandwidth_probe()
    with terminal.timed_step(err, f"Measuring {len(prompts)} prompts", spinner=False):
        runs, bandwidths = [], [probe()]
        for run in measure(
            *arguments, max_new_tokens=options.max_new_tokens, repetitions=options.repetitions
        ):
            runs.append(run)
            bandwidths.append(probe())
    limit = floor(target, runs, bandwidths)
    if as_json:
        print(json.dumps(as_data(runs, limit, options), indent=1))
        return
    title = f"{len(prompts)} prompts x {options.repetitions}, interleaved, medians"
    Console().print(terminal.speed_table(summarise(runs), title))
    print(terminal.floor_line(limit))


def as_data(runs: list[Run], limit: Floor, options: BenchOptions) -> dict[str, Any]:
    """Everything measured, with machine and date, for json.dumps."""
    return {
        "machine": describe_machine(),
        "options": dataclasses.asdict(options),
        "summaries": [dataclasses.asdict(row) for row in summarise(runs)],
        "floor": dataclasses.asdict(limit) | {"share": limit.share},
        "runs": [
            {k: v for k, v in dataclasses.asdict(run).items() if k != "tokens"}
            | {"decode_tokens": run.decode_tokens}
            for run in runs
        ],
    }


def read_prompts(path: Path | None) -> list[str]:
    """Prompts of a file, one a line; .jsonl: the field `prompt`, or the first of `turns`.

    Raises:
      ValueError: no prompts, or a line that holds none.
    """
    if path is None:
        return list(PROMPTS)
    prompts = list(_lines(path))
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def _lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield line
            continue
        try:
            record = json.loads(line)
            yield record["prompt"] if "prompt" in record else record["turns"][0]
        except (ValueError, KeyError, TypeError, IndexError):
            message = f"{path}:{number}: expected JSON with a field prompt or turns"
            raise ValueError(message) from None
