"""Sources of text -> records: conversations and plain texts, each with the place it came from.

Files are read line by line in sorted order, so the order of records depends on names alone. What
cannot be read raises with file and line; nothing is skipped silently.
"""

import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jax_eagle.config import ConfigError

from .config import Source
from .jsonl import read_lines

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
LINES = ".jsonl"


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation or one text."""

    where: str
    """FILE:LINE, or the file of a whole text."""
    group: str
    """Validation takes groups whole: a chat's first question, a text's name or content."""
    messages: tuple[Mapping[str, str], ...]
    """{"role": ..., "content": ...} of a conversation; empty for plain text."""
    text: str
    """Plain text; empty for a conversation."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The texts in it: one a message."""
        return tuple(m["content"] for m in self.messages) or (self.text,)

    @property
    def size(self) -> int:
        """Characters in it."""
        return sum(map(len, self.parts))

    @property
    def digest(self) -> bytes:
        """16 bytes that name the content."""
        content = [self.text, *((m["role"], m["content"]) for m in self.messages)]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).digest()


def source_files(source: Source) -> list[Path]:
    """The files of a source, sorted; its path may be a file, a folder or a glob.

    Raises:
      ConfigError: there are none.
    """
    matches = [source.path] if os.path.exists(source.path) else glob.glob(source.path)
    files: list[Path] = []
    for match in sorted(map(Path, matches)):
        inside = match.rglob(f"*{LINES}" if source.kind == "chat" else "*")
        files += sorted(path for path in inside if path.is_file()) if match.is_dir() else [match]
    if not files:
        raise ConfigError(f"{source.path}: no such file or folder, or nothing in it")
    return files


def source_hash(source: Source) -> str:
    """A hash of the files' names inside the source and of their content, not of where they are."""
    content = hashlib.sha256()
    for path in source_files(source):
        with _opened(path) as file:
            name = _name_in(Path(source.path), path)
            content.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return content.hexdigest()


def read_source(source: Source) -> Iterator[Record]:
    """The records of a source.

    "chat": JSONL with `messages` [{role, content}], or ShareGPT's `conversations` [{from, value}].
    "text": JSONL with `text` (and `name`: records of one name stay together), or any other file as
    one text; empty ones are passed over.

    Raises:
      ConfigError: "FILE:LINE: what is wrong".
    """
    for path in source_files(source):
        if source.kind == "chat" or path.suffix == LINES:
            for number, line in read_lines(path):
                yield _record(source.kind, line, f"{path}:{number}")
        else:
            text, name = _text_of(path), _name_in(Path(source.path), path)
            if text.strip():
                yield Record(str(path), name, (), text)


def _record(kind: str, record: Mapping[str, Any], where: str) -> Record:
    if kind == "chat":
        messages = _messages(record, where)
        question = next((m for m in messages if m["role"] == "user"), messages[0])["content"]
        return Record(where, question, messages, "")
    text, name = record.get("text"), record.get("name")
    if not isinstance(text, str):
        raise ConfigError(f"{where}: expected a field 'text' that holds a string")
    return Record(where, name if isinstance(name, str) else text, (), text)


def _messages(record: Mapping[str, Any], where: str) -> tuple[Mapping[str, str], ...]:
    """The turns of a conversation in our own form."""
    sharegpt = "messages" not in record and "conversations" in record
    turns = record.get("conversations" if sharegpt else "messages")
    if not isinstance(turns, list) or not turns:
        raise ConfigError(f"{where}: expected a field 'messages' (or 'conversations') with turns")
    names = ("from", "value") if sharegpt else ("role", "content")
    known = SHAREGPT_ROLES if sharegpt else ROLES
    messages = []
    for number, turn in enumerate(turns):
        role, content = (turn.get(n) if isinstance(turn, dict) else None for n in names)
        if not isinstance(role, str) or not isinstance(content, str):
            expected = " and ".join(map(repr, names))
            raise ConfigError(f"{where}: turn {number}: expected strings {expected}")
        if role not in known:
            raise ConfigError(
                f"{where}: turn {number}: unknown role {role!r}, expected {', '.join(known)}"
            )
        messages.append({"role": known[role], "content": content})
    if all(message["role"] != "assistant" for message in messages):
        raise ConfigError(f"{where}: no turn of the assistant: nothing to learn from")
    return tuple(messages)


def _text_of(path: Path) -> str:
    with _opened(path) as file:
        try:
            return file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _name_in(root: Path, path: Path) -> str:
    """A file's name that does not depend on where the folder is."""
    return path.relative_to(root).as_posix() if root.is_dir() else path.name
