"""`jax-eagle demo`: answers of a real model by tree speculation, and what speculation gains."""

import jax
from rich.console import Console

from . import bench, hub, terminal
from .config import ConfigError
from .draft import Draft
from .generate import generate_stream
from .llama import Target
from .load import load_draft, load_target
from .tree import parse_tree

NUM_PROMPTS = 4
NO_TOKENIZER = "this model has no tokenizer: give the prompt as token ids (--prompt-ids 1,2,3)"


def demo(
    out: Console,
    *,
    model: str,
    draft: str,
    trees: list[str],
    max_new_tokens: int,
    repetitions: int,
) -> None:
    """Loads, compiles, streams the answers, then measures plain and speculative runs in turn.

    Raises:
      ValueError: a model that cannot be used, or options that do not go together.
    """
    with terminal.timed_step(out, f"Fetching {model} (a download at the first start)"):
        path = hub.resolve(model)
    with terminal.timed_step(out, "Loading target and draft"):
        target = load_target(path).pack()
        speculator = load_draft(draft, target).pack()
    questions = bench.PROMPTS[:NUM_PROMPTS]
    prompts = [chat_prompt(target, question) for question in questions]
    batches = [[prompt] for prompt in prompts]
    with terminal.timed_step(out, "Compiling (kept for the next start)"):
        bench.warm_up(target, speculator, batches, trees, max_new_tokens=max_new_tokens)
    answer(
        out,
        target,
        speculator,
        dict(zip(questions, prompts, strict=True)),
        trees[0],
        max_new_tokens,
    )
    with terminal.timed_step(out, "Measuring with and without speculation, in turn", spinner=False):
        runs = list(
            bench.measure(
                target, speculator, batches, trees,
                max_new_tokens=max_new_tokens, repetitions=repetitions,
            )
        )  # fmt: skip
    title = f"{NUM_PROMPTS} prompts x {repetitions}, interleaved, medians"
    out.print(terminal.speed_table(bench.summarise(runs), title))


def answer(
    out: Console,
    target: Target,
    draft: Draft,
    prompts: dict[str, list[int]],
    tree: str,
    max_new_tokens: int,
) -> None:
    """Streams the answer to each prompt, by its text."""
    marks = not out.is_terminal or out.no_color
    shape = parse_tree(tree, platform=jax.default_backend())
    out.print(f"\nTree {tree}: {shape.num_nodes} nodes, the root included, depth {shape.max_depth}")
    terminal.legend(out, marks=marks)
    for question, prompt in prompts.items():
        out.print(f"\n[bold]> {question}[/]", highlight=False, soft_wrap=True)
        events = generate_stream(target, draft, [prompt], max_new_tokens=max_new_tokens, tree=tree)
        done = terminal.stream(out, target.tokenizer, events, marks=marks)
        out.print(f"[dim]{done}[/]", highlight=False, soft_wrap=True)
    out.print()


def chat_prompt(target: Target, text: str) -> list[int]:
    """Token ids of one user message, ready for the answer.

    Raises:
      ValueError: a model without tokenizer or chat template.
    """
    if target.tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    try:
        return target.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    except ConfigError as error:
        raise ConfigError(f"{error} (--raw)") from None
