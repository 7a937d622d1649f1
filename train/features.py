"""The target's features by token number, kept on disk up to a size: optional, for several epochs.

A feature depends on its segment alone, and a token of the corpus has one segment, so its number
names its feature in any row and any batch. Tokens whose numbers lie beyond the capacity are never
kept: their batches stay online.

A token is marked as kept after its feature was written, so a run that is killed claims nothing that
is not there. Runs on the same corpus and target may share a folder, one after the other or at once:
they write the same.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_eagle.checkpoint.files import read_json, write_json
from jax_eagle.config import ConfigError
from jax_eagle.llama import Target

ABOUT, VALUES, KEPT = "features.json", "values.bin", "kept.bool"


class FeatureStore:
    """Features [F] of the first tokens of a corpus."""

    def __init__(
        self,
        folder: Path,
        num_tokens: int,
        width: int,
        *,
        dtype: Any = np.float16,
        max_bytes: int,
        fingerprint: str,
    ):
        """Opens or creates a store.

        Args:
          num_tokens: tokens of the corpus.
          width: F.
          max_bytes: of the features of all tokens together.
          fingerprint: names target and corpus, see `fingerprint`.

        Raises:
          ConfigError: the folder holds features of another target, corpus or form; `max_bytes`
            hold no token; the disk has no room for them.
        """
        self._row_bytes = width * np.dtype(dtype).itemsize
        self.capacity = min(num_tokens, max_bytes // self._row_bytes)
        if not self.capacity:
            raise ConfigError(f"{max_bytes} bytes hold no feature of {self._row_bytes} bytes")
        folder.mkdir(parents=True, exist_ok=True)
        about = {"fingerprint": fingerprint, "width": width, "dtype": np.dtype(dtype).name}
        if (folder / ABOUT).exists() and (found := read_json(folder / ABOUT)) != about:
            names = [name for name in about if found.get(name) != about[name]]
            raise ConfigError(
                f"{folder}: its features are of another {names[0]} ({found.get(names[0])}, here "
                f"{about[names[0]]}): name another folder in data.features, or delete this one"
            )
        self._check_room(folder)
        write_json(folder / ABOUT, about)
        self._file = os.open(folder / VALUES, os.O_RDWR | os.O_CREAT, 0o644)
        size = max(self.capacity * self._row_bytes, os.fstat(self._file).st_size)
        os.ftruncate(self._file, size)
        self._values = np.memmap(folder / VALUES, dtype, "r", shape=(self.capacity, width))
        with (folder / KEPT).open("ab") as file:
            file.write(bytes(max(0, self.capacity - file.tell())))
        self._kept = np.memmap(folder / KEPT, np.bool_, "r+", shape=(self.capacity,))

    def __len__(self) -> int:
        """Tokens whose features are kept."""
        return int(self._kept.sum())

    def read(self, index_BT: np.ndarray) -> np.ndarray | None:
        """The features [B, T, F] of tokens by number, zero where it is -1 (padding).

        None unless all of them are kept.
        """
        token_BT = index_BT >= 0
        numbers = index_BT[token_BT]
        if len(numbers) and (numbers.max() >= self.capacity or not self._kept[numbers].all()):
            return None
        features_BTF = np.zeros((*index_BT.shape, self._values.shape[1]), self._values.dtype)
        features_BTF[token_BT] = self._values[numbers]
        return features_BTF

    def write(self, index_BT: np.ndarray, features_BTF: np.ndarray) -> None:
        """Keeps the features of tokens by number; those of padding and beyond the capacity not.

        Raises:
          OSError: the disk is full; what was kept before stays readable.
        """
        numbers, features = index_BT.reshape(-1), features_BTF.reshape(index_BT.size, -1)
        wanted = (numbers >= 0) & (numbers < self.capacity)
        wanted[wanted] = ~self._kept[numbers[wanted]]
        places = np.flatnonzero(wanted)
        breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(numbers[places]) != 1)) + 1
        for run in np.split(places, breaks) if len(places) else ():
            values = features[run].astype(self._values.dtype).tobytes()
            first = int(numbers[run[0]])
            _write_whole(self._file, values, first * self._row_bytes)
            self._kept[first : first + len(run)] = True

    def close(self) -> None:
        """Closes the files."""
        self._kept.flush()
        os.close(self._file)

    def _check_room(self, folder: Path) -> None:
        values = folder / VALUES
        there = values.stat().st_blocks * 512 if values.exists() else 0
        missing = self.capacity * (self._row_bytes + 1) - there
        free = shutil.disk_usage(folder).free
        if missing > free:
            raise ConfigError(
                f"{folder}: features take {missing / 1e9:.1f} GB more, {free / 1e9:.1f} GB are "
                "free: lower data.keep_features_gb"
            )


def fingerprint(target: Target, corpus: str, taps: tuple[int, ...] = ()) -> str:
    """Names what features depend on: the target's weights, the layers tapped, the corpus."""
    content = hashlib.sha256(repr((target.config, taps, corpus)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(target.params):
        first = np.asarray(leaf[(0,) * max(leaf.ndim - 1, 0)]).reshape(-1)[:64]
        content.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode() + first.tobytes())
    return content.hexdigest()


def _write_whole(file: int, values: bytes, offset: int) -> None:
    left = memoryview(values)
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written
