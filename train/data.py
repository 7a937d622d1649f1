"""Sources of text -> segments -> packed rows.

A segment is one dialogue or one piece of text. Rows hold several segments, each with positions from
zero and a mask of its own, so a row is exactly its segments side by side. A row has segments of one
source and rows fill in the order in which segments come: when a source grows, most rows stay as
they are, and so do the features kept for them.

Segments are held out for validation by a hash of their group (a question, a source file), so what
is held out never depends on order or size, and no group is on both sides.
"""

import ast
import dataclasses
import hashlib
import random
import sysconfig
import textwrap
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jax_eagle.config import ConfigError
from jax_eagle.tokenizer import Tokenizer

from .config import Source

_OPEN_ROWS = 32
"""Rows that first-fit packing keeps open."""
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
_REQUESTS = (
    "Write a Python function `{name}`. {doc}",
    "Complete the following Python function.\n\n{head}",
    "{head}",
    "Implement this in Python:\n\n```python\n{head}\n```",
    "{doc}\n\nHow would you write that in Python?",
)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One dialogue or piece of text; `answer` is where the target's answer (or the text) is."""

    tokens: np.ndarray
    answer: np.ndarray
    group: str


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows [R, T]; segment 0 is padding."""

    tokens: np.ndarray
    segment: np.ndarray
    position: np.ndarray
    weight: np.ndarray
    """Loss weight; zero for padding and for a segment's first token, which has no feature."""
    source: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int((self.segment > 0).sum())

    def key(self, row: int) -> bytes:
        """16 bytes that name a row's tokens and segments."""
        content = self.tokens[row].tobytes() + self.segment[row].tobytes()
        return hashlib.blake2b(content, digest_size=16).digest()

    def take(self, numbers: np.ndarray) -> "Rows":
        """Some of the rows."""
        return Rows(*(getattr(self, f.name)[numbers] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run trains and validates on."""

    train: Rows
    validation: Rows
    """Scored where the target writes: prompts weigh nothing."""
    counts: np.ndarray
    """Weighted occurrences of each token [V] in the training segments."""


def load_data(
    sources: Sequence[Source],
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    length: int,
    validation_share: float,
) -> Data:
    """Reads all sources and packs them.

    Raises:
      ConfigError: a source that is not there, is empty, or holds tokens of another vocabulary.
    """
    train, validation = [], []
    counts = np.zeros(vocab_size)
    for index, source in enumerate(sources):
        segments = list(_limited(read_source(source, tokenizer), source.max_tokens))
        held_out = [is_held_out(segment.group, validation_share) for segment in segments]
        if not segments or all(held_out):
            raise ConfigError(f"source {index} ({source.kind}, {source.path}): no segments")
        kept = [s for s, out in zip(segments, held_out, strict=True) if not out]
        checked = [s for s, out in zip(segments, held_out, strict=True) if out]
        for segment in segments:
            if segment.tokens.max() >= vocab_size or segment.tokens.min() < 0:
                raise ConfigError(f"source {index}: a token is not in 0..{vocab_size - 1}")
        weights = source.prompt_weight, source.answer_weight
        train.append(pack(kept, length, index, *weights))
        validation.append(pack(checked, length, index, 0.0, 1.0))
        for segment in kept:
            weight = np.where(segment.answer, *reversed(weights))
            counts += np.bincount(segment.tokens, weight, minlength=vocab_size)
    return Data(_concatenated(train), _concatenated(validation), counts)


def draft_vocabulary(counts: np.ndarray, size: int, always: Iterable[int]) -> np.ndarray:
    """Ids of the `size` most frequent tokens and those in `always`, sorted; ties: low ids first."""
    ranked = counts.astype(np.float64)
    ranked[list(always)] = np.inf
    chosen = np.argsort(-ranked, kind="stable")[:size]
    return np.sort(chosen).astype(np.int32)


def is_held_out(group: str, share: float) -> bool:
    """Whether a group belongs to the validation set."""
    return zlib.crc32(group.encode()) % 10_000 < share * 10_000


def pack(
    segments: Iterable[Segment],
    length: int,
    source: int,
    prompt_weight: float,
    answer_weight: float,
) -> Rows:
    """First-fit packing into rows of `length` tokens; longer segments are cut."""
    rows: list[list[Segment]] = []
    open_rows: list[tuple[int, int]] = []  # (row, tokens in it)
    for segment in _pieces(segments, length):
        size = len(segment.tokens)
        fit = next((i for i, (_, used) in enumerate(open_rows) if used + size <= length), None)
        if fit is None:
            rows.append([])
            open_rows.append((len(rows) - 1, 0))
            fit = len(open_rows) - 1
        row, used = open_rows[fit]
        rows[row].append(segment)
        open_rows[fit] = row, used + size
        if len(open_rows) > _OPEN_ROWS:
            open_rows.remove(max(open_rows, key=lambda entry: entry[1]))
    packed = _empty(len(rows), length, source)
    for row, members in enumerate(rows):
        begin = 0
        for number, segment in enumerate(members, start=1):
            here = slice(begin, begin + len(segment.tokens))
            packed.tokens[row, here] = segment.tokens
            packed.segment[row, here] = number
            packed.position[row, here] = np.arange(len(segment.tokens))
            packed.weight[row, here] = np.where(segment.answer, answer_weight, prompt_weight)
            packed.weight[row, begin] = 0.0
            begin = here.stop
    return packed


def read_source(source: Source, tokenizer: Tokenizer | None) -> Iterator[Segment]:
    """The segments of a source.

    dialogues    shards that `train.dialogues` wrote
    stdlib-text  files of Python's standard library (PSF licence) as they are, tests left out
    stdlib-chat  its functions as dialogues: the user asks for one, the answer is its source
    """
    if source.kind == "dialogues":
        yield from _dialogues(Path(source.path or ""))
        return
    if tokenizer is None:
        raise ConfigError(f"source {source.kind}: the target has no tokenizer")
    for name, text in _stdlib_files():
        if source.kind == "stdlib-text":
            tokens = np.asarray(tokenizer.encode(text), np.int32)
            yield Segment(tokens, np.ones(len(tokens), bool), name)
        else:
            yield from _functions_as_chat(name, text, tokenizer)


def _dialogues(folder: Path) -> Iterator[Segment]:
    shards = sorted(p for p in folder.glob("*.npz") if not p.name.endswith(".part.npz"))
    if not shards:
        raise ConfigError(f"{folder}: no dialogue shards (*.npz); `python -m train.dialogues`")
    for path in shards:
        with np.load(path) as shard:
            tokens, answer, ends = shard["tokens"], shard["answer"], shard["lengths"].cumsum()
        for begin, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
            inside = answer[begin:end]
            question = tokens[begin : begin + (inside.argmax() if inside.any() else len(inside))]
            group = hashlib.blake2b(question.tobytes(), digest_size=16).hexdigest()
            yield Segment(tokens[begin:end], inside, group)


def _stdlib_files() -> Iterator[tuple[str, str]]:
    """(relative name, text) in an order that mixes packages, the same everywhere."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name for name in names if not _SKIPPED_FOLDERS & set(name.parts)]
    for name in sorted(names, key=lambda name: zlib.crc32(name.as_posix().encode())):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield name.as_posix(), text


def _functions_as_chat(name: str, text: str, tokenizer: Tokenizer) -> Iterator[Segment]:
    """Dialogues about the documented functions of one file."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
            continue
        code = textwrap.dedent(ast.get_source_segment(text, node, padded=True) or "")
        doc = (ast.get_docstring(node) or "").split("\n\n")[0]
        if not 20 < len(doc) < 400 or not 80 < len(code) < 1500:
            continue
        head = f'def {node.name}({ast.unparse(node.args)}):\n    """{doc}\n    """'
        request = random.Random(f"{name} {node.name}").choice(_REQUESTS)
        question = request.format(name=node.name, doc=" ".join(doc.split()), head=head)
        user = {"role": "user", "content": question}
        reply = {"role": "assistant", "content": f"```python\n{code.strip()}\n```"}
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True)
        tokens = tokenizer.apply_chat_template([user, reply], add_generation_prompt=False)
        answer = np.arange(len(tokens)) >= len(prompt)
        yield Segment(np.asarray(tokens, np.int32), answer, name)


def _limited(segments: Iterable[Segment], max_tokens: int | None) -> Iterator[Segment]:
    total = 0
    for segment in segments:
        if max_tokens is not None and total >= max_tokens:
            return
        total += len(segment.tokens)
        yield segment


def _pieces(segments: Iterable[Segment], length: int) -> Iterator[Segment]:
    """Segments cut to at most `length` tokens; pieces of one token say nothing."""
    for segment in segments:
        for begin in range(0, len(segment.tokens) - 1, length):
            here = slice(begin, begin + length)
            yield Segment(segment.tokens[here], segment.answer[here], segment.group)


def _empty(num_rows: int, length: int, source: int) -> Rows:
    tokens, segment, position = np.zeros((3, num_rows, length), np.int32)
    weight = np.zeros((num_rows, length), np.float32)
    return Rows(tokens, segment, position, weight, np.full((num_rows, length), source, np.int32))


def _concatenated(parts: Sequence[Rows]) -> Rows:
    columns = (f.name for f in dataclasses.fields(Rows))
    return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))
