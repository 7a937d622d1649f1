"""Overfits one conversation, to show that training, decoding and counting fit together.

    python -m benchmarks.overfit

The conversation's answer is the target's own greedy text. A draft that has learnt it by heart must
have nearly every drafted token accepted: the acceptance length over rounds that nothing cut comes
close to depth + 1. A shift, mask or position that training and decoding see differently would show
as a length far below, whatever the loss says.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from jax_eagle import generate, load_draft, load_target
from jax_eagle.acceptance import decode_acceptance
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program
from train.config import (
    CheckpointConfig,
    DataConfig,
    DraftSettings,
    EvaluationConfig,
    LossConfig,
    OptimizerConfig,
    Source,
    TrainConfig,
)
from train.trainer import run

# From random weights: the closed-form start fits so few tokens without any training.
QUESTION = "What is the difference between a list and a tuple in Python?"
KINDS = {
    "eagle": (
        DraftSettings(start="random", vocab_size=4096),
        LossConfig(logits_weight=1.0, unroll=4),
    ),
    "eagle3": (
        DraftSettings(kind="eagle3", start="random", vocab_size=4096),
        LossConfig(feature="none", logits="kl", logits_weight=1.0, unroll=4),
    ),
}


def overfit(model: str, kind: str, steps: int, depth: int, new_tokens: int, folder: Path) -> dict:
    """Figures of one kind of draft."""
    target = load_target(model)
    tokenizer = target.require_tokenizer()
    user = {"role": "user", "content": QUESTION}
    prompt = tokenizer.apply_chat_template([user])
    answer = generate(target, None, [prompt], max_new_tokens=new_tokens).tokens[0]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    chat = {"messages": [user, {"role": "assistant", "content": text}]}
    (folder / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    (folder / "prompts.txt").write_text(QUESTION + "\n")
    draft, loss = KINDS[kind]
    tree = f"chain:{depth}"
    config = TrainConfig(
        target=model,
        run=str(folder / kind),
        output=str(folder / kind / "draft"),
        data=DataConfig(
            (Source("chat", str(folder / "chat.jsonl")),), length=256, batch=1, epochs=steps,
            validation_share=0.0, keep_features_gb=1.0,
        ),
        draft=draft,
        loss=loss,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.1),
        evaluation=EvaluationConfig(
            (str(folder / "prompts.txt"),), max_new_tokens=new_tokens, depth=depth, trees=(tree,),
            every=steps,
        ),
        checkpoint=CheckpointConfig(minutes=1e6),
    )  # fmt: skip
    run(config, target=target)
    decoded = decode_acceptance(
        target, load_draft(folder / kind / "draft", target), [prompt],
        trees=[tree], max_new_tokens=new_tokens,
    )[tree]  # fmt: skip
    return {
        "kind": kind,
        "steps": steps,
        "answer_tokens": len(answer),
        "uncut_acceptance_length": decoded.depths.chain_length(depth).value,
        "acceptance_length": decoded.acceptance_length().value,
        "bar": 0.95 * (depth + 1),
    }


def main(
    kind: Annotated[list[str] | None, typer.Option(help="eagle, eagle3; repeatable.")] = None,
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    steps: Annotated[int, typer.Option()] = 200,
    depth: Annotated[int, typer.Option(help="Of the chain.")] = 3,
    new_tokens: Annotated[int, typer.Option(help="Of the answer, at most.")] = 200,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Trains on one conversation and measures how much of a chain is accepted."""
    enable_compilation_cache()
    rows = []
    for each in kind or list(KINDS):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(overfit(model, each, steps, depth, new_tokens, Path(folder)))
        print(json.dumps(rows[-1]))
    if out:
        results = {"machine": describe_machine(), "rows": rows}
        out.write_text(json.dumps(results, indent=1) + "\n")
    short = [row["kind"] for row in rows if row["uncut_acceptance_length"] < row["bar"]]
    if short:
        raise SystemExit(f"below the bar: {', '.join(short)}")


if __name__ == "__main__":
    run_program(main, "benchmarks.overfit")
