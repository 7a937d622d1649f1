"""Logits of the tiny golden models, made by transformers (see make_goldens.py)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jax_eagle import load_target

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("case", ["l3_a", "l3_b"])
def test_logits_equal_those_of_transformers(case):
    target = load_target(GOLDENS / case, dtype="float32")
    with np.load(GOLDENS / case / "expected.npz") as expected:
        ids, expected_BTV = expected["ids"], expected["logits"]
    with jax.default_matmul_precision("highest"):
        logits_BTV = np.asarray(target.logits(ids))
    assert np.abs(logits_BTV - expected_BTV).max() <= 1e-4 + 2e-5 * np.abs(expected_BTV).max()
    np.testing.assert_array_equal(logits_BTV.argmax(-1), expected_BTV.argmax(-1))
