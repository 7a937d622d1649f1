"""Acceptance length per tree, with tables by depth and by rank.

    python -m benchmarks.acceptance --tree chain:3 --tree static:8

Greedy (T = 0), 64 new tokens, the questions as chat prompts. Acceptance length counts the bonus
token: (new tokens - 1) / target calls after prefill.
"""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jax_eagle import Draft, Target, generate_stream, load_draft, load_target
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program

from .prompts import SUITES, as_chat


@dataclasses.dataclass
class Count:
    """What happened in the rounds of one suite under one tree."""

    gained: int = 0
    rounds: int = 0
    reached: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    """Rounds whose path reached depth d - 1 (where the tree may have ended on that branch)."""
    accepted: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    """(depth, rank) of accepted nodes."""

    def add(self, new_tokens: list[int], ranks: list[int]) -> None:
        """One round of one sequence."""
        self.gained += len(new_tokens)
        self.rounds += 1
        for depth in range(1, len(ranks) + 2):
            self.reached[depth] += 1
        for depth, rank in enumerate(ranks, 1):
            self.accepted[depth, rank] += 1

    def summary(self) -> dict:
        """Figures for the table and the JSON file."""
        depths = sorted({depth for depth, _ in self.accepted})
        return {
            "acceptance_length": self.gained / max(self.rounds, 1),
            "rounds": self.rounds,
            "by_depth": {
                d: sum(n for (e, _), n in self.accepted.items() if e == d) / self.reached[d]
                for d in depths
            },
            "by_depth_and_rank": {
                d: {r: n / self.reached[d] for (e, r), n in sorted(self.accepted.items()) if e == d}
                for d in depths
            },
        }


def measure(
    target: Target, draft: Draft, prompts, *, tree: str, batch: int, new_tokens: int, **options
) -> Count:
    """Decodes all prompts and counts what each round accepted."""
    count = Count()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    for rows in track(batches, description=tree, transient=True):
        chosen = [prompts[i] for i in rows]
        stream = generate_stream(
            target, draft, chosen, max_new_tokens=new_tokens, tree=tree, **options
        )
        running = np.ones(len(chosen), bool)
        for index, event in enumerate(stream):
            for b in np.flatnonzero(running):
                if index and event.new_tokens[b]:
                    count.add(event.new_tokens[b], event.ranks[b])
                running[b] = not event.finish_reasons[b]
    return count


def show(results: dict) -> None:
    """Prints acceptance lengths, then acceptance by depth and rank."""
    console = Console()
    table = Table("tree", "draft sync", "suite", "acceptance length", "by depth", "depth 1 by rank")
    for row in results["rows"]:
        depth = " ".join(f"{x:.3f}" for x in row["by_depth"].values())
        rank = " ".join(f"{x:.3f}" for x in row["by_depth_and_rank"].get(1, {}).values())
        length = f"{row['acceptance_length']:.3f}"
        table.add_row(row["tree"], row["draft_sync"], row["suite"], length, depth, rank)
    console.print(table)


def main(
    tree: Annotated[list[str] | None, typer.Option(help="Tree; may be repeated.")] = None,
    draft_sync: Annotated[list[str] | None, typer.Option(help="all or last; repeatable.")] = None,
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    draft: Annotated[str, typer.Option()] = "smollm2-135m-instruct-eagle",
    suite: Annotated[list[str] | None, typer.Option(help="mt-bench, humaneval.")] = None,
    prompts: Annotated[int, typer.Option(help="At most so many of each suite.")] = 1000,
    batch: Annotated[int, typer.Option()] = 8,
    new_tokens: Annotated[int, typer.Option()] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measures acceptance lengths of a draft."""
    enable_compilation_cache()
    base = load_target(model)
    head = load_draft(draft, base)
    rows = []
    for name in suite or list(SUITES):
        chosen = as_chat(base, SUITES[name]()[:prompts])
        for shape in tree or ["chain:3", "static:8"]:
            for sync in draft_sync or ["all"]:
                count = measure(
                    base, head, chosen, tree=shape, batch=batch, new_tokens=new_tokens,
                    draft_sync=sync,
                )  # fmt: skip
                about = {"tree": shape, "draft_sync": sync, "suite": name, "prompts": len(chosen)}
                rows.append(about | {"gained": count.gained} | count.summary())
    for shape, sync in sorted({(row["tree"], row["draft_sync"]) for row in rows}):
        same = [row for row in rows if (row["tree"], row["draft_sync"]) == (shape, sync)]
        both = sum(row["gained"] for row in same) / sum(row["rounds"] for row in same)
        print(f"{shape} (sync {sync}), all suites together: {both:.3f}")
    results = {"machine": describe_machine(), "new_tokens": new_tokens, "rows": rows}
    show(results)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main, "benchmarks.acceptance")
