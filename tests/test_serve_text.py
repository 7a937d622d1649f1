"""The comparison of text over HTTP with `generate`'s, with a tiny model."""

import asyncio
import dataclasses
import json

import httpx2
import pytest

from benchmarks.load_metrics import ServerFigures
from benchmarks.serve_text import Case, Question, Settings, questions_of, report, run_case, servers
from benchmarks.server_process import ServerProcess
from benchmarks.text_client import Answer, Company, ask
from jax_eagle import load_target
from tests.serving import save_tiny_model

pytestmark = pytest.mark.usefixtures("quick_compiler")

TEXTS = ["Who was Ada Lovelace?", "Name three rivers of Asia.", "Why is the sky blue?", "Hi there"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder, max_position=512)
    return Settings(str(folder / "target"), str(folder / "draft"), new_tokens=24, slots=4)


@pytest.fixture(scope="module")
def target(settings):
    return load_target(settings.model, dtype="float32").pack()


@pytest.fixture(scope="module")
def server(settings):
    """Pages are few, so that one server can show every column."""
    speculation = json.dumps({"model": settings.draft, "tree": "static:3"})
    with ServerProcess(
        settings.model, "--speculative-config", speculation, "--max-num-seqs", "4",
        "--batch-buckets", "4", "--block-size", "8", "--num-gpu-blocks-override", "48",
    ) as server:  # fmt: skip
        server.wait_until_ready()
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def cases(target, settings):
    """All cases by name."""
    return {c.name: c for _, cases in servers(target, TEXTS, settings) for c in cases}


def test_cases_are_equal_and_show_what_they_should(server, target, settings, cases):
    names = "alone", "found", "found, follow-ups", "alone, plain", "in company"
    chosen = [cases[name] for name in names]
    long = [*cases["found, follow-ups"].questions] * 3
    chosen.append(dataclasses.replace(cases["preempted"], questions=long))
    rows = [run_case(server.url, target, case, settings) for case in chosen]
    for row in rows:
        assert row["equal"] and row["problems"] == [], row
    assert [row["prompts"] for row in rows] == [4] * 5 + [12]
    assert [row["different"] for row in rows] == [0] * 6


def test_servers_have_what_their_cases_need(target, settings, cases):
    flags = [" ".join(flags) for flags, _ in servers(target, TEXTS, settings)]
    assert ["none" in f for f in flags] == [False, False, True]
    assert ["--num-gpu-blocks-override" in f for f in flags] == [False, True, False]
    assert all(len(q.prompt) > 256 for q in cases["alone, in chunks"].questions)
    for before, after in zip(
        cases["alone"].questions, cases["found, follow-ups"].questions, strict=True
    ):
        told = [*before.prompt, *before.expected]
        assert after.prompt[: len(told)] == told and after.told == len(before.prompt)


def figures(**gained: int) -> ServerFigures:
    counters = {"num_drafts": 0, "num_preemptions": 0} | gained
    names = {"num_drafts": "spec_decode_num_drafts", "num_preemptions": "num_preemptions"}
    return ServerFigures(
        idle=True, generation_tokens=0, acceptance_length=None, acceptance_rate=None,
        acceptance_by_depth=[], leaked_pages=0, compilations=0,
        counters={f"vllm:{names[k]}_total": v for k, v in counters.items()},
    )  # fmt: skip


def test_a_report_names_what_is_wrong(target):
    (question,) = questions_of(target, [target.require_tokenizer().encode(TEXTS[0])], 8)
    case = Case("any", [dataclasses.replace(question, told=16)], some=("drafts", "preemptions"))
    tokens = question.expected
    text = target.require_tokenizer().decode(tokens, skip_special_tokens=True)
    good = Answer(tokens, text, cached_tokens=16)
    clean = report(target, case, [good], 0, figures(num_drafts=3, num_preemptions=1))
    assert clean["equal"] and clean["found"] == 0 and clean["problems"] == []

    found = dataclasses.replace(good, text=text + "!", cached_tokens=24)
    row = report(target, case, [found], 0, figures(num_drafts=3))
    assert row["problems"] == ["1 texts are not those of their tokens", "no preemptions", "1 found"]
    leaking = dataclasses.replace(figures(num_drafts=3, num_preemptions=1), leaked_pages=2)
    assert report(target, case, [good], 0, leaking)["problems"] == ["2 pages leaked"]

    clearly_wrong = [*tokens[:-1], (tokens[-1] + 1) % 256]
    short = [tokens[:-1], [*tokens, 5], clearly_wrong]
    for other in short:
        row = report(target, case, [dataclasses.replace(good, tokens=other)], 0, figures())
        assert not row["equal"] and row["different"] == 1


def test_refused_requests_are_errors(server):
    body = {"prompt": [300], "max_tokens": 1}
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(ask(server.url, [body], Company(0, [], 1, 0), at_once=True))
    assert "the server answers 400" in str(caught.value.exceptions[0])


def test_company_closes_streams_and_leaves_nothing_behind(server, target):
    question = Question(target.require_tokenizer().encode(TEXTS[1]), [])
    company = Company(3, [question.prompt], most_tokens=48, seed=0)
    bodies = [{"prompt": question.prompt, "max_tokens": 24, "return_token_ids": True}] * 6
    answers, counted = asyncio.run(ask(server.url, bodies, company))
    assert len(answers) == 6 and company.closed > 0
    assert counted.idle and counted.leaked_pages == 0
    assert httpx2.get(server.url + "/load").json() == {"server_load": 0}
