"""SmolLM2 as a user gets it: fetched by name, compared with golden greedy text."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.equal_text import Margins, compare
from jax_eagle import generate, load_draft, load_target
from jax_eagle.prompts import as_chat, mt_bench

GOLDENS = Path(__file__).parent / "goldens" / "smollm2_greedy.npz"


@pytest.fixture(scope="module")
def target():
    return load_target("smollm2-135m-instruct", dtype="float32")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS) as data:
        return {name: data[name] for name in data.files}


def test_chat_prompts_are_those_of_transformers(target, golden):
    """Tokenizer and template out of the GGUF file, on text with digits, accents and code."""
    cases = json.loads((GOLDENS.parent / "smollm2_prompts.json").read_text("utf-8"))["prompts"]
    made = as_chat(target, [case["message"] for case in cases])
    assert made == rows(golden["prompt_ids"])
    assert [target.require_tokenizer().decode(ids) for ids in made] == [c["prompt"] for c in cases]


def rows(ids: np.ndarray) -> list[list[int]]:
    return [row[row >= 0].tolist() for row in ids]


def test_greedy_text_equals_the_goldens(target, golden):
    prompts, expected = rows(golden["prompt_ids"]), rows(golden["new_ids"])
    actual: list[list[int]] = []
    for begin in range(0, len(prompts), 8):
        actual += generate(target, None, prompts[begin : begin + 8], max_new_tokens=64).tokens
    report = compare(
        target, prompts, expected, actual,
        margins=lambda i: Margins(golden["margin"][i], golden["max_abs_logit"][i]),
    )  # fmt: skip
    assert report.equal, str(report)


NUM_QUESTIONS, NEW_TOKENS = 12, 24


@pytest.fixture(scope="module")
def questions(target):
    """Twelve of MT-Bench's first questions, over all of its categories."""
    texts = mt_bench()
    return as_chat(target, texts[:: len(texts) // NUM_QUESTIONS][:NUM_QUESTIONS])


@pytest.fixture(scope="module")
def plain(target, questions):
    return generate(target, None, questions, max_new_tokens=NEW_TOKENS).tokens


@pytest.mark.parametrize("tree", [
    "chain:3",
    pytest.param("static:eagle-26", marks=pytest.mark.slow),
    "dynamic:depth=3,width=3,nodes=8",
])  # fmt: skip
def test_speculation_does_not_change_the_text(target, questions, plain, tree):
    """`python -m benchmarks.lossless` does this with all questions, longer, and in batches of 1."""
    draft = load_draft("smollm2-135m-instruct-eagle", target)
    result = generate(target, draft, questions, max_new_tokens=NEW_TOKENS, tree=tree)
    report = compare(target, questions, plain, result.tokens)
    assert report.equal, str(report)
    assert result.acceptance_length > 1.3


def test_packed_weights_do_not_change_the_text(target, questions, plain):
    """One question at a time, as programs run it on a CPU."""
    draft = load_draft("smollm2-135m-instruct-eagle", target).pack()
    result = generate(target.pack(), draft, questions[:1], max_new_tokens=NEW_TOKENS)
    report = compare(target, questions[:1], plain[:1], result.tokens)
    assert report.equal, str(report)
