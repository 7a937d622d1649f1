"""Records -> a corpus on disk: what is left out, how it is cut, and the files.

Left out and counted: records that an earlier one equals, those that repeat a held-out prompt, and
conversations whose text holds special tokens. Everything else that is wrong raises.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from rich.console import Console
from rich.progress import Progress

from jax_eagle.checkpoint.files import write_json
from jax_eagle.config import ConfigError
from jax_eagle.prompts import prompts_of
from jax_eagle.tokenizer import Tokenizer

from .chat import ChatRenderer, ControlTokens
from .config import DataConfig
from .overlap import HeldOut
from .sources import Record, read_source, source_files, source_hash

VERSION = 1
META, SEGMENTS = "meta.json", "segments.npz"
TOKENS = {"tokens": "tokens.i32", "answer": "answer.bool"}


@dataclasses.dataclass
class Tally:
    """What a source gave, and what was left out of it."""

    records: int = 0
    segments: int = 0
    tokens: int = 0
    validation_tokens: int = 0
    answer_tokens: int = 0
    duplicates: int = 0
    overlapping: int = 0
    control: int = 0
    """Conversations whose text holds special tokens."""
    unanswered: int = 0
    """Conversations whose first answer begins behind the longest segment."""
    cut: int = 0
    """Conversations that lost their end."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens int32 [T], and bool [T] where the answer (or the text) is."""

    tokens: np.ndarray
    answer: np.ndarray


def is_held_out(group: str, share: float) -> bool:
    """Whether a group belongs to the validation set."""
    return zlib.crc32(group.encode()) % 10_000 < share * 10_000


def inputs_hash(config: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> str:
    """A hash of all that decides what the corpus holds, wherever its files are."""
    content = [
        VERSION,
        tokenizer.fingerprint,
        vocab_size,
        [config.length, config.validation_share, config.overlap_words],
        [[source.kind, source.max_tokens, source_hash(source)] for source in config.sources],
        [prompts_of(name) for name in config.held_out],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def write_corpus(
    config: DataConfig, tokenizer: Tokenizer, vocab_size: int, inputs: str, folder: Path
) -> None:
    """Writes a corpus whole, in place of what is in `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        builder = _Builder(config, tokenizer, vocab_size)
        with (
            (partial / TOKENS["tokens"]).open("wb") as tokens,
            (partial / TOKENS["answer"]).open("wb") as answer,
        ):
            builder.write(tokens, answer)
        segments = builder.segments()
        np.savez(partial / SEGMENTS, allow_pickle=False, **segments)
        for column in segments.values():
            builder.hash.update(column.tobytes())
        about = {
            "inputs": inputs,
            "fingerprint": builder.hash.hexdigest(),
            "tokenizer": tokenizer.fingerprint,
            "sources": [dataclasses.asdict(tally) for tally in builder.tallies],
            "questions": list(builder.questions),
        }
        write_json(partial / META, about)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Builder:
    """Takes records one by one, and remembers what it has seen."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, vocab_size: int):
        self._config, self._tokenizer, self._vocab_size = config, tokenizer, vocab_size
        prompts = [prompt for name in config.held_out for prompt in prompts_of(name)]
        self._held_out = HeldOut(prompts, config.overlap_words)
        has_chats = any(source.kind == "chat" for source in config.sources)
        self._renderer = ChatRenderer(tokenizer) if has_chats else None
        self._seen: set[bytes] = set()
        self._table: list[tuple[int, int, bool, int]] = []
        """Length, source, validation and group of each segment."""
        self.tallies = [Tally() for _ in config.sources]
        self.questions: dict[str, None] = {}
        """First questions of held-out chats, as an ordered set."""
        self.hash = hashlib.sha256()

    def write(self, tokens: IO[bytes], answer: IO[bytes]) -> None:
        """Writes the tokens of all sources; the progress bar compares characters with bytes."""
        sizes = [sum(p.stat().st_size for p in source_files(s)) for s in self._config.sources]
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("tokenising", total=sum(sizes))
            for number, source in enumerate(self._config.sources):
                for record in read_source(source):
                    progress.advance(task, record.size)
                    if not self._add(record, number, tokens, answer):
                        break
                progress.update(task, completed=sum(sizes[: number + 1]))
                tally = self.tallies[number]
                if tally.tokens == tally.validation_tokens:
                    raise ConfigError(
                        f"{source.path}: nothing to train on in {tally.records} records "
                        f"({tally.segments} segments are held out, {tally.unanswered} answers "
                        "begin behind data.length)"
                    )

    def segments(self) -> dict[str, np.ndarray]:
        """The table of segments, by column."""
        length, source, validation, group = zip(*self._table, strict=True)
        return {
            "start": np.concatenate([[0], np.cumsum(length, dtype=np.int64)]),
            "source": np.array(source, np.int32),
            "validation": np.array(validation, bool),
            "group": np.array(group, np.uint64),
        }

    def _add(self, record: Record, number: int, tokens: IO[bytes], answer: IO[bytes]) -> bool:
        """Writes what a record gives; False when the source has given all it may."""
        tally, limit = self.tallies[number], self._config.sources[number].max_tokens
        tally.records += 1
        if self._is_left_out(record, tally):
            return True
        validation = is_held_out(record.group, self._config.validation_share)
        group = hashlib.blake2b(record.group.encode(), digest_size=8).digest()
        for segment in self._segments(record, tally):
            size = len(segment.tokens)
            if limit is not None and tally.tokens + size > limit:
                return False
            for file, column in ((tokens, segment.tokens), (answer, segment.answer)):
                file.write(column.tobytes())
                self.hash.update(column.tobytes())
            self._table.append((size, number, validation, int.from_bytes(group, "little")))
            if validation and record.messages:
                self.questions[record.group] = None
            tally.segments += 1
            tally.tokens += size
            tally.validation_tokens += size * validation
            tally.answer_tokens += int(segment.answer.sum())
        return True

    def _is_left_out(self, record: Record, tally: Tally) -> bool:
        digest = record.digest
        if digest in self._seen:
            tally.duplicates += 1
            return True
        self._seen.add(digest)
        overlapping = self._held_out.repeated_by(record.parts)
        tally.overlapping += overlapping
        return overlapping

    def _segments(self, record: Record, tally: Tally) -> Iterator[Segment]:
        """A conversation's first tokens, or the pieces of a text."""
        if record.messages:
            segment = self._conversation(record, tally)
            if segment is not None:
                yield segment
            return
        tokens = self._checked(self._tokenizer.encode(record.text), record)
        # A piece of one token has nothing to predict from.
        for begin in range(0, len(tokens) - 1, self._config.length):
            piece = tokens[begin : begin + self._config.length]
            yield Segment(piece, np.ones(len(piece), bool))

    def _conversation(self, record: Record, tally: Tally) -> Segment | None:
        assert self._renderer is not None
        try:
            tokens, answer = self._renderer.render(record.messages)
        except ControlTokens:
            tally.control += 1
            return None
        except ConfigError as error:
            raise ConfigError(f"{record.where}: {error}") from None
        tokens = self._checked(tokens, record)
        length = self._config.length
        if not answer[:length].any():
            tally.unanswered += 1
            return None
        tally.cut += len(tokens) > length
        return Segment(tokens[:length], answer[:length])

    def _checked(self, tokens, record: Record) -> np.ndarray:
        tokens = np.asarray(tokens, np.int32)
        if len(tokens) and tokens.max() >= self._vocab_size:
            raise ConfigError(
                f"{record.where}: token {tokens.max()} is not in 0..{self._vocab_size - 1}: "
                "the tokenizer is not the target's"
            )
        return tokens
