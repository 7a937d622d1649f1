"""Prompts for the target to answer: `python -m train.prompts --help`.

Three kinds. Questions that the target writes itself, as the user's turn of its chat template after
an opening from `OPENINGS`; requests about documented Python functions; requests about paragraphs of
permissive prose (see `library`). Prompt n follows from the seed and n alone, so a file that is cut
short or asked to grow goes on as if it had never stopped. No request comes twice until all have
come.
"""

import dataclasses
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jax_eagle import SamplingParams, Target, generate, load_target
from jax_eagle.config import ConfigError
from jax_eagle.program import run_program

from .jsonl import append_batches, chunks
from .library import LibraryFile, library_files

OPENINGS = """
What is|What are the|How do I|How does|How can I|Why do|Why is|Who was|When did|Where can I find
Explain|Explain the difference between|Describe|Summarize|Compare|List|Give me|Name|Define
Write a|Write a short story about|Write an email to|Write a poem about|Write a function that
Write a Python program that|Implement|Compose|Create a|Design|Draft|Imagine|Pretend you are
Act as|Suppose|Given|Consider|If|Solve|Calculate|Translate|Rewrite|Edit|Correct the following
Classify|Extract|Identify|Analyze|Evaluate|Recommend|Suggest|Plan|Help me|Tell me about|Can you
Could you|Please|I want to|I need|I am a|My friend|In a|The following|A farmer has|There are
Which of the following|What would happen if|Is it true that|Do you think|Should I|Let's
""".strip().replace("\n", "|").split("|")  # fmt: skip
CODE_REQUESTS = (
    "Complete the following Python function.\n\n{stub}",
    "{stub}",
    "Write the body of this function:\n\n```python\n{stub}\n```",
    "Explain what this Python function does.\n\n{stub}",
    "Write a Python function `{name}`. {doc}",
    "{doc}\n\nHow would you do that in Python?",
)
TEXT_REQUESTS = (
    "Summarize: {text}",
    "Summarize the following text in one sentence.\n\n{text}",
    "Explain this in simple words.\n\n{text}",
    "{text}\n\nWhat does this mean?",
    "What is the main idea of this text?\n\n{text}",
    "List the key points of the following text.\n\n{text}",
    "Rewrite this for a beginner: {text}",
    "Ask three questions that this text answers, and answer them.\n\n{text}",
)
MAX_QUESTION = 48
"""Tokens that the target may add to an opening."""


@dataclasses.dataclass(frozen=True)
class Requests:
    """Requests about library text, each list in an order that the seed shuffled."""

    code: Sequence[str]
    text: Sequence[str]


def library_requests(files: Iterable[LibraryFile], seed: int) -> Requests:
    """Every request about every function, and every one about every paragraph."""
    code, text = [], []
    for file in files:
        for definition in file.definitions:
            # A method without its class says too little.
            alone = definition.code and not re.match(r"def \w+\((self|cls)\b", definition.head)
            if alone and 30 < len(definition.summary) < 400:
                name = definition.name.rpartition(".")[2]
                values = {"name": name, "doc": definition.summary, "stub": definition.stub}
                code += [request.format(**values) for request in CODE_REQUESTS]
        for paragraph in paragraphs(file):
            text += [request.format(text=paragraph) for request in TEXT_REQUESTS]
    return Requests(_shuffled(code, seed), _shuffled(text, seed))


def paragraphs(file: LibraryFile) -> list[str]:
    """The paragraphs of prose, each in one line: whole sentences, made of words."""
    texts = [d.doc for d in file.definitions] if file.is_module else [file.text]
    found = []
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            words = sum(character.isalpha() or character == " " for character in line)
            if 150 < len(line) < 1000 and words > 0.9 * len(line) and re.match(r"[A-Z].*\.$", line):
                found.append(line)
    return found


def own_questions(
    target: Target, openings: Sequence[str], seeds: Sequence[int]
) -> tuple[list[str], int]:
    """Questions that the target writes, one after each opening, and their tokens in all.

    A question that reaches the limit ends with its last whole sentence, if it has one.

    Raises:
      ConfigError: its chat template has no stop token behind the user's turn.
    """
    tokenizer, stops = target.require_tokenizer(), target.config.stop_token_ids
    empty = tokenizer.apply_chat_template([{"role": "user", "content": ""}])
    ends = [index for index, token in enumerate(empty) if token in stops]
    if not ends:
        raise ConfigError("no stop token ends the user's turn: give --self-share 0")
    prompts = [empty[: ends[-1]] + tokenizer.encode(text, special=False) for text in openings]
    sampling = [SamplingParams(temperature=1.0, min_p=0.06, seed=seed) for seed in seeds]
    result = generate(target, None, prompts, max_new_tokens=MAX_QUESTION, sampling=sampling)
    questions = []
    for opening, tokens, reason in zip(openings, result.tokens, result.finish_reasons, strict=True):
        text = opening + tokenizer.decode(tokens, skip_special_tokens=True)
        sentences = re.match(r".*[.?!](?=\s)", text, re.DOTALL) if reason != "stop" else None
        questions.append(sentences.group() if sentences else text.rstrip("\ufffd"))
    return questions, sum(map(len, result.tokens))


def make_prompts(
    target: Target | None, numbers: Sequence[int], requests: Requests, self_share: float, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """Lines {"prompt", "kind", "id"} for these numbers; and how many tokens the target wrote.

    Without a target `self_share` is 0; the rest is half code, half text.
    """
    lines, openings, seeds = [], [], []
    for number in numbers:
        rng = random.Random(f"{seed}-{number}")
        if rng.random() < self_share:
            line = {"prompt": rng.choice(OPENINGS), "kind": "self"}
            openings.append(line["prompt"])
            seeds.append(rng.getrandbits(32))
        else:
            kind = rng.choice(("code", "text"))
            choices = getattr(requests, kind)
            line = {"prompt": choices[number % len(choices)], "kind": kind}
        lines.append({**line, "id": number})
    if target is None or not openings:
        return lines, 0
    questions, num_tokens = own_questions(target, openings, seeds)
    own = [line for line in lines if line["kind"] == "self"]
    for line, question in zip(own, questions, strict=True):
        line["prompt"] = question
    return lines, num_tokens


def _shuffled(items: list[str], seed: int) -> list[str]:
    random.Random(seed).shuffle(items)
    return items


def main(
    out: Annotated[Path, typer.Option(help="JSONL; goes on after what is there.")],
    count: Annotated[int, typer.Option(min=1, help="Prompts in all.")],
    self_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share that the target writes itself.")
    ] = 0.5,
    packages: Annotated[
        str, typer.Option(help="Installed packages besides the standard library: numpy,jax.")
    ] = "",
    model: Annotated[str, typer.Option(help="Target: a name, folder or .gguf.")] = (
        "smollm2-135m-instruct"
    ),
    batch: Annotated[int, typer.Option(min=1, help="Prompts made at once.")] = 128,
    seed: Annotated[int, typer.Option(help="Other seeds give other prompts.")] = 0,
) -> None:
    """Writes prompts for `train.regenerate`: the target's own, and about code and text."""
    requests = library_requests(library_files(packages.replace(",", " ").split()), seed)
    target = load_target(model) if self_share else None
    done = append_batches(
        out,
        range(count),
        id_of=int,
        group=lambda missing: chunks(missing, batch),
        make=lambda numbers: make_prompts(target, numbers, requests, self_share, seed),
    )
    print(f"{out}: {done}")


if __name__ == "__main__":
    run_program(main, "train.prompts")
