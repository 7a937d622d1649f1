"""The target's features of packed rows, kept on disk in float16.

Rows are named by their content (`Rows.key`), so a run that is started again with more data finds
what it knows already. A row's key is appended after its features: a torn write is never read.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from jax_eagle import Target
from jax_eagle.checkpoint.files import read_json, write_json
from jax_eagle.config import ConfigError

KEY_BYTES = 16


class FeatureStore:
    """Features [T, F] of rows by key."""

    def __init__(self, folder: Path, target: Target, *, length: int, width: int):
        """Opens or creates a store.

        Raises:
          ConfigError: the folder holds features of another target or of other rows.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.shape = (length, width)
        self._row_bytes = 2 * length * width
        about = {"length": length, "width": width, "target": fingerprint(target)}
        if (folder / "features.json").exists():
            found = read_json(folder / "features.json")
            if found != about:
                raise ConfigError(f"{folder}: holds features of {found}, expected {about}")
        write_json(folder / "features.json", about)
        self._values = os.open(folder / "values.f16", os.O_RDWR | os.O_CREAT, 0o644)
        self._keys = os.open(folder / "keys.bin", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        stored = os.pread(self._keys, os.fstat(self._keys).st_size, 0)
        whole = len(stored) // KEY_BYTES * KEY_BYTES
        os.ftruncate(self._keys, whole)
        self._slots = {
            stored[i : i + KEY_BYTES]: i // KEY_BYTES for i in range(0, whole, KEY_BYTES)
        }
        self._next_slot = whole // KEY_BYTES

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def read(self, key: bytes) -> np.ndarray:
        """The features of a row, float16 [T, F]."""
        data = os.pread(self._values, self._row_bytes, self._slots[key] * self._row_bytes)
        return np.frombuffer(data, np.float16).reshape(self.shape)

    def write(self, key: bytes, features: np.ndarray) -> None:
        """Keeps the features of a row."""
        if key in self._slots:
            return
        data = np.ascontiguousarray(features, np.float16).tobytes()
        os.pwrite(self._values, data, self._next_slot * self._row_bytes)
        os.write(self._keys, key)
        self._slots[key] = self._next_slot
        self._next_slot += 1

    def close(self) -> None:
        """Closes the files."""
        os.close(self._values)
        os.close(self._keys)


def fingerprint(target: Target) -> str:
    """Tells targets apart: a hash of the config and of the final norm's weights."""
    scale = np.asarray(target.params["norm"]["scale"], np.float32)
    content = repr(target.config).encode() + scale.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
