"""Speed-up over plain decoding per tree, and the plain step against the memory-bandwidth floor.

    python -m benchmarks.speed --tree static:4 --tree chain:3

Batch 1, greedy, interleaved in one process (`jax_eagle.bench` says how). Ratios are medians over
pairs of runs of the same prompt.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jax_eagle import bench, load_draft, load_target
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program
from jax_eagle.prompts import as_chat, mt_bench


def main(
    tree: Annotated[list[str] | None, typer.Option(help="Tree; may be repeated.")] = None,
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    draft: Annotated[str, typer.Option()] = "smollm2-135m-instruct-eagle",
    prompts: Annotated[int, typer.Option(help="So many MT-Bench questions.")] = 20,
    new_tokens: Annotated[int, typer.Option()] = 64,
    repetitions: Annotated[int, typer.Option()] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measures the speed of each tree against plain decoding."""
    enable_compilation_cache()
    target = load_target(model).pack()
    head = load_draft(draft, target).pack()
    trees = tree or ["chain:1", "static:3", "static:4", "chain:3", "static:8"]
    step = max(1, 80 // prompts)
    batches = [[row] for row in as_chat(target, mt_bench()[::step][:prompts])]
    bench.warm_up(target, head, batches, trees, max_new_tokens=new_tokens)
    sample = bench.bandwidth_probe()
    runs, bandwidths = [], []
    total = len(batches) * repetitions * (len(trees) + 1)
    measured = bench.measure(
        target, head, batches, trees, max_new_tokens=new_tokens, repetitions=repetitions
    )
    for i, run in enumerate(track(measured, total=total, description="speed")):
        runs.append(run)
        if i % 10 == 0:
            bandwidths.append(sample())
    summaries, floor = bench.summarise(runs), bench.floor(target, runs, bandwidths)

    table = Table("tree", "acceptance length", "tokens/s", "ratio to plain", "quartiles")
    for row in summaries:
        low, high = row.ratio_quartiles
        table.add_row(
            row.tree, f"{row.acceptance_length:.3f}", f"{row.tokens_per_second:.1f}",
            f"{row.ratio:.3f}", f"{low:.3f} .. {high:.3f}",
        )  # fmt: skip
    Console().print(table)
    print(
        f"plain step {1e3 * floor.step_seconds:.1f} ms; floor {1e3 * floor.floor_seconds:.1f} ms "
        f"({floor.weight_bytes / 1e6:.0f} MB at {floor.bytes_per_second / 1e9:.1f} GB/s): "
        f"{floor.share:.0%} of the floor"
    )
    if out:
        results = {
            "machine": describe_machine(),
            "trees": [dataclasses.asdict(row) for row in summaries],
            "floor": dataclasses.asdict(floor) | {"share": floor.share},
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main, "benchmarks.speed")
