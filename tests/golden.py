"""The golden models of make_goldens.py: targets, what transformers computed, and the gate."""

import functools
from pathlib import Path

import numpy as np

from jax_eagle import Target, load_target
from jax_eagle.checkpoint.hf import read_config

GOLDENS = Path(__file__).parent / "goldens"
_WEIGHTS = {"l4_s2": "l4_s"}
"""Whose weights a folder without any has."""


@functools.cache
def golden(case: str) -> tuple[Target, dict[str, np.ndarray]]:
    """A float32 target and the arrays of its expected.npz."""
    target = load_target(GOLDENS / _WEIGHTS.get(case, case), dtype="float32")
    with np.load(GOLDENS / case / "expected.npz") as file:
        expected = dict(file)
    return target.replace(config=read_config(GOLDENS / case, dtype="float32")), expected


def bound(expected: np.ndarray) -> float:
    """How far logits may be from the expected ones."""
    return float(1e-4 + 2e-5 * np.abs(expected).max())


def check(logits, expected: np.ndarray) -> None:
    """The gate of every parity test."""
    logits = np.asarray(logits)
    assert np.abs(logits - expected).max() <= bound(expected)
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
