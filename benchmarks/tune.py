"""Measures tile sizes of the attention kernels and writes the table that they are read from.

    python -m benchmarks.tune

For each named shape, tree size and dtype of the pages, every candidate is timed at one context and
two batch sizes; the one with the least sum of ratios to the best wins. The table goes into
pallas_kernels/tree_attention/, where `config.tile_config` looks first: commit it with a word on the
machine. A shape compiles some hundreds of programs; each is written as soon as it is finished. Not
yet run on a GPU.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.progress import track

from jax_eagle.program import run_program
from pallas_kernels.tree_attention import config
from pallas_kernels.tree_attention.inputs import Inputs
from pallas_kernels.tree_attention.shapes import NODES, SHAPES, AttentionShape
from pallas_kernels.tree_attention.triton import tree_attention_triton

from .attention import seconds_per_call

TABLE = Path(config.__file__).with_name(config.TABLE)


def main(
    shape: Annotated[list[str] | None, typer.Option(help="Named shape; repeatable.")] = None,
    nodes: Annotated[list[int] | None, typer.Option(help="Tree size; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Of the pages; repeatable.")] = None,
    context: Annotated[int, typer.Option()] = 8192,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="The table.")] = TABLE,
    rehearse: Annotated[bool, typer.Option(help="Three candidates, interpreted.")] = False,
) -> None:
    """Times the candidates and adds the best to the table."""
    if jax.default_backend() != "gpu" and not rehearse:
        raise ValueError("no GPU here; --rehearse tries three candidates in interpret mode")
    console = Console()
    table = json.loads(out.read_text()) if out.exists() else {}
    known: set[str] = set()
    for name in shape or SHAPES:
        if name not in SHAPES:
            raise ValueError(f"no shape {name!r}: choose from {', '.join(SHAPES)}")
        for count in nodes or NODES:
            for kind in dtype or ("bfloat16", "float8_e4m3fn"):
                like = SHAPES[name]
                key = config.table_key(like.head_dim, like.group, count, kind)
                if key in known:  # models that share their heads
                    continue
                known.add(key)
                best, gain = measure(like, count, kind, context, batch or [1, 16], rehearse)
                table[key] = dataclasses.asdict(best)
                out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
                console.print(f"{key}: {best}, {gain:.2f}x the rule's choice", highlight=False)


def measure(
    shape: AttentionShape, nodes: int, dtype: str, context: int, batches: list[int], rehearse: bool
) -> tuple[config.TileConfig, float]:
    """(the best tiles, how much faster than the rule's they are)."""
    choices = list(config.candidates(shape.head_dim, shape.group, nodes, dtype))
    if rehearse:
        choices = choices[:3]
    ratios = dict.fromkeys(choices, 0.0)
    for batch in batches:
        seconds: dict[config.TileConfig, float] = {}
        compiled: dict[tuple, float] = {}  # most numbers of programs lead to the same splits
        for tiles in track(choices, f"{nodes} nodes, {dtype}, batch {batch}", transient=True):
            tile_count = batch * shape.num_kv_heads * -(-nodes * shape.group // tiles.block_q)
            splits = config.num_splits(tiles, programs=tile_count, capacity=context)
            same = dataclasses.replace(tiles, programs=0), splits
            if same in compiled:
                seconds[tiles] = compiled[same]
                continue
            options = {"config": tiles, "scale": shape.head_dim**-0.5, "interpret": rehearse}
            attend = functools.partial(_attend, options)
            try:
                measured = seconds_per_call(
                    attend, shape, batch=batch, context=context, nodes=nodes, kv_dtype=dtype,
                    calls=2 if rehearse else 64,
                )  # fmt: skip
                seconds[tiles] = max(measured, 1e-9)  # differences of tiny times may be negative
            except jax.errors.JaxRuntimeError:  # too much shared memory: no candidate
                seconds[tiles] = float("inf")
            compiled[same] = seconds[tiles]
        least = min(seconds.values())
        if least == float("inf"):
            raise RuntimeError(f"no tiles compile for {shape}, {nodes} nodes, {dtype}")
        for tiles in choices:
            ratios[tiles] += seconds[tiles] / least / len(batches)
    best = min(choices, key=lambda tiles: ratios[tiles])
    return best, ratios[choices[0]] / ratios[best]


def _attend(options: dict, **arrays):
    return tree_attention_triton(Inputs(**arrays), **options)


if __name__ == "__main__":
    run_program(main, "benchmarks.tune")
