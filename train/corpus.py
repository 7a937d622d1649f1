"""The tokens that a run trains and validates on: written once, then mapped into memory.

A corpus is one long line of tokens, cut into segments: a conversation (its first `length` tokens)
or a piece of text of at most `length` tokens. The number of a token in that line names it for ever:
batches carry it, and kept features are found by it.

A token is *learnt* if a draft has to propose it: in an answer all up to its end of turn but the
first, which the target says at the end of prefill; all of a plain text. Every other one is given.

Groups are held out for validation by a hash (a chat's first question, a text's name), so what is
held out depends neither on order nor on size, and no group is on both sides.

A folder holds a whole corpus or none: it is built beside its final name and renamed. It is used
again as long as the sources' content, the tokenizer and the settings are the same, so it may be
copied to another machine.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_eagle.checkpoint.files import read_json
from jax_eagle.config import ConfigError
from jax_eagle.tokenizer import Tokenizer

from .config import DataConfig, Source
from .corpus_build import META, SEGMENTS, TOKENS, inputs_hash, write_corpus

_BLOCK = 1 << 22
"""Tokens that are counted at once."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Segments of all sources; see `build_corpus`."""

    sources: tuple[Source, ...]
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    tokens_N: np.ndarray
    """Int32, mapped from disk."""
    learnt_N: np.ndarray
    """Bool: tokens that a draft has to propose."""
    start_S: np.ndarray
    """First token of each segment, int64; one more entry at the end."""
    source_S: np.ndarray
    """Number of each segment's source, int32."""
    validation_S: np.ndarray
    """Bool: held out from training."""
    validation_questions: list[str]
    """First questions of the held-out chats, each once, in the order of their records."""
    figures: list[dict[str, Any]]
    """Of each source: what it gave and what was left out (`corpus_build.Tally`)."""
    fingerprint: str
    """Hash of tokens, masks and segments."""
    tokenizer_hash: str
    """`Tokenizer.fingerprint`: vocabulary and chat template."""

    @property
    def num_tokens(self) -> int:
        """Tokens of training and validation together."""
        return len(self.tokens_N)

    @property
    def num_training_tokens(self) -> int:
        """Tokens of training segments, prompts included; each counts once."""
        return sum(self.source_training_tokens)

    @functools.cached_property
    def source_training_tokens(self) -> list[int]:
        """Tokens of each source's training segments."""
        train_S = self.length_S * ~self.validation_S
        return [int(train_S[self.source_S == k].sum()) for k in range(len(self.sources))]

    @property
    def num_segments(self) -> int:
        """Segments of training and validation together."""
        return len(self.source_S)

    @functools.cached_property
    def length_S(self) -> np.ndarray:
        """Tokens of each segment."""
        return np.diff(self.start_S)

    def counts(self) -> np.ndarray:
        """Occurrences of each token [V] in training segments, weighted as its source weighs it."""
        weight_K2 = np.array([[s.prompt_weight, s.answer_weight] for s in self.sources])
        counts_V = np.zeros(self.vocab_size)
        first = 0
        while first < self.num_segments:
            limit = self.start_S[first] + _BLOCK
            last = max(first + 1, int(np.searchsorted(self.start_S, limit, "right")) - 1)
            tokens = slice(self.start_S[first], self.start_S[last])
            source_n = np.repeat(self.source_S[first:last], self.length_S[first:last])
            train_n = np.repeat(~self.validation_S[first:last], self.length_S[first:last])
            weight_n = weight_K2[source_n, self.learnt_N[tokens].astype(np.int8)] * train_n
            counts_V += np.bincount(self.tokens_N[tokens], weight_n, minlength=self.vocab_size)
            first = last
        return counts_V

    def draft_vocabulary(self, size: int) -> np.ndarray:
        """Ids of the `size` tokens that training weighs most, stop tokens always among them."""
        return draft_vocabulary(self.counts(), size, self.stop_token_ids)

    def summary(self) -> list[str]:
        """A line for each source, and one for whatever was left out or cut."""
        lines = []
        for source, figures in zip(self.sources, self.figures, strict=True):
            share = figures["learnt_tokens"] / max(figures["tokens"], 1)
            lines.append(
                f"{source.path}: {figures['tokens']:,} tokens in {figures['segments']:,} segments "
                f"of {figures['records']:,} records, {share:.0%} of them to learn from"
            )
            lines += [
                f"{source.path}: {figures[name]:,} of {figures['records']:,} records {what}"
                for name, what in _LEFT_OUT.items()
                if figures[name]
            ]
        return lines


_LEFT_OUT = {
    "duplicates": "left out: the same as an earlier one",
    "overlapping": "left out: they repeat a held-out prompt",
    "control": "hold special tokens as text: left out, of long texts the pieces with one",
    "unanswered": "left out: the answer is empty or begins behind the longest segment",
    "cut": "are longer than a segment and were cut",
}


def build_corpus(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    stop_token_ids: Iterable[int] = (),
    held_out: Iterable[str] = (),
    folder: Path,
) -> Corpus:
    """Tokenises all sources into `folder`, or opens what is there if nothing changed.

    Args:
      vocab_size: V of the target.
      stop_token_ids: tokens that the draft vocabulary always holds.
      held_out: held out besides `config.held_out`: what the run is evaluated on.

    Raises:
      ConfigError: a source that is not there, holds nothing to train on, or cannot be read (with
        file and line); a chat template whose answers cannot be found.
    """
    config = dataclasses.replace(config, held_out=(*config.held_out, *held_out))
    inputs = inputs_hash(config, tokenizer, vocab_size)
    if not (folder / META).exists() or read_json(folder / META)["inputs"] != inputs:
        write_corpus(config, tokenizer, vocab_size, inputs, folder)
    return _opened(config.sources, vocab_size, tuple(stop_token_ids), folder)


def draft_vocabulary(counts_V: np.ndarray, size: int, always: Iterable[int]) -> np.ndarray:
    """Ids of the `size` most frequent tokens and those in `always`, sorted; ties: low ids first.

    Raises:
      ConfigError: `size` is not in 1..V, or less than the tokens in `always`.
    """
    ids = sorted(set(always))
    if not max(1, len(ids)) <= size <= len(counts_V):
        raise ConfigError(f"draft vocabulary of {size}: expected {len(ids)} to {len(counts_V)}")
    ranked_V = counts_V.astype(np.float64)
    ranked_V[ids] = np.inf
    chosen = np.argsort(-ranked_V, kind="stable")[:size]
    return np.sort(chosen).astype(np.int32)


def _opened(
    sources: Sequence[Source], vocab_size: int, stop_token_ids: tuple[int, ...], folder: Path
) -> Corpus:
    meta = read_json(folder / META)
    with np.load(folder / SEGMENTS) as file:
        segments = dict(file)
    return Corpus(
        sources=tuple(sources),
        vocab_size=vocab_size,
        stop_token_ids=stop_token_ids,
        tokens_N=np.memmap(folder / TOKENS["tokens"], np.int32, "r"),
        learnt_N=np.memmap(folder / TOKENS["learnt"], np.bool_, "r"),
        start_S=segments["start"],
        source_S=segments["source"],
        validation_S=segments["validation"],
        validation_questions=meta["questions"],
        figures=meta["sources"],
        fingerprint=meta["fingerprint"],
        tokenizer_hash=meta["tokenizer"],
    )
