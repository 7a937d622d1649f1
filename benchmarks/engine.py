"""What the serving engine costs beside `generate`: the same prompts through both, in turn.

`generate` has all prompts at once and stays on the device until the last token. The engine plans,
enqueues and reads every round, detokenises, keeps pages. Ratios are medians over repetitions,
prefill included. The host's share is the part of a step in which the engine's thread did not wait
for the device; it runs beside the device, so it costs time only where it is the longer of the two.

    python -m benchmarks.engine                          # batch 8; about ten minutes on two cores
    python -m benchmarks.engine --batch 4 --tree plain --tree chain:1
"""

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jax_eagle import Draft, SamplingParams, Target, generate, load_draft, load_target
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program
from jax_eagle.prompts import as_chat, mt_bench
from serve.device import EngineConfig
from serve.dispatch import PLAIN, Programs
from serve.engine import Engine
from serve.request import Request

PAGE_SIZE = 64
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Pair:
    """One batch through `generate` and through the engine."""

    tree: str
    tokens: int
    generate_seconds: float
    engine_seconds: float
    same_texts: int
    steps: int
    step_seconds: float
    wait_seconds: float


def make_engine(target: Target, draft: Draft, trees: Sequence[str], batch: int, longest: int):
    """An engine with the programs of one batch size and all trees."""
    limits = [*range(1, len(trees)), None]
    programs = Programs(tuple(zip(limits, trees, strict=True)), (batch,))
    pages = batch * -(-longest // PAGE_SIZE)
    return Engine(
        target, draft, EngineConfig(max_model_len=longest, programs=programs, num_pages=1 + pages)
    )


def through_engine(engine: Engine, prompts, tree: str, new_tokens: int) -> list[list[int]]:
    """Runs the prompts to their end, like `generate` without stop tokens."""
    tokens: list[list[int]] = [[] for _ in prompts]
    for row, prompt in zip(tokens, prompts, strict=True):
        request = Request(
            f"{next(_numbers)}", tuple(prompt), SamplingParams(), new_tokens, tree=tree
        )
        engine.add(request, lambda delta, row=row: row.extend(delta.token_ids))
    while engine.busy:
        engine.step()
    engine.pool.forget()  # or the next run would find its prompts there
    return tokens


def measure(engine: Engine, target, draft, prompts, tree: str, new_tokens: int) -> Pair:
    """Both, one after the other."""
    begin = time.perf_counter()
    result = generate(
        target, None if tree == PLAIN else draft, prompts, max_new_tokens=new_tokens,
        stop_token_ids=[], tree="auto" if tree == PLAIN else tree,
    )  # fmt: skip
    middle, before = time.perf_counter(), engine.status
    tokens = through_engine(engine, prompts, tree, new_tokens)
    end, after = time.perf_counter(), engine.status
    return Pair(
        tree,
        sum(map(len, tokens)),
        middle - begin,
        end - middle,
        sum(a == b for a, b in zip(tokens, result.tokens, strict=True)),
        after.steps - before.steps,
        after.step_seconds - before.step_seconds,
        after.wait_seconds - before.wait_seconds,
    )


def summarise(pairs: Sequence[Pair]) -> dict:
    """Medians of one tree."""
    median = statistics.median
    return {
        "tree": pairs[0].tree,
        "generate_tokens_per_second": median(p.tokens / p.generate_seconds for p in pairs),
        "engine_tokens_per_second": median(p.tokens / p.engine_seconds for p in pairs),
        "ratio": median(p.generate_seconds / p.engine_seconds for p in pairs),
        "ratios": sorted(p.generate_seconds / p.engine_seconds for p in pairs),
        "same_texts": min(p.same_texts for p in pairs),
        "step_ms": median(1e3 * p.step_seconds / p.steps for p in pairs),
        "host_ms": median(1e3 * (p.step_seconds - p.wait_seconds) / p.steps for p in pairs),
        "host_share": median(1 - p.wait_seconds / p.step_seconds for p in pairs),
    }


def main(
    model: str = "smollm2-135m-instruct",
    draft: str = "smollm2-135m-instruct-eagle",
    tree: Annotated[list[str] | None, typer.Option(help="Default: plain, chain:1.")] = None,
    batch: int = 8,
    new_tokens: int = 128,
    repetitions: int = 5,
    out: Annotated[Path | None, typer.Option(help="Write all figures as JSON.")] = None,
) -> None:
    """Compares tokens a second of the engine and of `generate`."""
    enable_compilation_cache()
    target = load_target(model).pack()
    head = load_draft(draft, target).pack()
    trees = tree or [PLAIN, "chain:1"]
    prompts = as_chat(target, mt_bench()[:batch])
    longest = max(map(len, prompts)) + new_tokens
    engine = make_engine(target, head, trees, batch, longest)
    for name, seconds in engine.warm_up():
        print(f"{name}: {seconds:.1f} s", flush=True)
    for name in trees:
        measure(engine, target, head, prompts, name, new_tokens=8)
    runs = list(itertools.product(range(repetitions), trees))
    pairs = [
        measure(engine, target, head, prompts, name, new_tokens)
        for _, name in track(runs, description="engine and generate")
    ]
    rows = [summarise([p for p in pairs if p.tree == name]) for name in trees]
    table = Table("tree", "generate tok/s", "engine tok/s", "ratio", "same text", "step", "host")
    for row in rows:
        table.add_row(
            row["tree"], f"{row['generate_tokens_per_second']:.1f}",
            f"{row['engine_tokens_per_second']:.1f}", f"{row['ratio']:.3f}",
            f"{row['same_texts']}/{batch}", f"{row['step_ms']:.1f} ms",
            f"{row['host_ms']:.1f} ms ({row['host_share']:.0%})",
        )  # fmt: skip
    Console().print(table)
    if out:
        results = {"machine": describe_machine(), "batch": batch, "rows": rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main, "benchmarks.engine")
