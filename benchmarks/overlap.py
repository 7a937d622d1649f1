"""Does the text that a run trains on hold benchmark questions? Shared runs of words, counted.

    python -m benchmarks.overlap --config configs/smollm2_eagle_cpu.yaml

A question counts as seen if `data.overlap_words` of its words in a row stand in a training segment.
What is checked are the tokens of the corpus, decoded, not the records that went into it.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from jax_eagle import load_target
from jax_eagle.program import run_program
from jax_eagle.prompts import SUITES
from train.config import load_config
from train.overlap import word_runs
from train.trainer import corpus_of


def main(
    config: Annotated[Path, typer.Option(help="Configuration of the run.")],
) -> None:
    """Counts benchmark questions that share a run of words with the training segments."""
    settings = load_config(config)
    target = load_target(settings.target)
    tokenizer, words = target.require_tokenizer(), settings.data.overlap_words
    made = corpus_of(settings, target)
    asked = {
        (name, number): set(word_runs(text, words))
        for name, suite in SUITES.items()
        for number, text in enumerate(suite())
    }
    runs, seen = set().union(*asked.values()), set()
    for segment in np.flatnonzero(~made.validation_S):
        tokens = made.tokens_N[made.start_S[segment] : made.start_S[segment + 1]]
        seen |= runs & set(word_runs(tokenizer.decode(tokens.tolist()), words))
    for name in SUITES:
        questions = [number for suite, number in asked if suite == name]
        shared = [number for number in questions if asked[name, number] & seen]
        print(f"{name}: {len(shared)} of {len(questions)} questions share {words} words {shared}")


if __name__ == "__main__":
    run_program(main, "benchmarks.overlap")
