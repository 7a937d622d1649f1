r"""What helps a draft, at equal numbers of tokens: one run of the trainer a variant.

    make demo-data    # 1,536 dialogues are enough
    shuf -n 512 runs/data/library_chat.jsonl > runs/data/original.jsonl
    python -m train.regenerate --prompts runs/data/original.jsonl --seed 7 --sampled-share 0 \
      --out runs/data/regenerated.jsonl
    cat runs/data/dialogues.jsonl runs/data/regenerated.jsonl | shuf > runs/data/ablation.jsonl
    python -m benchmarks.ablations --tokens 100000 --source runs/data/ablation.jsonl \
      --original runs/data/original.jsonl --regenerated runs/data/regenerated.jsonl \
      --out benchmarks/results/ablations_cpu.json

The losses were compared later, on other chats:

    P=numpy,scipy,jax,flax,optax,orbax-checkpoint,einops,jinja2,typer,rich,grain,matplotlib
    python -m train.prompts --packages $P --count 640 --self-share 0.7 --seed 7 \
      --out runs/data/prompts.jsonl
    python -m train.regenerate --prompts runs/data/prompts.jsonl --seed 7 --sampled-share 0 \
      --out runs/data/dialogues.jsonl
    python -m benchmarks.ablations --tokens 100000 --source runs/data/dialogues.jsonl --only base \
      --only l1 --only "reverse kl" --only "top-k kl" --only "unroll 2" --only "noise 0.1" \
      --only "random start" --where runs/losses --out benchmarks/results/ablations_losses_cpu.json

Every variant is the base config with some keys changed, on text cut to the same number of tokens,
each seen once, with the same seed and the same evaluation. Differences below the intervals over
prompts say nothing, and one seed is one seed (nor is what `shuf` draws ever the same). Runs that
are there already are not run again; with other settings they are refused. Other contents of the
same file are not noticed: name another `--where` for them. `seconds` are of training; the first run
of a kind fills the kept features for those behind it.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from jax_eagle import load_target
from jax_eagle.checkpoint.files import read_json
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.config import ConfigError
from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program
from train.checkpoint import changed_keys
from train.config import load_config
from train.trainer import run

EAGLE3 = ["draft.kind=eagle3", "loss.feature=none", "loss.logits=kl", "loss.logits_weight=1.0"]
VARIANTS: dict[str, list[str]] = {
    "base": [],
    "layers 2": ["draft.num_layers=2"],
    "layers 3": ["draft.num_layers=3"],
    "cross entropy alone": ["loss.feature=none", "loss.logits_weight=1.0"],
    "features alone": ["loss.logits=none"],
    "l1": ["loss.feature=l1"],
    "reverse kl": ["loss.logits=reverse_kl"],
    "top-k kl": ["loss.logits=top_k_kl"],
    "unroll 2": ["loss.unroll=2"],
    "noise 0.1": ["loss.feature_noise=0.1"],
    "random start": ["draft.start=random"],
    "eagle3, unroll 1": [*EAGLE3, "draft.start=random"],
    "eagle3, closed-form start": EAGLE3,
    "eagle3, unroll 3": [*EAGLE3, "draft.start=random", "loss.unroll=3"],
}
"""Keys changed in each variant, all at the same number of tokens."""
LONGER: dict[str, tuple[str, int]] = {
    "base, tokens x2": ("base", 2),
    "base, tokens x4": ("base", 4),
    "layers 3, tokens x4": ("layers 3", 4),
    "eagle3, unroll 3, tokens x4": ("eagle3, unroll 3", 4),
}
"""Variants on so many times the tokens."""


def settings(tokens: int, source: str, where: Path, keys: list[str]) -> list[str]:
    """What all variants change in the base config, then what this one changes."""
    kept = f"features-{tokens}-{'eagle3' if 'draft.kind=eagle3' in keys else 'eagle'}"
    return [
        f"data.sources=[{{kind: chat, path: {source}, max_tokens: {tokens}, prompt_weight: 0.3}}]",
        "data.epochs=1",
        f"data.features={where / kept}",
        "evaluation.prompts=[mt-bench, humaneval]",
        "evaluation.trees=[chain:3]",
        "evaluation.every=null",
        "checkpoint.minutes=1000000",
        *keys,
    ]


def variant(base: Path, overrides: list[str], folder: Path) -> dict:
    """The card of a run, made now or before; ConfigError if that was with other settings."""
    own = [f"run={folder}", f"output={folder / 'draft'}"]
    config = load_config(base, [*overrides, *own])
    if not (folder / "draft" / "card.json").exists():
        run(config, target=load_target(config.target, dtype=config.dtype), resume=True)
    elif changed := changed_keys(config, folder):
        key, (before, now) = next(iter(changed.items()))
        raise ConfigError(f"{folder}: {key} was {before!r}, not {now!r}; name another --where")
    return read_json(folder / "draft" / "card.json")


def row(name: str, card: dict) -> dict:
    """What is compared."""
    found, names = card["acceptance"], ("acceptance_length", "conditional")
    figures = {key: value for key, value in found.items() if key.startswith(names)}
    return {"variant": name, "tokens": card["tokens"], "seconds": card["seconds"], **figures}


def show(rows: list[dict]) -> None:
    """One line a variant."""
    tree = next(key for key in rows[0] if key.startswith("acceptance_length/"))
    table = Table("variant", "tokens", "seconds", f"{tree} [95 %]", "conditional by depth")
    for each in rows:
        low, high = (each[tree.replace("length", f"length_{end}")] for end in ("low", "high"))
        depths = [value for key, value in each.items() if key.startswith("conditional/")]
        table.add_row(
            each["variant"], f"{each['tokens']:,}", f"{each['seconds']}",
            f"{each[tree]:.3f} [{low:.3f}, {high:.3f}]", " ".join(f"{x:.3f}" for x in depths),
        )  # fmt: skip
    Console().print(table)


def main(
    config: Annotated[Path, typer.Option(help="The base.")] = Path(
        "configs/smollm2_eagle_cpu.yaml"
    ),
    tokens: Annotated[int, typer.Option(help="Of each variant.")] = 150_000,
    source: Annotated[str, typer.Option(help="Chats, JSONL.")] = "runs/data/dialogues.jsonl",
    regenerated: Annotated[
        str | None, typer.Option(help="Chats with answers of the target, by train.regenerate ...")
    ] = None,
    original: Annotated[str | None, typer.Option(help="... and the same before it did.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="These variants; repeatable.")] = None,
    where: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/ablations"),
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Trains every variant and compares acceptance."""
    enable_compilation_cache()
    cases = {name: settings(tokens, source, where, keys) for name, keys in VARIANTS.items()}
    for name, (variant_name, factor) in LONGER.items():
        cases[name] = settings(tokens * factor, source, where, VARIANTS[variant_name])
    for name, path in {"regenerated": regenerated, "original": original}.items():
        if path is not None:
            cases[f"{name} answers"] = settings(tokens, path, where / name, [])
    if unknown := set(only or ()) - set(cases):
        raise ConfigError(f"variant {min(unknown)!r}: expected {', '.join(cases)}")
    rows = []
    for name in only or cases:
        folder = where / name.replace(" ", "-").replace("/", "-").replace(",", "")
        rows.append(row(name, variant(config, cases[name], folder)))
        show(rows)
        if out is not None:
            results = {"machine": describe_machine(), "tokens": tokens, "rows": rows}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main, "benchmarks.ablations")
