"""A batch as text: what is trained on in colour, the rest dim, a rule between segments."""

import numpy as np
from rich.console import Console
from rich.text import Text

from jax_eagle.tokenizer import Tokenizer

from .feed import Batch

TRAINED, GIVEN = "bold green", "dim"


def show_batch(batch: Batch, tokenizer: Tokenizer, console: Console, rows: int = 2) -> None:
    """Prints the first `rows` rows of a batch, and the shares of all of them."""
    for row in range(min(rows, len(batch["tokens"]))):
        segments = batch["segment"][row]
        for number in range(1, int(segments.max()) + 1):
            here = segments == number
            source = batch["source"][row][here][0]
            console.rule(f"row {row}, segment {number}, source {source}: {here.sum()} tokens")
            tokens, weight = batch["tokens"][row][here], batch["weight"][row][here]
            console.print(_coloured(tokens, weight, tokenizer), soft_wrap=True)
    _legend(batch, console)


def _coloured(tokens: np.ndarray, weight: np.ndarray, tokenizer: Tokenizer) -> Text:
    """Runs of tokens of equal weight; a letter cut by a border between them shows as its mark."""
    text = Text()
    borders = np.flatnonzero(np.diff(weight)) + 1
    for run, weights in zip(np.split(tokens, borders), np.split(weight, borders), strict=True):
        text.append(tokenizer.decode(run.tolist()), TRAINED if weights[0] > 0 else GIVEN)
    return text


def _legend(batch: Batch, console: Console) -> None:
    weight, real = batch["weight"], batch["segment"] > 0
    console.rule()
    legend = Text()
    trained = (weight > 0).sum() / max(real.sum(), 1)
    legend.append("trained on", TRAINED)
    legend.append(f" {trained:.1%} of tokens, ")
    legend.append("given", GIVEN)
    legend.append(f" {1 - trained:.1%}; padding {1 - real.mean():.1%} of places")
    console.print(legend)
    for source in np.unique(batch["source"][real]):
        here = real & (batch["source"] == source)
        console.print(
            f"source {source}: {here.sum() / real.sum():.1%} of tokens, mean weight "
            f"{weight[here].mean():.2f}"
        )
