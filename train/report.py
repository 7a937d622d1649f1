"""The card of a trained draft: card.json and README.md beside its weights."""

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_eagle.acceptance import CONVENTION
from jax_eagle.checkpoint.files import write_json
from jax_eagle.config import DraftConfig

from .config import TrainConfig, to_tree
from .evaluate import Evaluation

_NOT_SETTINGS = ("target", "run", "output", "card")


@dataclasses.dataclass(frozen=True)
class Effort:
    """What went into a draft."""

    steps: int
    tokens: int
    """Trained on, padding not counted; those of later epochs count again."""
    seconds: float
    distinct_tokens: int
    source_tokens: Sequence[int]
    """Of each source of the config, in order."""


def write_card(
    config: TrainConfig, draft: DraftConfig, effort: Effort, evaluation: Evaluation
) -> dict[str, Any]:
    """Writes the card into the output folder and returns what card.json holds."""
    sources = zip(config.data.sources, effort.source_tokens, strict=True)
    card = {
        "target": config.target,
        "draft": {
            "kind": config.draft.kind,
            "layers": draft.layer.num_layers,
            "vocabulary": draft.draft_vocab_size or draft.layer.vocab_size,
        },
        "sources": [{"kind": source.kind, "tokens": int(count)} for source, count in sources],
        "distinct_tokens": effort.distinct_tokens,
        "steps": effort.steps,
        "tokens": effort.tokens,
        "seconds": round(effort.seconds),
        "acceptance": {"convention": CONVENTION, **evaluation.figures},
        "settings": _settings(config),
    }
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "card.json", card)
    text = [*_head_lines(card), "", *_acceptance_lines(evaluation)]
    text += ["", *textwrap.wrap(config.card, 100)] if config.card else []
    (folder / "README.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    return card


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The config without the paths of the machine that it ran on."""
    tree = {key: value for key, value in to_tree(config).items() if key not in _NOT_SETTINGS}
    for key in "sources", "features", "held_out":
        del tree["data"][key]
    tree["draft"]["start"] = Path(config.draft.start).name
    tree["evaluation"]["prompts"] = [Path(name).name for name in config.evaluation.prompts]
    return tree


def _head_lines(card: dict[str, Any]) -> list[str]:
    draft = card["draft"]
    sources = ", ".join(f"{s['kind']} ({s['tokens']:,} tokens)" for s in card["sources"])
    layers = f"{draft['layers']} layer{'s' if draft['layers'] > 1 else ''}"
    return [
        f"# Draft for {card['target']}",
        "",
        f"- Kind: {draft['kind']}, {layers}, proposes from {draft['vocabulary']:,} tokens.",
        f"- Data: {sources}; {card['distinct_tokens']:,} distinct tokens in all.",
        f"- Training: {card['steps']:,} steps, {card['tokens']:,} tokens, "
        f"{card['seconds'] / 60:.0f} minutes.",
    ]


def _acceptance_lines(evaluation: Evaluation) -> list[str]:
    figures = evaluation.figures

    def interval(name: str, key: str) -> str:
        value, low, high = (figures[f"{name}{end}/{key}"] for end in ("", "_low", "_high"))
        return f"{value:.3f} ({low:.3f} to {high:.3f})"

    lines = [
        f"Acceptance ({CONVENTION}):",
        "",
        "| tree, prompts | acceptance length |",
        "|---|---|",
    ]
    for name in figures:
        kind, _, key = name.partition("/")
        if kind == "acceptance_length":
            tree, _, suite = key.partition("/")
            lines.append(f"| {tree}, {suite or 'all'} | {interval(kind, key)} |")
    lines += [
        "",
        f"Chains of drafted tokens under every token of the target's own answers "
        f"({figures['chains']:,.0f} chains):",
        "",
        "| depth | conditional acceptance | joint acceptance | acceptance length of chain |",
        "|---|---|---|---|",
    ]
    for depth in (name.partition("/")[2] for name in figures if name.startswith("joint/")):
        row = [interval(kind, depth) for kind in ("conditional", "joint", "chain_length")]
        lines.append(f"| {depth.removeprefix('depth')} | {' | '.join(row)} |")
    return lines
