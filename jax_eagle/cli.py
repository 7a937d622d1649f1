"""The program `jax-eagle`: demo, generate, download, inspect, bench.

Text and tables go to stdout, progress and errors to stderr. Bad input ends with one line and exit
code 2, anything unexpected with one line and exit code 1; --debug shows the stack trace.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from . import hub, terminal
from .compilation_cache import enable_compilation_cache
from .demo import NO_TOKENIZER, chat_prompt
from .demo import demo as run_demo
from .deployment import is_deployment, read_deployment, read_mesh
from .draft import Draft
from .generate import generate as run_generate
from .generate import generate_stream
from .inspection import inspect as describe
from .inspection import plan_lines
from .llama import Target
from .load import load_draft, load_target
from .planning import make_plan
from .program import DEBUG_VARIABLE, run_program
from .report import BenchOptions, read_prompts
from .report import bench as run_bench
from .roofline import ACCELERATORS
from .sampling import SamplingParams
from .tree import parse_tree

MODEL = "smollm2-135m-instruct"

HELP = (
    "EAGLE speculative decoding for Llama models in JAX.\n\n"
    "A small draft proposes tokens; the target checks them all at once and keeps those it would "
    "have written itself. The text (or, when sampling, its distribution) stays the target's own."
)
EPILOG = r"""
\b
[bold]Trees.[/] The draft proposes a tree of tokens, the target checks all nodes in one
forward. A bigger tree gains more tokens a round and costs more to check.
All trees give the same text.
  auto                     chosen by batch size (the default)
  plain                    no speculation
  chain:3                  three tokens in a row
  static:8                 a fixed tree; also 3, 4, 16, eagle-26, medusa-64
                           (number of nodes, the root included)
  paths:\[[0],[0,0],[1]]    your own: child ranks from the root, 0 is the
                           draft's favourite
  dynamic:depth=4,width=4,nodes=16
                           grown by the draft's confidence (EAGLE-2)

\b
[bold]Examples[/]
  jax-eagle demo
  jax-eagle generate --prompt "Why is the sky blue?" --tree static:4
  jax-eagle generate --prompt "Once upon a time" --raw --temperature 0.8
  jax-eagle generate --model ./llama --draft ./eagle --prompt "Hello"
  jax-eagle generate --model ./llama --draft none --prompt-ids 1,2,3
  jax-eagle inspect smollm2-135m-instruct-eagle --target smollm2-135m-instruct
  jax-eagle inspect configs/llama_3_3_70b.yaml --mesh 8
  jax-eagle bench --tree chain:3 --tree static:8 --json > bench.json
""".replace("\\b", "\b")

app = typer.Typer(
    help=HELP,
    epilog=EPILOG,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Target: a known name, a Hugging Face or Orbax folder, a .gguf file, or org/name.",
    ),
]
DraftOption = Annotated[
    str,
    typer.Option(
        "--draft", "-d", help="Draft folder or name; auto: the model's own; none: plain decoding."
    ),
]
TreeOption = Annotated[str, typer.Option(help="Draft tree; see jax-eagle --help.")]
TreesOption = Annotated[list[str], typer.Option("--tree", help="Draft tree; may be repeated.")]
TokensOption = Annotated[int, typer.Option(min=1, help="New tokens at most.")]
ChatOption = Annotated[
    bool, typer.Option("--chat/--raw", help="Apply the model's chat template, or take text as is.")
]


@app.callback(invoke_without_command=True, help=HELP, epilog=EPILOG)
def settings(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG_VARIABLE, help="Show stack traces of errors.")
    ] = False,
) -> None:
    """What comes before every command."""
    context.obj["debug"] = debug
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)
    enable_compilation_cache()


@app.command()
def demo(
    model: ModelOption = MODEL,
    draft: DraftOption = "auto",
    tree: TreesOption = ["auto"],  # noqa: B006 (typer reads it)
    max_new_tokens: TokensOption = 40,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each measurement.")] = 1,
) -> None:
    """Answer a few prompts by tree speculation, then compare its speed with plain decoding.

    The first start downloads the model and compiles (minutes); later ones take under a minute.
    """
    name = _draft_name(model, draft)
    if name is None:
        raise typer.BadParameter("the demo needs a draft: give --draft NAME")
    for text in tree:
        parse_tree(text)
    run_demo(
        Console(), model=model, draft=name, trees=tree,
        max_new_tokens=max_new_tokens, repetitions=repetitions,
    )  # fmt: skip


@app.command()
def generate(
    model: ModelOption = MODEL,
    draft: DraftOption = "auto",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to answer.")] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(help="Token ids in place of a text: 1,2,3.")
    ] = None,
    chat: ChatOption = True,
    max_new_tokens: TokensOption = 256,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep this much probability; 1: all.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep so many tokens; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the best.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    tree: TreeOption = "auto",
    drafting: Annotated[
        Literal["greedy", "sampled"],
        typer.Option(help="Propose the draft's favourites, or draw from its distribution."),
    ] = "greedy",
    stream: Annotated[bool, typer.Option(help="Show the text as it comes.")] = True,
) -> None:
    """Continue one prompt, or answer it. Text goes to stdout, what it took to stderr."""
    sampling = SamplingParams(temperature, top_p, top_k, min_p, seed)
    parse_tree(tree)
    ids = _prompt_ids(prompt, prompt_ids)
    target, speculator = _load(model, _draft_name(model, draft))
    if ids is None:
        ids = _encode(target, prompt or "", chat)
    options = {
        "max_new_tokens": max_new_tokens, "sampling": sampling, "tree": tree, "drafting": drafting,
    }  # fmt: skip
    out, err = Console(), Console(stderr=True)
    if stream:
        done = terminal.stream(
            out, target.tokenizer, generate_stream(target, speculator, [ids], **options)
        )
    else:
        result = run_generate(target, speculator, [ids], **options)
        done = terminal.show(out, target.tokenizer, result)
    err.print(f"[dim]{done}[/]", highlight=False, soft_wrap=True)
    if done.finish_reason == "error":
        raise ValueError("the target's logits are NaN, or leave no token to draw")


@app.command()
def download(
    name: Annotated[str, typer.Argument(help=f"A known name ({MODEL}) or org/name on the hub.")],
) -> None:
    """Fetch a model into the user's cache and print where it is. A second time needs no network."""
    with terminal.timed_step(Console(stderr=True), f"Fetching {name}"):
        path = hub.resolve(name)
    print(path)


@app.command()
def inspect(
    name: Annotated[
        str, typer.Argument(help="A target or a draft: a name or a path; or a server's YAML file.")
    ],
    target: Annotated[
        str | None, typer.Option(help="Check that the draft fits this target.")
    ] = None,
    read_numbering: Annotated[
        str | None,
        typer.Option(
            help="How an EAGLE-3 draft numbers the layers it taps, where its config misleads: "
            "enter or output."
        ),
    ] = None,
    smoke: Annotated[
        bool, typer.Option(help="With --target: decode a few prompts and tell the acceptance.")
    ] = True,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Plan for so many devices: 8, or data=2,tensor=4; default: as the YAML file says."
        ),
    ] = None,
    device: Annotated[
        Literal["h100", "h200"], typer.Option(help="Of a plan: what the devices are.")
    ] = "h100",
    memory_gb: Annotated[
        float | None, typer.Option(min=0.1, help="Of a plan: of one device; default: as sold.")
    ] = None,
) -> None:
    """Load a target or a draft and print its config, parameters, tensors and cache size.

    With a target, also the acceptance length of the draft on a few prompts. With a mesh, or for a
    server's file, nothing is loaded: bytes on each device, room for the cache, and the least time
    of a round, from shapes alone; exit code 2 if it does not fit.
    """
    if mesh is not None or memory_gb is not None or is_deployment(name):
        if target is not None or read_numbering is not None:
            raise ValueError("a plan loads nothing: leave out --target and --read-numbering")
        deployment, accelerator = read_deployment(name), ACCELERATORS[device]
        devices = deployment.mesh if mesh is None else read_mesh(mesh)
        memory = accelerator.memory if memory_gb is None else memory_gb * 1e9
        plan = make_plan(deployment, devices, accelerator, memory)
        plan.check()
        lines = plan_lines(plan)
    else:
        fitted = load_target(target) if target else None
        lines = describe(name, target=fitted, numbering=read_numbering, smoke=smoke)
    for line in lines:
        print(line)


@app.command()
def bench(
    model: ModelOption = MODEL,
    draft: DraftOption = "auto",
    tree: TreesOption = ["chain:3", "static:4", "static:8"],  # noqa: B006 (typer reads it)
    prompts: Annotated[
        Path | None,
        typer.Option(help="One prompt a line, or .jsonl with prompt or turns; default: built in."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First so many prompts.")] = None,
    chat: ChatOption = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 1,
    max_new_tokens: TokensOption = 64,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each measurement.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, all runs included.")] = False,
) -> None:
    """Measure plain decoding and each tree in turn: medians, and the memory-bandwidth floor."""
    for text in tree:
        parse_tree(text, batch=batch_size)
    texts = read_prompts(prompts)[:limit]
    name = _draft_name(model, draft)
    target, speculator = _load(model, name)
    ids = [_encode(target, text, chat) for text in texts]
    trees = tree if speculator else []
    options = BenchOptions(model, name, trees, batch_size, max_new_tokens, repetitions)
    run_bench(target, speculator, ids, options, as_json=as_json)


def _draft_name(model: str, draft: str) -> str | None:
    """The draft that an option means; None: plain decoding."""
    if draft == "none":
        return None
    if draft != "auto":
        return draft
    if model not in hub.DRAFTS:
        raise ValueError(f"no draft is known for {model}: give --draft NAME, or --draft none")
    return hub.DRAFTS[model]


def _load(model: str, draft: str | None) -> tuple[Target, Draft | None]:
    err = Console(stderr=True)
    with err.status(f"Loading {model} (a download at the first start)"):
        target = load_target(model).pack()
        return target, load_draft(draft, target).pack() if draft else None


def _prompt_ids(text: str | None, ids: str | None) -> list[int] | None:
    """Token ids that were given as such; None: there is a text."""
    if (text is None) == (ids is None):
        raise ValueError("give one prompt: --prompt TEXT or --prompt-ids 1,2,3")
    if ids is None:
        return None
    try:
        return [int(token) for token in ids.split(",") if token.strip()]
    except ValueError:
        raise ValueError(f"--prompt-ids is {ids!r}, expected numbers like 1,2,3") from None


def _encode(target: Target, text: str, chat: bool) -> list[int]:
    if not text.strip():
        raise ValueError("the prompt is empty")
    if chat:
        return chat_prompt(target, text)
    if target.tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    return target.tokenizer.encode(text)


def main(arguments: list[str] | None = None) -> None:
    """Runs the program; `arguments` None: those of the process."""
    run_program(app, "jax-eagle", arguments)


if __name__ == "__main__":
    main()
