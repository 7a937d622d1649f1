"""SmolLM2 as a user gets it: fetched by name, compared with golden greedy text."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.equal_text import Margins, compare
from jax_eagle import Draft, GenerateResult, Target, generate, load_draft, load_target
from jax_eagle.prompts import as_chat, mt_bench

DYNAMIC = "dynamic:depth=3,width=3,nodes=8"
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


def check(
    target: Target,
    golden,
    draft: Draft | None = None,
    *,
    begin: int = 0,
    count: int = 8,
    limit: int = 32,
    **options,
) -> GenerateResult:
    """*Equal text* with transformers': `count` of the prompts, at most `limit` tokens of each."""
    prompts, expected, margin, largest = (
        golden[name][begin : begin + count]
        for name in ("prompt_ids", "new_ids", "margin", "max_abs_logit")
    )
    result = generate(target, draft, rows(prompts), max_new_tokens=limit, **options)
    report = compare(
        target, rows(prompts), rows(expected[:, :limit]), result.tokens,
        margins=lambda i: Margins(margin[i], largest[i]),
    )  # fmt: skip
    assert report.equal, str(report)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("begin", [0, 8, 16])
def test_greedy_text_equals_the_goldens(target, golden, begin):
    check(target, golden, begin=begin, limit=64)


@pytest.mark.slow
@pytest.mark.parametrize("tree", ["chain:3", "static:eagle-26", DYNAMIC])
def test_speculation_gives_the_text_of_the_goldens(target, golden, tree):
    """Two of the eight texts end before the limit.

    `python -m benchmarks.lossless` compares more and longer texts, also one by one.
    """
    draft = load_draft("smollm2-135m-instruct-eagle", target)
    assert check(target, golden, draft, tree=tree).acceptance_length > 1.3


def test_texts_one_by_one_are_the_goldens(target, golden):
    """As programs run them on a CPU: with packed weights. Two of the four end before the limit."""
    draft = load_draft("smollm2-135m-instruct-eagle", target).pack()
    target = target.pack()
    results = [check(target, golden, draft, begin=i, count=1, tree=DYNAMIC) for i in range(4)]
    assert min(result.acceptance_length for result in results) > 1.3


def test_questions_of_mt_bench():
    texts = mt_bench()
    assert len(texts) == 80 and texts[0].startswith("Compose an engaging travel blog post")
