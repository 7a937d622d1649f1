"""What weights and caches in fewer bits cost: the target's logits, and a draft's acceptance.

    python -m benchmarks.quantization

For each scheme the target reads golden texts, prompts with the greedy continuations of the whole
weights (tests/goldens): the relative error of its logits where they continue, and how often its
favourite is still the same. Tiny golden models of Llama 3 and 4 read random tokens. Then the draft
proposes for the whole target, with whole weights and with FFNs in int4 (arXiv 2508.08192 does that
and loses at most 1.1 %): texts are the same, so the acceptance lengths compare like with like.
Fails if int4 loses more than 2 %.
"""

import dataclasses
import json
from collections.abc import Iterator
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
from jax_eagle.config import KV_DTYPES, ConfigError
from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program
from jax_eagle.prompts import as_chat, mt_bench
from jax_eagle.quantize import quantize

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
TINY = ("l3_a", "l4_s", "l4_m")
"""Golden models of Llama 3 and 4."""
RESULTS = Path(__file__).parent / "results" / "quantization_cpu.json"
SCHEMES = ("fp8", "int8", "int4", "mlp=int4")
KV = "kv fp8"
MOST_LOST = 0.02

Text = tuple[list[int], int]
"""Tokens, and where what counts begins."""


def logits_behind(target: Target, texts: list[Text], label: str) -> Iterator[np.ndarray]:
    """Logits [T, V] of each text, from its token `begin` - 1 to the last but one."""
    width = max(len(tokens) for tokens, _ in texts)
    for tokens, begin in track(texts, description=label, transient=True):
        row = np.zeros((1, width), np.int32)
        row[0, : len(tokens)] = tokens
        yield np.asarray(target.logits(row)[0])[begin - 1 : len(tokens) - 1]


def fidelity(name: str, target: Target, texts: list[Text]) -> list[dict[str, Any]]:
    """Relative error of the logits, and agreement with the favourites of the whole weights."""
    variants = {scheme: lambda s=scheme: quantize(target, s) for scheme in SCHEMES}
    cached = dataclasses.replace(target.config, kv_dtype=KV_DTYPES["fp8"])
    variants[KV] = lambda: target.replace(config=cached)
    whole = list(logits_behind(target, texts, f"{name}, whole weights"))
    rows = []
    for scheme, variant in variants.items():
        row: dict[str, Any] = {"model": name, "scheme": scheme}
        rows.append(row)
        try:
            found = logits_behind(variant(), texts, f"{name}, {scheme}")
        except ConfigError as error:  # tiny layers whose inputs form no groups
            row["refused"] = str(error)
            continue
        wrong = norm = agreed = count = 0.0
        for expected_TV, logits_TV in zip(whole, found, strict=True):
            wrong += float(np.sum((logits_TV - expected_TV) ** 2))
            norm += float(np.sum(expected_TV**2))
            agreed += int(np.sum(logits_TV.argmax(-1) == expected_TV.argmax(-1)))
            count += len(expected_TV)
        row |= {"relative_error": (wrong / norm) ** 0.5, "agreement": agreed / count}
    return rows


def golden_texts(count: int) -> list[Text]:
    """Prompts with the greedy continuations of the whole weights."""
    with np.load(GOLDENS / "smollm2_greedy.npz") as data:
        pairs = zip(data["prompt_ids"], data["new_ids"], strict=True)
        texts = [(prompt[prompt >= 0].tolist(), new[new >= 0].tolist()) for prompt, new in pairs]
    return [(prompt + new, len(prompt)) for prompt, new in texts][:count]


def tiny_texts(target: Target) -> list[Text]:
    """Random tokens, all of which count."""
    tokens = np.random.default_rng(0).integers(0, target.config.vocab_size, (8, 48))
    return [(row, 1) for row in tokens.tolist()]


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
    rows = fidelity(model, target, golden_texts(prompts))
    for case in TINY:
        tiny = load_target(GOLDENS / case, dtype="float32")
        rows += fidelity(case, tiny, tiny_texts(tiny))
    table = Table("model", "scheme", "relative error of logits", "greedy agreement")
    for row in rows:
        figures = ("refused", "")
        if "agreement" in row:
            figures = f"{row['relative_error']:.4f}", f"{row['agreement']:.1%}"
        table.add_row(row["model"], row["scheme"], *figures)
    console = Console()
    console.print(table)
    drafted = acceptance(target, draft, tree, prompts, new_tokens)
    figures = ", ".join(f"{name} {length:.3f}" for name, length in drafted["lengths"].items())
    console.print(f"acceptance length on {tree}: {figures} ({-drafted['lost']:+.1%})")
    results = {
        "machine": describe_machine(), "texts": len(golden_texts(prompts)),
        "new_tokens": new_tokens, "target": rows, "draft": drafted,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    raise typer.Exit(int(drafted["lost"] > MOST_LOST))


if __name__ == "__main__":
    run_program(main, "benchmarks.quantization")
