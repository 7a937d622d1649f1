"""What weights and caches in fewer bits cost: the target's logits, and a draft's acceptance.

    python -m benchmarks.quantization

For each scheme the target reads golden texts, prompts with the greedy continuations of the whole
weights (tests/goldens): the relative error of its logits where they continue, and how often its
favourite is still the token that is there. Then the draft proposes for the whole target, with whole
weights and with FFNs in int4 (arXiv 2508.08192 does that and loses at most 1.1 %): texts are the
same, so the acceptance lengths compare like with like. Fails if int4 loses more than 2 %.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jax_eagle import Target, load_draft, load_target
from jax_eagle.acceptance import decode_acceptance
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.config import KV_DTYPES
from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program
from jax_eagle.prompts import as_chat, mt_bench
from jax_eagle.quantize import quantize

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens" / "smollm2_greedy.npz"
RESULTS = Path(__file__).parent / "results" / "quantization_cpu.json"
SCHEMES = ("fp8", "int8", "int4", "mlp=int4")
KV = "kv fp8"
MOST_LOST = 0.02


def continuations(target: Target, texts: list[tuple[list[int], list[int]]], label: str):
    """Logits [text, new token, V] that predict the continuation of each (prompt, continuation)."""
    width = max(len(prompt) + len(new) for prompt, new in texts)
    for prompt, new in track(texts, description=label, transient=True):
        row = np.zeros((1, width), np.int32)
        row[0, : len(prompt) + len(new)] = prompt + new
        logits_TV = np.asarray(target.logits(row)[0])
        yield logits_TV[len(prompt) - 1 : len(prompt) + len(new) - 1]


def fidelity(target: Target, texts: list[tuple[list[int], list[int]]]) -> list[dict[str, Any]]:
    """Relative error of the logits and greedy agreement of each scheme."""
    variants = {scheme: lambda s=scheme: quantize(target, s) for scheme in SCHEMES}
    cached = dataclasses.replace(target.config, kv_dtype=KV_DTYPES["fp8"])
    variants[KV] = lambda: target.replace(config=cached)
    whole = list(continuations(target, texts, "whole weights"))
    rows = []
    for name, variant in variants.items():
        wrong = norm = agreed = count = 0.0
        found = continuations(variant(), texts, name)
        for (_, new), expected_TV, logits_TV in zip(texts, whole, found, strict=True):
            wrong += float(np.sum((logits_TV - expected_TV) ** 2))
            norm += float(np.sum(expected_TV**2))
            agreed += int(np.sum(logits_TV.argmax(-1) == new))
            count += len(new)
        rows.append(
            {"scheme": name, "relative_error": (wrong / norm) ** 0.5, "agreement": agreed / count}
        )
    return rows


def acceptance(
    target: Target, draft: str, tree: str, prompts: int, new_tokens: int
) -> dict[str, Any]:
    """Acceptance lengths of a draft with whole weights and with FFNs in int4."""
    chosen = as_chat(target, mt_bench()[:prompts])
    lengths = {}
    for name, quantization in (("float32", None), ("int4 FFN", "mlp=int4")):
        head = load_draft(draft, target, quantization=quantization)
        decoded = decode_acceptance(
            target, head, chosen, trees=[tree], max_new_tokens=new_tokens, batch=min(8, prompts)
        )
        lengths[name] = decoded[tree].acceptance_length().value
    lost = 1 - lengths["int4 FFN"] / lengths["float32"]
    return {"tree": tree, "prompts": len(chosen), "lengths": lengths, "lost": lost}


def main(
    prompts: Annotated[int, typer.Option(help="At most so many texts, and questions.")] = 80,
    new_tokens: Annotated[int, typer.Option(help="Of each answer to a question.")] = 64,
    tree: Annotated[str, typer.Option()] = "chain:3",
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    draft: Annotated[str, typer.Option()] = "smollm2-135m-instruct-eagle",
    out: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = RESULTS,
) -> None:
    """Measures what fewer bits change; exits 1 if the draft loses too much."""
    enable_compilation_cache()
    target = load_target(model, dtype="float32")
    with np.load(GOLDENS) as data:
        texts = [
            (prompt[prompt >= 0].tolist(), new[new >= 0].tolist())
            for prompt, new in zip(data["prompt_ids"], data["new_ids"], strict=True)
        ][:prompts]
    rows = fidelity(target, texts)
    table = Table("scheme", "relative error of logits", "greedy agreement")
    for row in rows:
        table.add_row(row["scheme"], f"{row['relative_error']:.4f}", f"{row['agreement']:.1%}")
    console = Console()
    console.print(table)
    drafted = acceptance(target, draft, tree, prompts, new_tokens)
    figures = ", ".join(f"{name} {length:.3f}" for name, length in drafted["lengths"].items())
    console.print(f"acceptance length on {tree}: {figures} ({-drafted['lost']:+.1%})")
    results = {
        "machine": describe_machine(), "texts": len(texts), "new_tokens": new_tokens,
        "target": rows, "draft": drafted,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    raise typer.Exit(int(drafted["lost"] > MOST_LOST))


if __name__ == "__main__":
    run_program(main, "benchmarks.quantization")
