"""Does the training data of a run hold benchmark questions? Shared runs of words, counted.

    python -m benchmarks.overlap --run runs/smollm2-eagle

A question counts as seen if NGRAM words of it in a row stand somewhere in the text that the run
trained on (13 words, as in the contamination checks of language model reports).
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from jax_eagle import load_target
from jax_eagle.program import run_program
from train.checkpoint import load_data

from .prompts import SUITES

NGRAM = 13


def ngrams(text: str) -> Iterable[str]:
    """Every run of NGRAM words, in lower case and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))


def main(
    run: Annotated[Path, typer.Option(help="Folder of the run.")],
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
) -> None:
    """Counts benchmark questions that share a run of tokens with the training rows."""
    tokenizer = load_target(model).require_tokenizer()
    rows = (tokenizer.decode(row) for row in load_data(run / "data.npz").train.tokens)
    seen = {gram for text in rows for gram in ngrams(text)}
    for name, questions in SUITES.items():
        asked = questions()
        shared = [i for i, text in enumerate(asked) if any(gram in seen for gram in ngrams(text))]
        print(f"{name}: {len(shared)} of {len(asked)} questions share {NGRAM} words {shared}")


if __name__ == "__main__":
    run_program(main, "benchmarks.overlap")
