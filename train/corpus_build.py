"""Records -> a corpus on disk: what is left out, how it is cut, and the files.

Left out and counted: records that an earlier one equals, those that repeat a held-out prompt, and
what holds special tokens as text: a conversation whole, of a long text the piece. Everything else
that is wrong raises.

Every piece of a text begins as the tokenizer begins texts: where it puts a token in front, the
target's attention and features rest on it.
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

VERSION = 2
"""Another one for other tokens or masks, and for other batches made of them."""
META, SEGMENTS = "meta.json", "segments.npz"
TOKENS = {"tokens": "tokens.i32", "learnt": "learnt.bool"}
_MIN_PIECE = 3
"""Tokens of a piece of text: the first has no feature before it, the last no token behind it."""


@dataclasses.dataclass
class Tally:
    """What a source gave, and what was left out of it."""

    records: int = 0
    segments: int = 0
    tokens: int = 0
    validation_tokens: int = 0
    learnt_tokens: int = 0
    duplicates: int = 0
    overlapping: int = 0
    control: int = 0
    """Records that hold special tokens as text."""
    unanswered: int = 0
    """Conversations without a token to learn: the answers begin too late, or are empty."""
    cut: int = 0
    """Conversations that lost their end."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens int32 [T], and which of them are learnt, bool [T]."""

    tokens: np.ndarray
    learnt: np.ndarray


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
        sorted({prompt for name in config.held_out for prompt in prompts_of(name)}),
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
            (partial / TOKENS["learnt"]).open("wb") as learnt,
        ):
            builder.write(tokens, learnt)
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
        self._begin = _begin_of_text(tokenizer)
        self._table: list[tuple[int, int, bool]] = []
        """Length, source and validation of each segment."""
        self.tallies = [Tally() for _ in config.sources]
        self.questions: dict[str, None] = {}
        """First questions of held-out chats, as an ordered set."""
        self.hash = hashlib.sha256(str(VERSION).encode())

    def write(self, tokens: IO[bytes], learnt: IO[bytes]) -> None:
        """Writes the tokens of all sources; the progress bar compares characters with bytes."""
        sizes = [sum(p.stat().st_size for p in source_files(s)) for s in self._config.sources]
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("tokenising", total=sum(sizes))
            for number, source in enumerate(self._config.sources):
                for record in read_source(source):
                    progress.advance(task, record.size)
                    if not self._add(record, number, tokens, learnt):
                        break
                progress.update(task, completed=sum(sizes[: number + 1]))
                tally = self.tallies[number]
                if tally.tokens == tally.validation_tokens:
                    raise ConfigError(
                        f"{source.path}: nothing to train on in {tally.records} records "
                        f"({tally.segments} segments are held out, {tally.unanswered} answers "
                        "are empty or begin behind data.length)"
                    )

    def segments(self) -> dict[str, np.ndarray]:
        """The table of segments, by column."""
        length, source, validation = zip(*self._table, strict=True)
        return {
            "start": np.concatenate([[0], np.cumsum(length, dtype=np.int64)]),
            "source": np.array(source, np.int32),
            "validation": np.array(validation, bool),
        }

    def _add(self, record: Record, number: int, tokens: IO[bytes], learnt: IO[bytes]) -> bool:
        """Writes what a record gives; False when the source has given all it may."""
        tally, limit = self.tallies[number], self._config.sources[number].max_tokens
        tally.records += 1
        if self._is_left_out(record, tally):
            return True
        validation = is_held_out(record.group, self._config.validation_share)
        for segment in self._segments(record, tally):
            size = len(segment.tokens)
            if limit is not None and tally.tokens + size > limit:
                return False
            for file, column in ((tokens, segment.tokens), (learnt, segment.learnt)):
                file.write(column.tobytes())
                self.hash.update(column.tobytes())
            self._table.append((size, number, validation))
            if validation and record.messages:
                self.questions[record.group] = None
            tally.segments += 1
            tally.tokens += size
            tally.validation_tokens += size * validation
            tally.learnt_tokens += int(segment.learnt.sum())
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
        if not record.messages:
            yield from self._pieces(record, tally)
        elif (segment := self._conversation(record, tally)) is not None:
            yield segment

    def _pieces(self, record: Record, tally: Tally) -> Iterator[Segment]:
        """A text in pieces of at most `length` tokens, without those that hold special ones."""
        tokens = self._checked(self._tokenizer.encode(record.text, special=False), record)
        is_special = np.isin(tokens, self._tokenizer.special_ids)
        tally.control += bool(is_special.any())
        size = self._config.length - len(self._begin)
        for first in range(0, len(tokens), size):
            here = slice(first, first + size)
            piece = np.concatenate([self._begin, tokens[here]])
            if len(piece) >= _MIN_PIECE and not is_special[here].any():
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
        # The first token of an answer comes from prefill: no draft proposes it.
        learnt = answer & np.append(False, answer[:-1])
        length = self._config.length
        if not learnt[:length].any():
            tally.unanswered += 1
            return None
        tally.cut += len(tokens) > length
        return Segment(tokens[:length], learnt[:length])

    def _checked(self, tokens, record: Record) -> np.ndarray:
        tokens = np.asarray(tokens, np.int32)
        if len(tokens) and tokens.max() >= self._vocab_size:
            raise ConfigError(
                f"{record.where}: token {tokens.max()} is not in 0..{self._vocab_size - 1}: "
                "the tokenizer is not the target's"
            )
        return tokens


def _begin_of_text(tokenizer: Tokenizer) -> np.ndarray:
    """What the tokenizer puts in front of a text: int32, one token or none."""
    begin = tokenizer.encode("")[:1]
    return np.array(begin if begin == [tokenizer.bos_token_id] else [], np.int32)
