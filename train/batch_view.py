"""A batch as text: what is learnt in colour, the rest dim, a rule between segments.

A token is shown by the weight of the row before it, the one that predicts it. Tokens of a source's
full weight and those of less (prompts, if they weigh anything) have colours of their own.
"""

import numpy as np
from rich.console import Console
from rich.text import Text

from jax_eagle.tokenizer import Tokenizer

from .feed import Batch

GIVEN, LESS, FULL = range(3)
"""How much a token is learnt."""
STYLES = ("dim", "yellow", "bold green")
NAMES = ("given", "learnt at less weight", "learnt")


def show_batch(batch: Batch, tokenizer: Tokenizer, console: Console, rows: int = 2) -> None:
    """Prints the first `rows` rows of a batch, and the shares of all of them."""
    levels_BT = learnt_levels(batch)
    for row in range(min(rows, len(levels_BT))):
        segments = batch["segment"][row]
        for number in range(1, int(segments.max()) + 1):
            here = segments == number
            source = batch["source"][row][here][0]
            console.rule(f"row {row}, segment {number}, source {source}: {here.sum()} tokens")
            tokens, levels = batch["tokens"][row][here], levels_BT[row][here]
            console.print(_coloured(tokens, levels, tokenizer), soft_wrap=True)
    _legend(batch, levels_BT, console)


def learnt_levels(batch: Batch) -> np.ndarray:
    """GIVEN, LESS or FULL for each token [B, T]; FULL is the largest weight of its source here."""
    # A segment's last row weighs nothing, so nothing crosses into the next one.
    weight_BT = np.pad(batch["weight"][:, :-1], ((0, 0), (1, 0)))
    levels_BT = np.full(weight_BT.shape, GIVEN)
    for source in np.unique(batch["source"]):
        here_BT = (batch["source"] == source) & (weight_BT > 0)
        largest = weight_BT.max(where=here_BT, initial=0.0)
        levels_BT[here_BT] = np.where(weight_BT[here_BT] == largest, FULL, LESS)
    return levels_BT


def _coloured(tokens: np.ndarray, levels: np.ndarray, tokenizer: Tokenizer) -> Text:
    """Runs of tokens of one level; a letter cut by a border between them shows as its mark."""
    text = Text()
    borders = np.flatnonzero(np.diff(levels)) + 1
    for run, level in zip(np.split(tokens, borders), np.split(levels, borders), strict=True):
        text.append(tokenizer.decode(run.tolist()), STYLES[level[0]])
    return text


def _legend(batch: Batch, levels_BT: np.ndarray, console: Console) -> None:
    real_BT = batch["segment"] > 0
    console.rule()
    legend = Text()
    for level in (FULL, LESS, GIVEN):
        legend.append(NAMES[level], STYLES[level])
        share = (levels_BT[real_BT] == level).sum() / max(real_BT.sum(), 1)
        legend.append(f" {share:.1%} of tokens, ")
    legend.append(f"padding {1 - real_BT.mean():.1%} of places")
    console.print(legend)
    for source in np.unique(batch["source"][real_BT]):
        here_BT = real_BT & (batch["source"] == source)
        console.print(
            f"source {source}: {here_BT.sum() / real_BT.sum():.1%} of tokens, mean weight "
            f"{batch['weight'][here_BT].mean():.2f}"
        )
