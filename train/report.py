"""The card of a trained draft: card.json and README.md beside its weights."""

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

from jax_eagle.checkpoint.files import write_json

from .config import TrainConfig
from .feed import Feed
from .step import TrainState

_NOT_SETTINGS = ("target", "sources", "output", "run", "features", "start", "card")


def write_card(
    config: TrainConfig,
    feed: Feed,
    state: TrainState,
    seconds: float,
    figures: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Writes the card into the output folder and returns its figures."""
    steps = int(state.step)
    source = feed.rows.source[feed.rows.segment > 0]
    card = {
        "target": config.target,
        "sources": [
            {"kind": each.kind, "tokens": int((source == i).sum())}
            for i, each in enumerate(config.sources)
        ],
        "distinct_tokens": feed.rows.num_tokens,
        "steps": steps,
        "token_visits": steps * config.batch * config.length,
        "seconds": round(seconds),
        "validation": figures,
        "settings": {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if field.name not in _NOT_SETTINGS
        },
    }
    folder = Path(config.output)
    write_json(folder / "card.json", card)
    (folder / "README.md").write_text(_text(card, config.card), encoding="utf-8")
    return card


def _text(card: dict[str, Any], notes: str) -> str:
    sources = ", ".join(f"{s['kind']} ({s['tokens']:,} tokens)" for s in card["sources"])
    lines = [
        f"# EAGLE draft for {card['target']}",
        "",
        f"- Data: {sources}; {card['distinct_tokens']:,} distinct tokens in all.",
        f"- Training: {card['steps']:,} steps, {card['token_visits']:,} token visits, "
        f"{card['seconds'] / 60:.0f} minutes.",
        "",
        "Validation on held-out text, teacher-forced. top-1: the draft's favourite is the target's",
        "(whole vocabulary). KL: over the draft vocabulary.",
        "",
        "| source | tokens | top-1 | KL |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {values['tokens']:,} | {values['top1']:.3f} | {values['kl']:.3f} |"
        for name, values in card["validation"].items()
    ]
    lines += ["", *textwrap.wrap(notes, 100)] if notes else []
    return "\n".join(lines) + "\n"
