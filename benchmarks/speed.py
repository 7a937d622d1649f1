"""Speed-up over plain decoding, by tree and draft; the plain step against the time to read memory.

    python -m benchmarks.speed --tree static:4 --tree chain:3
    python -m benchmarks.speed --suite humaneval
    python -m benchmarks.speed --draft runs/one/draft --draft runs/three/draft --whole-vocabulary

Batch 1, greedy, interleaved in one process, one draft after the other (`jax_eagle.bench` says how).
Ratios are medians over pairs of runs of the same prompt.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jax_eagle import Draft, Target, bench, load_draft, load_target
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program
from jax_eagle.prompts import SUITES, as_chat, prompts_of


def main(
    tree: Annotated[list[str] | None, typer.Option(help="Tree; may be repeated.")] = None,
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    draft: Annotated[list[str] | None, typer.Option(help="Draft; may be repeated.")] = None,
    whole_vocabulary: Annotated[
        bool,
        typer.Option(help="Drafts that use the target's head: also from the whole vocabulary."),
    ] = False,
    suite: Annotated[str, typer.Option(help=f"Prompts: {', '.join(SUITES)}, or a file.")] = (
        "mt-bench"
    ),
    prompts: Annotated[int, typer.Option(min=1, help="So many of them, evenly spread.")] = 20,
    new_tokens: Annotated[int, typer.Option()] = 64,
    repetitions: Annotated[int, typer.Option()] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measures the speed of each tree against plain decoding."""
    enable_compilation_cache()
    texts = spread(prompts_of(suite), prompts)
    target = load_target(model).pack()
    trees = tree or ["chain:1", "static:3", "static:4", "chain:3", "static:8"]
    batches = [[row] for row in as_chat(target, texts)]
    sample = bench.bandwidth_probe()
    rows, runs, bandwidths = [], [], []
    for name, head in heads(draft or ["smollm2-135m-instruct-eagle"], target, whole_vocabulary):
        bench.warm_up(target, head, batches, trees, max_new_tokens=new_tokens)
        total = len(batches) * repetitions * (len(trees) + 1)
        measured = bench.measure(
            target, head, batches, trees, max_new_tokens=new_tokens, repetitions=repetitions
        )
        own = []
        for i, run in enumerate(track(measured, total=total, description=name)):
            own.append(run)
            if i % 10 == 0:
                bandwidths.append(sample())
        layers, vocabulary = head.config.layer.num_layers, head.config.draft_vocab_size
        what = {"draft": name, "layers": layers, "vocabulary": vocabulary}
        rows += [what | dataclasses.asdict(row) for row in bench.summarise(own)]
        runs += own
    floor = bench.floor(target, runs, bandwidths)

    show(rows)
    print(
        f"plain step {1e3 * floor.step_seconds:.1f} ms; floor {1e3 * floor.floor_seconds:.1f} ms "
        f"({floor.weight_bytes / 1e6:.0f} MB at {floor.bytes_per_second / 1e9:.1f} GB/s): "
        f"{floor.share:.0%} of the floor"
    )
    if out:
        results = {
            "machine": describe_machine(),
            "suite": suite,
            "prompts": len(texts),
            "new_tokens": new_tokens,
            "repetitions": repetitions,
            "trees": rows,
            "floor": dataclasses.asdict(floor) | {"share": floor.share},
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


def spread(texts: list[str], count: int) -> list[str]:
    """So many of the texts at even distances; all, where there are fewer."""
    count = min(count, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def heads(names: list[str], target: Target, whole_vocabulary: bool) -> list[tuple[str, Draft]]:
    """The drafts, packed; with `whole_vocabulary` each of them once more, without its own."""
    found = []
    for name in names:
        draft = load_draft(name, target).pack()
        found.append((name, draft))
        if not whole_vocabulary:
            continue
        if draft.draft_to_target is None or draft.config.own_head:
            own = "has a head of its own" if draft.config.own_head else "proposes from all tokens"
            print(f"{name}: measured once, it {own}")
            continue
        config = dataclasses.replace(draft.config, draft_vocab_size=None)
        found.append((name, draft.replace(config=config, draft_to_target=None)))
    return found


def show(rows: list[dict]) -> None:
    """One line a draft and tree."""
    table = Table(
        "draft", "layers", "vocabulary", "tree", "acceptance length", "tokens/s",
        "ratio to plain", "quartiles",
    )  # fmt: skip
    for row in rows:
        low, high = row["ratio_quartiles"]
        table.add_row(
            row["draft"], str(row["layers"]), str(row["vocabulary"] or "whole"), row["tree"],
            f"{row['acceptance_length']:.3f}", f"{row['tokens_per_second']:.1f}",
            f"{row['ratio']:.3f}", f"{low:.3f} .. {high:.3f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    run_program(main, "benchmarks.speed")
