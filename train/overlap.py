"""Whether a text repeats a held-out prompt: a shared run of words.

Words are compared in lower case and without punctuation (13 in a row by default, as in the
contamination checks of language model reports). A prompt of fewer words is repeated by a part (a
turn, a text) that says exactly that and nothing else.
"""

import re
from collections.abc import Iterable, Iterator

_WORD = re.compile(r"\w+")


class HeldOut:
    """The runs of words that nothing trained on may hold."""

    def __init__(self, prompts: Iterable[str], num_words: int):
        self._num_words = num_words
        self._runs = {run for prompt in prompts for run in word_runs(prompt, num_words)}

    def repeated_by(self, parts: Iterable[str]) -> bool:
        """Whether one of the parts repeats a prompt."""
        return bool(self._runs) and any(
            run in self._runs for part in parts for run in word_runs(part, self._num_words)
        )


def word_runs(text: str, num_words: int) -> Iterator[tuple[str, ...]]:
    """Every run of `num_words` words; of a shorter text all its words."""
    words = _WORD.findall(text.lower())
    if words and len(words) < num_words:
        yield tuple(words)
    for begin in range(len(words) - num_words + 1):
        yield tuple(words[begin : begin + num_words])
