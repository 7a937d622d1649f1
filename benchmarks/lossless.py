"""Is greedy speculation lossless? Equal text on MT-Bench against plain decoding, in float32.

    python -m benchmarks.lossless

For each tree and batch size, all first questions are decoded and compared with plain decoding of
batch 1 under the rule of `benchmarks.equal_text`: ids are identical up to the first difference,
and a difference is excused only where the plain run's own margin is within rounding.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from jax_eagle import generate, load_draft, load_target
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program
from jax_eagle.prompts import as_chat, mt_bench

from .equal_text import compare, summarise

TREES = ("chain:3", "static:eagle-26", "dynamic:depth=4,width=4,nodes=16")


def decode_all(target, draft, prompts, *, tree: str, batch: int, new_tokens: int):
    """New tokens of all prompts, in their order."""
    out: list[list[int]] = []
    label = f"{tree if draft else 'plain'}, batch {batch}"
    for begin in track(range(0, len(prompts), batch), description=label, transient=True):
        chosen = prompts[begin : begin + batch]
        result = generate(target, draft, chosen, max_new_tokens=new_tokens, tree=tree)
        out += result.tokens
    return out


def main(
    tree: Annotated[list[str] | None, typer.Option(help="Tree; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; repeatable.")] = None,
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    draft: Annotated[str, typer.Option()] = "smollm2-135m-instruct-eagle",
    prompts: Annotated[int, typer.Option(help="At most so many.")] = 80,
    new_tokens: Annotated[int, typer.Option()] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Compares speculative with plain decoding, prompt by prompt; exits 1 on a difference."""
    enable_compilation_cache()
    target = load_target(model, dtype="float32").pack()
    head = load_draft(draft, target).pack()
    chosen = as_chat(target, mt_bench()[:prompts])
    plain = decode_all(target, None, chosen, tree="auto", batch=1, new_tokens=new_tokens)
    rows, good = [], True
    for shape in tree or TREES:
        for size in batch or [1, 8]:
            other = decode_all(target, head, chosen, tree=shape, batch=size, new_tokens=new_tokens)
            report = summarise(compare(target, chosen, plain, other))
            good &= report["equal"]
            rows.append({"tree": shape, "batch": size} | report)
            print(json.dumps(rows[-1]), flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        results = {"machine": describe_machine(), "new_tokens": new_tokens, "rows": rows}
        out.write_text(json.dumps(results, indent=1) + "\n")
    raise typer.Exit(0 if good else 1)


if __name__ == "__main__":
    run_program(main, "benchmarks.lossless")
