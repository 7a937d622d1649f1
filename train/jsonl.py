"""JSON lines: one object a line, read with line numbers, written so that a kill loses little.

A file is either written whole and put in place at once (`write_lines`), or it grows by batches
(`append_batches`). A growing file needs nothing beside it: its lines carry ids, a last line that a
kill cut is dropped at the next start, and what is missing is made. A line must follow from its
item, not from its batch: what is left of a file's items may be grouped anew.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jax_eagle.config import ConfigError

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Done:
    """What one start of `append_batches` added."""

    lines: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        rate = self.tokens / self.seconds
        return f"{self.lines} lines added, {self.tokens} tokens generated, {rate:.0f} tok/s"


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, object) of each line that is not blank.

    Raises:
      ConfigError: no such file, not UTF-8, or a line that is not a JSON object.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file, expected JSON lines")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _object(line, f"{path}:{number}")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> int:
    """Writes a file whole, replacing one that is there; returns the number of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    count = 0
    with partial.open("wb") as file:
        for line in lines:
            file.write(_encoded(line))
            count += 1
    os.replace(partial, path)
    return count


def append_batches(
    path: Path,
    items: Iterable[Item],
    id_of: Callable[[Item], int | str],
    group: Callable[[list[Item]], Sequence[Sequence[Item]]],
    make: Callable[[Sequence[Item]], tuple[Sequence[Mapping[str, Any]], int]],
) -> Done:
    """Appends a line for each item whose line is not there yet, a batch at a time.

    Args:
      id_of: the `id` of an item's line.
      group: the batches in which missing items are made.
      make: (lines of one batch, number of tokens generated).

    Raises:
      ConfigError: the file holds a malformed line other than a cut last one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    present = _ids(path)
    batches = group([item for item in items if id_of(item) not in present])
    num_lines, num_tokens, begin = 0, 0, time.monotonic()
    with path.open("ab") as file, _progress() as progress:
        shown = progress.add_task(path.name, total=sum(map(len, batches)), rate="")
        for batch in batches:
            lines, tokens = make(batch)
            file.write(b"".join(map(_encoded, lines)))
            file.flush()
            os.fsync(file.fileno())
            num_lines, num_tokens = num_lines + len(lines), num_tokens + tokens
            rate = num_tokens / (time.monotonic() - begin)
            progress.update(shown, advance=len(batch), rate=f"{rate:.0f} tok/s")
    return Done(num_lines, num_tokens, time.monotonic() - begin)


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Items in their order, `size` at a time."""
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def _ids(path: Path) -> set[Any]:
    """Ids that a growing file holds. A last line that was not written to its end is cut off."""
    if not path.exists():
        return set()
    ids, whole = set(), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            ended = line.endswith(b"\n")
            try:
                name = _object(line, f"{path}:{number}").get("id")
            except ConfigError:
                # What a kill leaves begins like an object; any other file is not ours to cut.
                if ended or not line.startswith(b"{"):
                    raise
                break
            if not isinstance(name, str | int):
                raise ConfigError(f"{path}:{number}: no 'id' to go on after, choose another --out")
            if ended:
                ids.add(name)
                whole += len(line)
    os.truncate(path, whole)
    return ids


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
        if b"\\u" in line:
            _encoded(value)  # half a surrogate pair is JSON but no text
    except ValueError as error:  # bytes that are not UTF-8 as well
        raise ConfigError(f"{where}: not JSON of text ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected an object, got {type(value).__name__}")
    return value


def _encoded(line: Any) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        # Batches come minutes apart.
        speed_estimate_period=3600,
    )
