"""Permissive text as training data: `python -m train.library_text --help`.

Writes text as JSONL lines {"text", "name"} and dialogues as {"messages", "id"}. Prose comes first,
so that a source cut at `max_tokens` keeps it: documents, and modules that are mostly documented,
which become pages of reference (head and docstring of each definition). The other modules follow as
source code. No file is written twice. In the dialogues the user asks for a documented function and
the answer is its source.
"""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from jax_eagle.program import run_program

from .jsonl import write_lines
from .library import Definition, LibraryFile, library_files

PROSE_SHARE = 0.35
"""Docstrings' part of a module from which on they are all that is taken of it."""
_REQUESTS = (
    "Write a Python function `{name}`. {doc}",
    "Complete the following Python function.\n\n{stub}",
    "{stub}",
    "Implement this in Python:\n\n```python\n{stub}\n```",
    "{doc}\n\nHow would you write that in Python?",
)


def texts(files: Iterable[LibraryFile]) -> Iterator[dict[str, str]]:
    """Lines {"text", "name"}: first all prose, then all code."""
    code = []
    for file in files:
        prose = reference(file) if file.is_module else file.text
        if prose:
            yield {"text": prose, "name": file.name}
        else:
            code.append(file)
    for file in code:
        yield {"text": file.text, "name": file.name}


def reference(file: LibraryFile) -> str:
    """The docstrings of a module as one page; empty if most of the module is code."""
    prose = sum(len(definition.doc) for definition in file.definitions)
    if prose < PROSE_SHARE * len(file.text):
        return ""
    return "\n\n\n".join(
        f"{definition.head or definition.name}\n\n{definition.doc}"
        for definition in file.definitions
    )


def chats(files: Iterable[LibraryFile]) -> Iterator[dict[str, Any]]:
    """Lines {"messages", "id"}: one dialogue for each function with a docstring of some length."""
    for file in files:
        for definition in file.definitions:
            if 20 < len(definition.summary) < 400 and 80 < len(definition.code) < 1500:
                yield {"messages": _dialogue(definition), "id": definition.name}


def _dialogue(function: Definition) -> list[dict[str, str]]:
    request = random.Random(function.name).choice(_REQUESTS)
    name = function.name.rpartition(".")[2]
    question = request.format(name=name, doc=function.summary, stub=function.stub)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"```python\n{function.code}\n```"},
    ]


def main(
    text_out: Annotated[Path, typer.Option(help="JSONL of text.")] = Path("runs/text.jsonl"),
    chat_out: Annotated[Path, typer.Option(help="JSONL of dialogues.")] = Path("runs/chat.jsonl"),
    packages: Annotated[
        str, typer.Option(help="Installed packages besides the standard library: numpy,jax.")
    ] = "",
) -> None:
    """Writes text and dialogues from Python's standard library and permissive packages."""
    files = library_files(packages.replace(",", " ").split())
    print(f"{text_out}: {write_lines(text_out, texts(files))} texts")
    print(f"{chat_out}: {write_lines(chat_out, chats(files))} dialogues")


if __name__ == "__main__":
    run_program(main, "train.library_text")
