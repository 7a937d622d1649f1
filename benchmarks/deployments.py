"""Rounds of large targets, compiled for eight H100s on a machine without any.

    JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot python -m benchmarks.deployments \\
        --out benchmarks/results/deployments_aot.json

Each configuration of a server (configs/*.yaml) with a chain of three drafted tokens, at 8k tokens
of context: bytes of each device as XLA has laid them out, what the devices exchange, and whether
weights are written to memory in more bits than they are stored in. `make aot` installs the plugin.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.table import Table

from jax_eagle.config import DraftConfig, LlamaConfig
from jax_eagle.deployment import read_deployment
from jax_eagle.generate import decode
from jax_eagle.planning import read_configs
from jax_eagle.program import run_program
from jax_eagle.sharding import Backend
from jax_eagle.state import Plan
from pallas_kernels.aot import compile_for_h100, h100_mesh

from .compiled import collectives, remade
from .synthetic import abstract_models, abstract_round, make_plan

CONFIGS = ("llama_3_3_70b", "llama_4_scout", "llama_4_maverick")
BATCHES = (1, 7, 8, 64)
"""Neither 7 nor the 28 nodes of its trees are dimensions of a model: there no weights can be taken
for activations."""
TREE = "chain:3"
CONTEXT = 8192
MEMORY = 80e9
"""Bytes of an H100."""


def compile_round(name: str, batch: int, *, devices: int = 8, tree: str = TREE) -> dict:
    """What one device needs for rounds of a configuration, and what it exchanges."""
    deployment = read_deployment(f"configs/{name}.yaml")
    config, draft_config = read_configs(deployment)
    backend = Backend(attention="triton", matmul="triton", mesh=h100_mesh(devices))
    target, draft = abstract_models(config, draft_config, backend)
    plan = make_plan(tree, batch)
    arguments = abstract_round(target, draft, plan, batch=batch, context=CONTEXT)
    program = compile_for_h100(decode.lower(*arguments))
    rows = {batch, batch * plan.shape.num_nodes} - {1}
    memory, text = program.compiled.memory_analysis(), program.compiled.as_text()
    found = collectives(text)
    assert draft_config is not None
    vocabularies = {config.vocab_size, draft_config.draft_vocab_size}
    weights = [x for x in jax.tree.leaves((target, draft)) if x.ndim > 1]
    gathered = [one for one in found if one.kind == "all-gather"]
    taken = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "config": name,
        "batch": batch,
        "gigabytes": (taken - memory.alias_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
        "temporary_gigabytes": memory.temp_size_in_bytes / 1e9,
        "collectives": Counter(one.kind for one in found),
        "all_reduces_expected": num_all_reduces(config, draft_config, plan),
        "largest_gather_bytes": max((one.size for one in gathered), default=0),
        "vocabulary_gathers": sum(
            bool(vocabularies & {*s}) for one in gathered for s in one.shapes
        ),
        "widened_weights": remade(text, weights, rows=rows),
        "seconds_to_compile": program.seconds,
    }


def num_all_reduces(config: LlamaConfig, draft: DraftConfig, plan: Plan) -> int:
    """Two a layer, one behind an embedding or the draft's FC; four in the branch that samples."""
    passes = plan.shape.max_depth
    return 1 + 2 * config.num_layers + passes * (2 + 2 * draft.layer.num_layers) + 4


def show(rows: list[dict]) -> None:
    """One line a program."""
    table = Table("config", "batch", "GB a device", "temporary", "all-reduces", "all-gathers",
                  "largest", "over V", "widened", "compiled in")  # fmt: skip
    for row in rows:
        kinds = row["collectives"]
        table.add_row(
            row["config"], f"{row['batch']}", f"{row['gigabytes']:.2f} of {MEMORY / 1e9:.0f}",
            f"{row['temporary_gigabytes']:.2f}",
            f"{kinds['all-reduce']} ({row['all_reduces_expected']} expected)",
            f"{kinds['all-gather']}", f"{row['largest_gather_bytes']:,} bytes",
            f"{row['vocabulary_gathers']}", f"{len(row['widened_weights'])}",
            f"{row['seconds_to_compile']:.0f} s",
        )  # fmt: skip
    Console(width=160).print(table)


def main(
    config: Annotated[list[str], typer.Option(help="Of configs/; repeatable.")] = list(CONFIGS),  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Sequences; repeatable.")] = list(BATCHES),  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Compiles every round and tells what it takes."""
    rows = []
    for name in config:
        for count in batch:
            rows.append(compile_round(name, count))
            show(rows)
            if out is not None:
                about = {"jax": jax.__version__, "tree": TREE, "context": CONTEXT, "devices": 8}
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main, "benchmarks.deployments")
