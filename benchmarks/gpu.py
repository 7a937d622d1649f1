"""What one GPU reaches, each figure beside the floor that memory and arithmetic set.

    python -m benchmarks.gpu --out benchmarks/results/gpu_h100.json
    python -m benchmarks.gpu --grown --out benchmarks/results/grown_h100.json

In this order, until the time is up (what was left out is named):

1. Numerics of every kernel against float64, in all its forms; ends here with status 1 if wrong.
2. Copy bandwidth and matrix peak of this machine: the floors below use them, not a data sheet.
3. The attention kernels at 8k tokens by batch and tree size, and their peers.
4. Products of 1 to 64 rows with fp8 and int8 weights, in the shapes of 8B and of one rank's share
   of Maverick.
5. The round of an 8B target in bf16 with random weights: the plain step, verification of 4 to 64
   nodes, draft, sampling and commit, and the whole round with its overhead.
6. The same of one rank's share of Maverick (an eighth of it, experts in fp8).
7. The attention kernels at 1k and 32k tokens.

`--grown` instead decodes MT-Bench with SmolLM2 grown to 8B (see `grow`): milliseconds a token with
and without speculation. It needs model and questions in the cache (`jax-eagle download
smollm2-135m-instruct`, and any benchmark of MT-Bench, on a machine with a network; JAX_EAGLE_CACHE
names the folder). Nothing else needs a network. `--rehearse` runs everything at tiny sizes on any
machine; its times mean nothing.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console

from jax_eagle import Draft, Target, bench, load_draft, load_target
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.config import DraftConfig, Llama4Attention, LlamaConfig, MoE
from jax_eagle.eagle import init_draft_params
from jax_eagle.llama import init_params
from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program
from jax_eagle.prompts import as_chat, mt_bench
from jax_eagle.quantization import Quantization
from jax_eagle.sharding import Backend
from pallas_kernels.grouped_matmul.shapes import MatmulShape
from pallas_kernels.tree_attention import tree_attention
from pallas_kernels.tree_attention.shapes import NODES, SHAPES

from .attention import prefix_bytes, seconds_per_call
from .grow import describe, grow_draft, grow_target
from .matmul import EIGHT_BITS, measure_products
from .numerics import check_kernels, check_products
from .peers import peers
from .rounds import Setting, measure_rounds
from .share import read_share
from .synthetic import DRAFT_8B, LLAMA_8B
from .timing import Machine, Row, measure_machine


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured; the rehearsal has its own."""

    config: Any = LLAMA_8B
    draft: Any = DRAFT_8B
    attention: str = "triton"
    interpret: bool = False
    rounds: tuple = (
        (1, 8192, (16, 4, 8, 64)), (8, 8192, (16, 4)), (64, 4096, (4,)), (32, 8192, (4,)),
    )  # fmt: skip
    """(batch, context, tree sizes) of the model's steps, the most telling first."""
    share: tuple | None = None
    """(target, draft) of one rank's share; None: Maverick's."""
    shared_rounds: tuple = ((1, 8192, (4,)), (8, 8192, (4,)), (64, 8192, (4,)))
    """As `rounds`, of the share."""
    rows: tuple = (1, 4, 16, 64)
    """Of the products."""
    products: tuple = EIGHT_BITS
    contexts: tuple = (8192, 1024, 32768)
    batches: tuple = (1, 8, 32, 64)
    nodes: tuple = NODES
    shape: str = "llama-3.1-8b"
    copy_bytes: int = 2**31
    matrix: int = 8192
    repetitions: int = 20
    grown: tuple = (
        (1, ("chain:3", "static:16")), (8, ("chain:3", "static:8")), (64, ("chain:3",)),
        (32, ("chain:3",)),
    )  # fmt: skip
    """(batch, trees) of the grown model."""
    new_tokens: int = 128
    groups: int = 8
    """Batches of prompts at most."""


def tiny() -> Sizes:
    """Everything once, in seconds, on a machine without a GPU."""
    config = dataclasses.replace(
        LLAMA_8B, vocab_size=512, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, max_position=512, dtype="float32",
    )  # fmt: skip
    draft = dataclasses.replace(DRAFT_8B, layer=dataclasses.replace(config, num_layers=1))
    draft = dataclasses.replace(draft, feature_width=64, draft_vocab_size=128)
    share = dataclasses.replace(
        config, llama4=Llama4Attention((1,), chunk=64), moe=MoE(4, 1, (1,), 64),
        quantization=Quantization(experts="fp8"),
    )  # fmt: skip
    return Sizes(
        config, draft, interpret=True, rounds=((1, 64, (4,)),), share=(share, draft),
        shared_rounds=((2, 64, (4,)),), products=(("tiny", MatmulShape(4, 128, 64), "int8"),),
        rows=(2,), contexts=(256,), batches=(1,),
        nodes=(4,), shape="smollm2-135m", copy_bytes=2**20, matrix=128, repetitions=2,
        grown=((1, ("chain:1",)),), new_tokens=4, groups=1,
    )  # fmt: skip


def random_models(
    config: LlamaConfig, draft_config: DraftConfig, backend: Backend
) -> tuple[Target, Draft]:
    """Random weights made on the device."""
    key = jax.random.key(0)
    params = jax.jit(functools.partial(init_params, config))(key)
    draft_params = jax.jit(functools.partial(init_draft_params, draft_config))(key)
    mapping = jnp.arange(draft_config.draft_vocab_size, dtype=jnp.int32)
    return Target(params, config, backend=backend), Draft(draft_params, mapping, draft_config)


# ---- attention alone ---------------------------------------------------------------------------


def measure_attention(
    machine: Machine,
    sizes: Sizes,
    name: str,
    attend: Callable,
    *,
    batch: int,
    context: int,
    nodes: int,
) -> Iterator[Row]:
    """One layer's tree attention: both passes."""
    shape = SHAPES[sizes.shape]
    seconds = seconds_per_call(
        attend, shape, batch=batch, context=context, nodes=nodes, calls=4 * sizes.repetitions
    )
    read = prefix_bytes(shape, batch=batch, context=context, dtype=jnp.bfloat16)
    flops = 4 * batch * nodes * shape.num_heads * shape.head_dim * context
    yield Row(
        f"attention ({name}), {nodes} nodes, batch {batch}, {context} tokens",
        seconds, machine.floor(read, flops), f"{read / seconds / 1e9:.0f} GB/s",
    )  # fmt: skip


# ---- rounds of random models -------------------------------------------------------------------


def measure_model(
    machine: Machine, sizes: Sizes, label: str, configs: tuple, settings: tuple, backend: Backend
) -> Iterator[Row]:
    """Rounds in every setting; what does not fit into memory ends it.

    JAX takes three quarters of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION gives it more.
    """
    target, draft = random_models(*configs, backend)
    for batch, context, trees in settings:
        setting = Setting(machine, sizes.repetitions, target, draft, batch, context, label)
        yield from measure_rounds(setting, trees)


# ---- a grown model on real prompts -------------------------------------------------------------


def measure_grown(
    sizes: Sizes, model: str, draft: str, console: Console, in_time: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """Milliseconds a token on MT-Bench, plain and with trees; the original's acceptance besides."""
    small = load_target(model, dtype=sizes.config.dtype)
    small_draft = load_draft(draft, small)
    shape = sizes.config
    if sizes.interpret:  # the rehearsal: just large enough
        shape = dataclasses.replace(
            small.config, hidden_size=640, num_layers=31, vocab_size=small.config.vocab_size + 8
        )
    large = grow_target(small, shape)
    large_draft = grow_draft(small_draft, large)
    console.print(describe(small, large, large_draft))
    # Of similar length, so that few programs compile; repeated where a batch wants more.
    prompts = [row for row in as_chat(small, mt_bench()) if 64 <= len(row) <= 120]
    for batch, trees in sizes.grown:
        groups = [
            [prompts[i % len(prompts)] for i in range(begin, begin + batch)]
            for begin in range(0, batch * min(sizes.groups, max(1, len(prompts) // batch)), batch)
        ]
        models = [("grown", large, large_draft)]
        if batch == 1:  # acceptance does not depend on the batch
            models.append(("original", small, small_draft))
        for name, target, head in models:
            if not in_time():
                yield {"left_out": f"{name}, batch {batch}"}
                continue
            options = {"max_new_tokens": sizes.new_tokens}
            bench.warm_up(target, head, groups[:1], trees, **options)
            runs = list(bench.measure(target, head, groups, trees, repetitions=1, **options))
            for row in bench.summarise(runs):
                yield {
                    "model": name, "batch": batch, "tree": row.tree, "ratio": row.ratio,
                    "acceptance_length": row.acceptance_length,
                    "ms_per_token": 1e3 * batch / row.tokens_per_second,
                    "prompts": len(groups) * batch,
                }  # fmt: skip


# ---- the program -------------------------------------------------------------------------------


def measurements(
    machine: Machine, sizes: Sizes, in_time: Callable[[], bool]
) -> Iterator[tuple[str, Iterator[Row]]]:
    """What to measure, the most telling first."""
    kernels = functools.partial(
        tree_attention, implementation=sizes.attention, interpret=sizes.interpret
    )

    def attention(name, attend, contexts, batches, nodes):
        for context, batch, count in itertools.product(contexts, batches, nodes):
            setting = {"batch": batch, "context": context, "nodes": count}
            yield (
                f"attention ({name}), {setting}",
                measure_attention(machine, sizes, name, attend, **setting),
            )

    first, *others = sizes.contexts
    yield from attention(sizes.attention, kernels, [first], sizes.batches, sizes.nodes)
    for name, attend in peers().items():
        yield from attention(name, attend, [first], sizes.batches, sizes.nodes[-2:][:1])
    for name, shape, scheme in sizes.products:
        rows = measure_products(
            machine, name, shape, scheme, rows=sizes.rows, calls=4 * sizes.repetitions,
            implementation=sizes.attention, interpret=sizes.interpret,
        )  # fmt: skip
        yield f"products ({scheme}) of {name}", rows
    backend = Backend(attention=sizes.attention, matmul=sizes.attention, interpret=sizes.interpret)
    share = sizes.share or read_share("llama_4_maverick")
    for label, configs, settings in (
        ("", (sizes.config, sizes.draft), sizes.rounds),
        ("an eighth of Maverick, ", share, sizes.shared_rounds),
    ):
        yield f"{label}rounds", measure_model(machine, sizes, label, configs, settings, backend)
    yield from attention(sizes.attention, kernels, others, sizes.batches, sizes.nodes)


def main(
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    minutes: Annotated[float, typer.Option(help="Start nothing new after so long.")] = 7.0,
    grown: Annotated[bool, typer.Option(help="Decode MT-Bench with SmolLM2 grown to 8B.")] = False,
    rehearse: Annotated[bool, typer.Option(help="Tiny sizes, on any machine.")] = False,
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    draft: Annotated[str, typer.Option()] = "smollm2-135m-instruct-eagle",
) -> None:
    """Checks the kernels, then measures them and the whole round against the machine's limits."""
    console = Console(width=140, highlight=False)
    begin = time.perf_counter()

    def in_time() -> bool:
        return time.perf_counter() - begin < 60 * minutes

    if jax.default_backend() != "gpu" and not rehearse:
        raise ValueError("no GPU here; --rehearse runs everything at tiny sizes")
    enable_compilation_cache()
    sizes = tiny() if rehearse else Sizes()
    results: dict[str, Any] = {"machine": describe_machine(), "rehearsal": rehearse}
    try:
        wrong = check_kernels(console, interpret=sizes.interpret, few=rehearse)
        wrong += check_products(console, interpret=sizes.interpret, few=rehearse)
        results["numerics"] = wrong or "every kernel within its bound"
        if wrong:
            raise typer.Exit(1)
        if grown:
            results["grown"] = []
            for row in measure_grown(sizes, model, draft, console, in_time):
                results["grown"].append(row)
                console.print(row)
        else:
            _measure_all(sizes, results, console, in_time)
            if rehearse and results["left_out"]:
                raise typer.Exit(1)
    finally:  # what was measured is kept, whatever ends the run
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")


def _measure_all(sizes, results: dict, console: Console, in_time: Callable[[], bool]) -> None:
    """Adds rows to the results until the time is up, and what was left out."""
    machine = measure_machine(
        copy_bytes=sizes.copy_bytes, matrix=sizes.matrix, many=sizes.repetitions
    )
    results["limits"] = dataclasses.asdict(machine)
    console.print(
        f"copy {machine.bytes_per_second / 1e9:.0f} GB/s, "
        f"bf16 products {machine.flops_per_second / 1e12:.1f} TFLOP/s"
    )
    rows, left_out = results.setdefault("rows", []), results.setdefault("left_out", [])
    for name, measured in measurements(machine, sizes, in_time):
        try:
            while in_time():
                row = next(measured)
                rows.append(dataclasses.asdict(row) | {"share": row.share})
                console.print(
                    f"{row.name:56s} {1e3 * row.seconds:9.3f} ms   floor "
                    f"{1e3 * row.floor_seconds:9.3f} ms   {row.share:4.0%}   {row.note}"
                )
            left_out.append(name)
        except StopIteration:
            continue
        except Exception as error:  # out of memory, a peer that does not run: go on with the rest
            left_out.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    if left_out:
        console.print(f"left out: {'; '.join(left_out)}")


if __name__ == "__main__":
    run_program(main, "benchmarks.gpu")
