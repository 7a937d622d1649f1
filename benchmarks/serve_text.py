"""Is text over HTTP the text of `generate`? Greedy, float32, whatever else the server is doing.

    python -m benchmarks.serve_text

The reference is plain decoding in this process, all prompts in one batch. Servers run in processes
of their own, one after the other: one that speculates, one with so few pages that sequences lose
theirs and start anew, one without a draft. Answers are streamed and compared token by token under
the rule of `benchmarks.equal_text`; the text of a stream must be that of its tokens.

A case also has to show that what it is about did happen (pages found in the prefix cache,
preemptions, streams that others closed) or did not (each prompt has a cache salt of its own, so
that nothing is found unless a case wants it). Exit code 1: some text differs, or a case does not
show what it should, or a server leaks pages, compiles in traffic or is not idle at the end.
"""

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jax_eagle import Target, generate, load_target
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program
from jax_eagle.prompts import as_chat, mt_bench
from serve.device import EngineConfig

from .equal_text import compare, summarise
from .load_metrics import ServerFigures
from .server_process import ServerProcess
from .text_client import Answer, Company, ask

_TREES = [[2, "static:3"], [None, "chain:1"]]  # a server on a CPU does not speculate in company
_PAGE_SIZE = 16  # so small that every answer crosses a border
_SMALL_PAGE = 8  # sequences that have to grow by several pages run out of them
_READY_SECONDS = 1200


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared."""

    model: str
    draft: str
    new_tokens: int = 32
    slots: int = 16
    """Sequences that a server decodes together: in company one is compared, all others are not."""
    seed: int = 0
    """Of what the others ask for."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and its answer, as token ids."""

    prompt: list[int]
    expected: list[int]
    told: int = 0
    """Length of the dialogue's earlier prompt: pages count as found if they reach behind it, into
    the answer that the server has written."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to ask the questions."""

    name: str
    questions: Sequence[Question]
    way: Literal["alone", "in company", "at once"] = "alone"
    some: tuple[str, ...] = ()
    """Columns that must not be 0 ..."""
    none: tuple[str, ...] = ("found",)
    """... and that must be."""
    salt: str | None = None
    """The case whose pages may be found; None: only its own."""
    speculation: bool = True


# ---- the cases ---------------------------------------------------------------------------------


def questions_of(target: Target, prompts: Sequence[list[int]], new_tokens: int) -> list[Question]:
    """The prompts with the answers of plain decoding."""
    answers = generate(target, None, prompts, max_new_tokens=new_tokens).tokens
    return [Question(*pair) for pair in zip(prompts, answers, strict=True)]


def follow_ups(target: Target, first: Sequence[Question], new_tokens: int) -> list[Question]:
    """Each dialogue goes on: prompt, answer, and the prompt of the next one."""
    pairs = zip(first, [*first[1:], first[0]], strict=True)
    prompts = [[*q.prompt, *q.expected, *following.prompt] for q, following in pairs]
    return [
        dataclasses.replace(question, told=len(q.prompt))
        for q, question in zip(first, questions_of(target, prompts, new_tokens), strict=True)
    ]


def long_prompts(target: Target, texts: Sequence[str], count: int) -> list[list[int]]:
    """Texts put together until one chunk of prefill cannot hold them."""
    more, prompts = itertools.cycle(texts), []
    for _ in range(count):
        text, ids = "", []
        while len(ids) <= EngineConfig.tokens_per_step:
            text += next(more) + "\n"
            (ids,) = as_chat(target, [text])
        prompts.append(ids)
    return prompts


def servers(
    target: Target, texts: Sequence[str], settings: Settings
) -> list[tuple[list[str], list[Case]]]:
    """The flags of each server, and what it is asked."""
    short, long = as_chat(target, list(texts)), long_prompts(target, texts, -(-len(texts) // 4))
    questions = questions_of(target, [*short, *long], settings.new_tokens)
    first, chunked = questions[: len(short)], questions[len(short) :]
    later = follow_ups(target, first, settings.new_tokens)
    speculation = ["--speculative-config", json.dumps({"model": settings.draft, "tree": _TREES})]
    company, found, plain = ("drafts", "cancelled"), ("found",), ("found", "drafts")
    # Pages are found until newer ones take their place, so the cases of one salt stand together.
    speculating = [
        Case("alone", first, some=("drafts",)),
        Case("found", first, some=found, none=(), salt="alone"),
        Case("found, follow-ups", later, some=found, none=(), salt="alone"),
        Case("alone, plain", first, none=plain, speculation=False),
        Case("found, written plain", later, some=found, none=(), salt="alone, plain"),
        Case("found, in company", later, "in company", (*found, *company), (), "alone, plain"),
        Case("alone, in chunks", chunked, some=("drafts",)),
        Case("in company", first, "in company", company),
        Case("in company, in chunks", chunked, "in company", company),
    ]
    # All slots fill, and a quarter into their answers there are no pages left.
    filled = [-(-(len(ids) + settings.new_tokens // 4) // _SMALL_PAGE) for ids in short]
    longest = -(-(max(map(len, short)) + settings.new_tokens) // _SMALL_PAGE)
    few = max(longest, sum(filled[: settings.slots]))
    small = ["--block-size", f"{_SMALL_PAGE}", "--num-gpu-blocks-override", f"{few}"]
    preempting = [Case("preempted", [*first] * 3, "at once", ("drafts", "preemptions"))]
    draftless = [
        Case("no draft, alone", first, none=plain),
        Case("no draft, in company", first, "in company", ("cancelled",), plain),
    ]
    return [
        (speculation, speculating),
        ([*speculation, *small], preempting),
        (["--speculative-config", "none"], draftless),
    ]


# ---- one case ----------------------------------------------------------------------------------


def run_case(url: str, target: Target, case: Case, settings: Settings) -> dict[str, Any]:
    """Asks the server and returns the row of the case; prints every difference."""
    bodies = [
        {
            "prompt": question.prompt,
            "max_tokens": settings.new_tokens,
            "temperature": 0,
            "return_token_ids": True,
            "cache_salt": f"{case.salt or case.name} {i}",
            "speculative": {} if case.speculation else {"enabled": False},
        }
        for i, question in enumerate(case.questions)
    ]
    company = Company(
        count=settings.slots - 1 if case.way == "in company" else 0,
        prompts=[question.prompt for question in case.questions],
        most_tokens=2 * settings.new_tokens,
        seed=settings.seed,
    )
    answers, server = asyncio.run(ask(url, bodies, company, at_once=case.way == "at once"))
    return report(target, case, answers, company.closed, server)


def report(
    target: Target, case: Case, answers: Sequence[Answer], cancelled: int, server: ServerFigures
) -> dict[str, Any]:
    """The row of a case; `problems` is what is wrong beside the tokens."""
    prompts, expected = zip(*((q.prompt, q.expected) for q in case.questions), strict=True)
    row = {"case": case.name} | summarise(
        compare(target, prompts, expected, [answer.tokens for answer in answers])
    )
    pairs = zip(case.questions, answers, strict=True)
    row |= {
        "found": sum(answer.cached_tokens > question.told for question, answer in pairs),
        "drafts": int(server.counters["vllm:spec_decode_num_drafts_total"]),
        "preemptions": int(server.counters["vllm:num_preemptions_total"]),
        "cancelled": cancelled,
    }
    decode = target.require_tokenizer().decode
    garbled = sum(a.text != decode(a.tokens, skip_special_tokens=True) for a in answers)
    problems = [f"{garbled} texts are not those of their tokens"] if garbled else []
    problems += [f"no {name}" for name in case.some if not row[name]]
    problems += [f"{row[name]} {name}" for name in case.none if row[name]]
    return row | {"problems": problems + server.problems()}


# ---- the program -------------------------------------------------------------------------------


def run(target: Target, texts: Sequence[str], settings: Settings) -> Iterator[dict[str, Any]]:
    """The rows of all cases, as they come.

    Raises:
      OSError: a server does not get ready.
      RuntimeError: a server refuses a request, breaks off, or does not end with code 0.
    """
    common = [
        settings.model, "--dtype", "float32", "--generation-config", "vllm",
        "--block-size", f"{_PAGE_SIZE}", "--max-num-seqs", f"{settings.slots}",
    ]  # fmt: skip
    for flags, cases in servers(target, texts, settings):
        with ServerProcess(*common, *flags) as server:
            server.wait_until_ready(_READY_SECONDS)
            for case in cases:
                yield run_case(server.url, target, case, settings)
            if code := server.stop():
                raise RuntimeError(f"the server with {' '.join(flags)} ended with code {code}")


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    draft: Annotated[str, typer.Option()] = "smollm2-135m-instruct-eagle",
    prompts: Annotated[int, typer.Option(help="So many MT-Bench questions.", min=1)] = 12,
    new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    slots: Annotated[int, typer.Option(help="Sequences decoded together.", min=2)] = 16,
    seed: Annotated[int, typer.Option(help="Of what the others ask for.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> int:
    """Compares text over HTTP with `generate`'s; exit code 1 if a case is not equal."""
    enable_compilation_cache()
    settings = Settings(model, draft, new_tokens, slots, seed)
    target = load_target(model, dtype="float32").pack()
    columns = ("identical", "excused", "different", "found", "preemptions", "cancelled")
    print(f"{'case':22}", *(f"{name:>11}" for name in columns))
    rows = []
    for row in run(target, mt_bench()[:prompts], settings):
        numbers = (f"{row[name]:11}" for name in columns)
        print(f"{row['case']:22}", *numbers, "; ".join(row["problems"]), flush=True)
        rows.append(row)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        results = {"machine": describe_machine()} | dataclasses.asdict(settings) | {"rows": rows}
        out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(row["equal"] and not row["problems"] for row in rows) else 1


if __name__ == "__main__":
    run_program(main, "benchmarks.serve_text")
