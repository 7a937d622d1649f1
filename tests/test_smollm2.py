"""SmolLM2 as a user gets it: fetched by name, compared with golden greedy text."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.equal_text import Margins, compare
from jax_eagle import generate, load_draft, load_target

GOLDENS = Path(__file__).parent / "goldens" / "smollm2_greedy.npz"


@pytest.fixture(scope="module")
def target():
    return load_target("smollm2-135m-instruct", dtype="float32")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS) as data:
        return {name: data[name] for name in data.files}


def rows(ids: np.ndarray) -> list[list[int]]:
    return [row[row >= 0].tolist() for row in ids]


@pytest.mark.parametrize("tree", [None, "static:8"])
def test_greedy_text_equals_the_goldens(target, golden, tree):
    """All 24 prompts plainly, 12 of them with the draft."""
    count = 24 if tree is None else 12
    draft = None if tree is None else load_draft("smollm2-135m-instruct-eagle", target)
    prompts, expected = rows(golden["prompt_ids"])[:count], rows(golden["new_ids"])[:count]
    actual: list[list[int]] = []
    for begin in range(0, count, 8):
        result = generate(
            target, draft, prompts[begin : begin + 8], max_new_tokens=64, tree=tree or "auto"
        )
        actual += result.tokens
    report = compare(
        target, prompts, expected, actual,
        margins=lambda i: Margins(golden["margin"][i], golden["max_abs_logit"][i]),
    )  # fmt: skip
    assert report.equal, str(report)
