"""Dialogues that the target writes itself, for distillation: `python -m train.dialogues --help`.

A draft must match the target's own distribution, so the answers are the target's. Questions come
from two places: the target also writes the user's turn (from an opening that this file offers), or
they are built from the functions of Python's standard library (PSF licence), whose names and
docstrings are at hand everywhere. Answers alternate between greedy and sampled batches.

Each shard is an .npz with `tokens` (all dialogues, concatenated), `answer` (True where the target's
answer is) and `lengths`. Shards are written whole, and a second start goes on after the last one.
"""

import ast
import functools
import random
import sysconfig
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import track

from jax_eagle import SamplingParams, Target, generate, load_target
from jax_eagle.program import run_program

OPENINGS = (
    """
What is|What are the|How do I|How does|How can I|Why do|Why is|Who was|When did|Where can I find
Explain|Explain the difference between|Describe|Summarize|Compare|List|Give me|Name|Define
Write a|Write a short story about|Write an email to|Write a poem about|Write a function that
Write a Python program that|Implement|Compose|Create a|Design|Draft|Imagine|Pretend you are
Act as|Suppose|Given|Consider|If|Solve|Calculate|Translate|Rewrite|Edit|Correct the following
Classify|Extract|Identify|Analyze|Evaluate|Recommend|Suggest|Plan|Help me|Tell me about|Can you
Could you|Please|I want to|I need|I am a|My friend|In a|The following|A farmer has|There are
Which of the following|What would happen if|Is it true that|Do you think|Should I|Let's
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

CODE_REQUESTS = (
    "Complete the following Python function.\n\n{code}",
    "{code}",
    "Write the body of this function:\n\n```python\n{code}\n```",
    "Explain what this Python function does.\n\n{code}",
    "Write a Python function `{name}`. {doc}",
    "{doc}\n\nHow would you do that in Python?",
)


@functools.cache
def library_functions() -> list[tuple[str, str, str]]:
    """(name, first paragraph of the docstring, signature with docstring) of stdlib functions."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
                continue
            doc = (ast.get_docstring(node) or "").split("\n\n")[0]
            if 30 < len(doc) < 400:
                code = f'def {node.name}({ast.unparse(node.args)}):\n    """{doc}\n    """'
                found.append((node.name, " ".join(doc.split()), code))
    return found


def questions(target: Target, count: int, rng: random.Random, self_share: float) -> list[str]:
    """User turns: `self_share` of them written by the target, the rest about library functions."""
    num_self = round(count * self_share)
    chosen = rng.choices(library_functions(), k=count - num_self)
    built = [
        rng.choice(CODE_REQUESTS).format(name=name, doc=doc, code=code)
        for name, doc, code in chosen
    ]
    if not num_self:
        return built
    openings = rng.choices(OPENINGS, k=num_self)
    empty = target.require_tokenizer().apply_chat_template([{"role": "user", "content": ""}])
    end = len(empty) - 1 - empty[::-1].index(target.config.stop_token_ids[0])
    tokenizer = target.require_tokenizer()
    prompts = [empty[:end] + tokenizer.encode(text, special=False) for text in openings]
    sampling = [
        SamplingParams(temperature=1.0, min_p=0.06, seed=rng.getrandbits(32)) for _ in prompts
    ]
    result = generate(target, None, prompts, max_new_tokens=48, sampling=sampling)
    written = [
        opening + target.require_tokenizer().decode(tokens, skip_special_tokens=True)
        for opening, tokens in zip(openings, result.tokens, strict=True)
    ]
    return written + built


def answer(target: Target, users: list[str], rng: random.Random, greedy: bool, limit: int):
    """(prompts, answers) as token ids."""
    prompts = [
        target.require_tokenizer().apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
        for text in users
    ]
    sampling = [
        SamplingParams()
        if greedy
        else SamplingParams(temperature=0.8, min_p=0.05, seed=rng.getrandbits(32))
        for _ in prompts
    ]
    result = generate(target, None, prompts, max_new_tokens=limit, sampling=sampling)
    return prompts, result.tokens


def write_shard(path: Path, prompts, answers) -> None:
    """Writes one shard whole."""
    rows = [p + a for p, a in zip(prompts, answers, strict=True)]
    mask = [[False] * len(p) + [True] * len(a) for p, a in zip(prompts, answers, strict=True)]
    partial = path.with_suffix(".part.npz")
    np.savez_compressed(
        partial,
        tokens=np.concatenate(rows).astype(np.int32),
        answer=np.concatenate(mask),
        lengths=np.array([len(row) for row in rows], np.int32),
    )
    partial.rename(path)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the shards.")] = Path("runs/dialogues"),
    model: Annotated[str, typer.Option(help="Target: a name, folder or .gguf.")] = (
        "smollm2-135m-instruct"
    ),
    shards: Annotated[int, typer.Option(help="Write until there are so many.")] = 64,
    batch: Annotated[int, typer.Option(help="Dialogues a shard.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 224,
    self_share: Annotated[float, typer.Option(help="Share of questions the target writes.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Other seeds give other dialogues.")] = 0,
) -> None:
    """Lets the target write dialogues to train its draft on."""
    target = load_target(model)
    out.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(shards) if not (out / f"{i:05d}.npz").exists()]
    for i in track(missing, description="dialogues"):
        rng = random.Random(f"{seed}-{i}")
        users = questions(target, batch, rng, self_share)
        prompts, answers = answer(target, users, rng, i % 5 < 3, max_new_tokens)
        write_shard(out / f"{i:05d}.npz", prompts, answers)


if __name__ == "__main__":
    run_program(main, "train.dialogues")
