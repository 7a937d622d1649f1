"""What the tests of training data share: a ChatML tokenizer of bytes, and small JSONL files."""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jax_eagle.tokenizer import Tokenizer
from tests.serving import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = 257
"""Id of <|im_end|>; one more is the size of the vocabulary."""
VOCAB = 258


@functools.cache
def chatml_tokenizer() -> Tokenizer:
    """One token a byte, <|im_start|> 256, <|im_end|> 257."""
    return byte_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"))


def chat(*turns: str) -> dict[str, Any]:
    """A conversation; the user begins."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def write_lines(path: Path, records: Iterable[Mapping[str, Any] | str]) -> Path:
    """A JSONL file; strings are lines as they are."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
