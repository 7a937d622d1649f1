"""Acceptance of a draft on MT-Bench and HumanEval: lengths by tree, and chains along the answers.

    python -m benchmarks.acceptance --tree chain:3 --tree static:8

Greedy (T = 0), 64 new tokens, the questions as chat prompts. Acceptance length counts the bonus
token: (new tokens - 1) / target calls after prefill. With --forced also the acceptance of chains
under every token of the answers (see `jax_eagle.acceptance`).
"""

import functools
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jax_eagle import load_draft, load_target
from jax_eagle.acceptance import (
    CONVENTION,
    Decoded,
    Depths,
    Forced,
    decode_acceptance,
    forced_acceptance,
    greedy_answers,
)
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program
from jax_eagle.prompts import SUITES, as_chat

FORCED_DEPTH = 5


def decoded_figures(decoded: Decoded) -> dict[str, Any]:
    """Figures of one suite under one tree, for the table and the JSON file."""
    length = decoded.acceptance_length()
    return {
        "prompts": len(decoded.rounds),
        "gained": int(decoded.gained.sum()),
        "rounds": int(decoded.rounds.sum()),
        "acceptance_length": length.value,
        "interval": length[1:],
        **by_depth(decoded.depths),
    }


def forced_figures(forced: Forced) -> dict[str, Any]:
    """Figures of the chains under the answers of one suite."""
    depths = range(1, forced.depths.max_depth + 1)
    return {
        "chains": int(forced.gained.sum()),
        **by_depth(forced.depths),
        "joint": {d: forced.depths.joint(d) for d in depths},
        "acceptance_length_of_chain": {d: forced.acceptance_length(d) for d in depths},
        "expected_acceptance_at_temperature_1": forced.expected_acceptance(),
    }


def by_depth(depths: Depths) -> dict[str, Any]:
    """Conditional acceptance by depth, and by depth and rank (0: the draft's favourite)."""
    names = range(1, depths.max_depth + 1)
    return {
        "by_depth": {d: depths.conditional(d).value for d in names},
        "by_depth_and_rank": {d: dict(enumerate(depths.by_rank(d))) for d in names},
    }


def show(results: dict[str, Any]) -> None:
    """Prints acceptance lengths, then acceptance by depth and rank."""
    console = Console()
    table = Table("tree", "draft sync", "suite", "acceptance length", "by depth", "depth 1 by rank")
    for row in results["rows"]:
        depth = " ".join(f"{x:.3f}" for x in row["by_depth"].values())
        rank = " ".join(f"{x:.3f}" for x in row["by_depth_and_rank"].get(1, {}).values())
        low, high = row["interval"]
        length = f"{row['acceptance_length']:.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(row["tree"], row["draft_sync"], row["suite"], length, depth, rank)
    console.print(table)
    for suite, row in results["forced"].items():
        table = Table("depth", "conditional", "joint", "length of chain", "by rank", title=suite)
        for d, ranks in row["by_depth_and_rank"].items():
            joint, length = row["joint"][d].value, row["acceptance_length_of_chain"][d].value
            shares = " ".join(f"{x:.3f}" for x in ranks.values())
            table.add_row(
                str(d), f"{row['by_depth'][d]:.3f}", f"{joint:.3f}", f"{length:.3f}", shares
            )
        console.print(table)
    console.print(CONVENTION, highlight=False)


def main(
    tree: Annotated[list[str] | None, typer.Option(help="Tree; may be repeated.")] = None,
    draft_sync: Annotated[list[str] | None, typer.Option(help="all or last; repeatable.")] = None,
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    draft: Annotated[str, typer.Option()] = "smollm2-135m-instruct-eagle",
    suite: Annotated[list[str] | None, typer.Option(help="mt-bench, humaneval.")] = None,
    prompts: Annotated[int, typer.Option(help="At most so many of each suite.")] = 1000,
    batch: Annotated[int, typer.Option()] = 8,
    new_tokens: Annotated[int, typer.Option()] = 64,
    forced: Annotated[
        bool, typer.Option(help="Chains along the target's own answers too.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measures acceptance lengths of a draft."""
    enable_compilation_cache()
    base = load_target(model)
    head = load_draft(draft, base)
    size: dict[str, Any] = {"max_new_tokens": new_tokens, "batch": batch}
    rows, chains = [], {}
    for name in suite or list(SUITES):
        chosen = as_chat(base, SUITES[name]()[:prompts])
        for shape in tree or ["chain:3", "static:8"]:
            for sync in draft_sync or ["all"]:
                decoded = decode_acceptance(
                    base, head, chosen, trees=[shape], draft_sync=sync, **size,
                    progress=functools.partial(track, description=shape, transient=True),
                )  # fmt: skip
                about = {"tree": shape, "draft_sync": sync, "suite": name}
                rows.append(about | decoded_figures(decoded[shape]))
        if forced:
            answers = greedy_answers(base, chosen, **size)
            found = forced_acceptance(base, head, chosen, answers, depth=FORCED_DEPTH, batch=batch)
            chains[name] = forced_figures(found)
    for shape, sync in sorted({(row["tree"], row["draft_sync"]) for row in rows}):
        same = [row for row in rows if (row["tree"], row["draft_sync"]) == (shape, sync)]
        both = sum(row["gained"] for row in same) / sum(row["rounds"] for row in same)
        print(f"{shape} (sync {sync}), all suites together: {both:.3f}")
    results = {
        "machine": describe_machine(), "new_tokens": new_tokens, "rows": rows, "forced": chains,
    }  # fmt: skip
    show(results)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main, "benchmarks.acceptance")
