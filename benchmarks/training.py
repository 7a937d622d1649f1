"""Throughput of the training step: tokens a second and the share of what this machine computes.

    python -m benchmarks.training --out benchmarks/results/training_cpu.json

The real step on packed rows of random tokens (text would take the same time). The peak is that of
plain matrix products between the steps, in the same process. FLOPs are counted as in
`train.throughput`, the target's forward included. On a machine with other work, where wall clocks
say little, the second share is by seconds of CPU: of step and products, all threads together.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from jax_eagle import Target, load_target
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program
from jax_eagle.sharding import Backend
from train import init
from train.config import DataConfig, DraftSettings, Source, TrainConfig
from train.step import Batch, make_optimizer, make_train_step
from train.teacher import Teacher
from train.throughput import Probe, step_flops

SEGMENTS = 3
"""Of each row, all of the same length."""
PROBES = 5
"""Between two steps: about a second on two cores."""


def random_batch(config: TrainConfig, vocab_size: int, seed: int) -> Batch:
    """Packed rows of random tokens."""
    B, T = config.data.batch, config.data.length
    rng = np.random.default_rng(seed)
    segment_T = np.arange(T) * SEGMENTS // T + 1
    position_T = np.concatenate([np.arange((segment_T == s).sum()) for s in np.unique(segment_T)])
    segment, position = (np.tile(x.astype(np.int32), (B, 1)) for x in (segment_T, position_T))
    tokens = rng.integers(0, vocab_size, (B, T), np.int32)
    weight = (position > 0).astype(np.float32)
    return Batch(*map(jnp.asarray, (tokens, segment, position, weight)))


def measure(config: TrainConfig, target: Target, steps: int) -> list[dict[str, float]]:
    """Of each step: seconds, the better peak of before and after it, and the shares of both."""
    draft = init.draft_config(config.draft, target.config)
    optimizer, U = make_optimizer(config, steps), draft.draft_vocab_size
    state = init.make_state(
        draft,
        init.random_params(draft, jax.random.key(0)),
        init.input_scale(draft, target, []),
        None if U is None else jnp.arange(U, dtype=jnp.int32),
        optimizer,
        seed=0,
        with_average=config.optimizer.ema is not None,
    )
    teacher, vocab_size = Teacher.of(target), target.config.vocab_size
    batches = [random_batch(config, vocab_size, seed) for seed in range(2)]
    train_step, probe = make_train_step(config, optimizer), Probe(target.config.dtype)
    state, _ = train_step(state, teacher, batches[0])  # compiles
    jax.block_until_ready(state)
    flops, rows = step_flops(config, target.config, draft, kept=False), []
    before, cpu_before = probe_both(probe)
    for number in range(steps):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        state, output = train_step(state, teacher, batches[number % 2])
        jax.block_until_ready((state, output))
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
        after, cpu_after = probe_both(probe)
        peak, cpu_peak = max(before, after), max(cpu_before, cpu_after)
        share, cpu_share = flops / seconds / peak, flops / cpu_seconds / cpu_peak
        rows.append({"seconds": seconds, "peak": peak, "share": share, "cpu_share": cpu_share})
        before, cpu_before = after, cpu_after
    return rows


def probe_both(probe: Probe) -> tuple[float, float]:
    """The machine's peak by wall clock and by seconds of CPU, the best of a few."""
    pairs = []
    for _ in range(PROBES):
        begin = time.process_time()
        pairs.append((probe(), probe.flops / (time.process_time() - begin)))
    wall, cpu = zip(*pairs, strict=True)
    return max(wall), max(cpu)


def summary(config: TrainConfig, rows: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the steps."""
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {
        "draft": config.draft.kind,
        "layers": config.draft.num_layers,
        "draft_vocab_size": config.draft.vocab_size,
        "batch": config.data.batch,
        "length": config.data.length,
        "steps": len(rows),
        "tokens_per_second": config.data.batch * config.data.length / middle["seconds"],
        "peak_gflops": middle["peak"] / 1e9,
        "share_of_peak": middle["share"],
        "share_by_cpu_seconds": middle["cpu_share"],
        "shares": sorted(round(row["share"], 3) for row in rows),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints one line a case."""
    table = Table("layers", "draft tokens", "rows", "tokens/s", "peak GFLOP/s", "share of peak")
    table.add_column("by CPU seconds")
    for row in rows:
        table.add_row(
            str(row["layers"]),
            str(row["draft_vocab_size"] or "all"),
            f"{row['batch']} x {row['length']}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['peak_gflops']:.0f}",
            f"{row['share_of_peak']:.0%} [{row['shares'][0]:.0%}, {row['shares'][-1]:.0%}]",
            f"{row['share_by_cpu_seconds']:.0%}",
        )
    Console().print(table)


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    layers: Annotated[int, typer.Option(help="Of the draft.")] = 3,
    vocab: Annotated[
        list[int] | None, typer.Option(help="Draft vocabulary, 0: all; repeatable.")
    ] = None,
    batch: Annotated[int, typer.Option()] = 2,
    length: Annotated[int, typer.Option()] = 512,
    steps: Annotated[int, typer.Option(help="Of each case.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measures the throughput of the training step."""
    enable_compilation_cache()
    target = load_target(model).replace(tokenizer=None, backend=Backend(attention="reference"))
    results = []
    for size in vocab or [0]:
        config = TrainConfig(
            target=model,
            run="unused",
            output="unused",
            data=DataConfig((Source("text", "unused"),), length=length, batch=batch),
            draft=DraftSettings(start="random", num_layers=layers, vocab_size=size or None),
        )
        results.append(summary(config, measure(config, target, steps)))
    show(results)
    if out is not None:
        figures = {"machine": describe_machine(), "model": model, "rows": results}
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main, "benchmarks.training")
