"""Segments -> rows of fixed length, each segment whole: best fit in a given order."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Which segments stand in which row, in their order there."""

    segments: np.ndarray
    """Numbers of segments, row after row."""
    start: np.ndarray
    """Where each row begins in `segments`; one more entry at the end."""

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, row: int) -> np.ndarray:  # type: ignore[override]
        return self.segments[self.start[row] : self.start[row + 1]]


def pack(order: Iterable[int], length_S: np.ndarray, capacity: int) -> Rows:
    """Puts each segment into the fullest row that still has room, or opens a row.

    Args:
      order: numbers of segments; the result depends on it, and on nothing else.
      length_S: tokens of every segment, at most `capacity`.
      capacity: tokens of a row.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r: some row has room for r tokens
    for segment in order:
        size = int(length_S[segment])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(segment)
        if room > size:
            with_room[room - size].append(row)
            rooms |= 1 << (room - size)
    sizes = [len(row) for row in rows]
    segments = np.array([segment for row in rows for segment in row], np.int64)
    return Rows(segments, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
