"""Speed of speculation, measured against plain decoding in the same process.

Runs are interleaved: every prompt is decoded plainly and with each tree in turn, then again, and
who goes first rotates. So a change of clock rate or a busy neighbour meets all alike. Ratios are
medians over pairs (same prompt, same repetition). Prefill is timed apart; tokens a second are those
of the rounds, the first token not counted, unless a name says `call`.

The physical limit of a plain round is the time to read the weights once. The read bandwidth is
measured between the runs.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from .draft import Draft
from .generate import decode
from .llama import Target
from .packing import unpack_params
from .prefill import start
from .sampling import SamplingParams

PLAIN = "plain"

PROMPTS = (
    "Explain to a child why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "Give me a simple recipe for pancakes.",
    "Write a Python class for a stack with push, pop and peek.",
    "Write a short letter to a friend who has moved to another city.",
    "What are the main differences between a plant cell and an animal cell?",
    "List five tips for a good night's sleep.",
    "Write an SQL query that counts the orders of each customer in 2024.",
)
"""Chat and code, of similar length so that few programs compile; written for this purpose."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One batch of prompts, decoded once."""

    tree: str
    """A tree string, or PLAIN."""
    batch: int
    """Which prompts: index into the batches given."""
    repetition: int
    prefill_seconds: float
    """From the call to the first token."""
    decode_seconds: float
    """All rounds."""
    rounds: int
    """Target calls after prefill, summed over sequences."""
    batch_rounds: int
    """Rounds of the batch: those of its longest sequence."""
    tokens: tuple[tuple[int, ...], ...]
    """What each sequence gave, the first token included."""

    @property
    def decode_tokens(self) -> int:
        """Tokens that the rounds gave, all sequences together."""
        return sum(max(len(ids) - 1, 0) for ids in self.tokens)

    @property
    def seconds_per_token(self) -> float:
        """Decoding alone."""
        return self.decode_seconds / self.decode_tokens

    @property
    def call_seconds_per_token(self) -> float:
        """Prefill included."""
        seconds = self.prefill_seconds + self.decode_seconds
        return seconds / sum(map(len, self.tokens))


@dataclasses.dataclass(frozen=True)
class Summary:
    """All runs of one tree; `ratio` is the speed relative to plain decoding."""

    tree: str
    acceptance_length: float
    rounds: int
    """In one repetition."""
    tokens_per_second: float
    """Median."""
    ratio: float
    """Median over pairs of runs; 1.0 for plain decoding."""
    ratio_quartiles: tuple[float, float]
    call_ratio: float
    """As `ratio`, prefill included."""
    same_text: float
    """Share of runs that gave the tokens of plain decoding."""


@dataclasses.dataclass(frozen=True)
class Floor:
    """A round of plain decoding against the time to read the weights once."""

    weight_bytes: int
    bytes_per_second: float
    step_seconds: float
    """Median round of plain decoding: one token for each sequence."""

    @property
    def floor_seconds(self) -> float:
        """The least time that a round can take."""
        return self.weight_bytes / self.bytes_per_second

    @property
    def share(self) -> float:
        """Floor over measured round: 1.0 is the limit."""
        return self.floor_seconds / self.step_seconds


def timed_run(
    target: Target,
    draft: Draft | None,
    prompts: Sequence[Sequence[int]],
    tree: str,
    *,
    max_new_tokens: int,
    sampling: SamplingParams = SamplingParams(),
    max_rounds: int = 2**30,
    batch: int = 0,
    repetition: int = 0,
) -> Run:
    """Decodes one batch; `tree` PLAIN leaves the draft aside."""
    draft = None if tree == PLAIN else draft
    shape = "auto" if tree == PLAIN else tree
    begin = time.perf_counter()
    plan, state = start(
        target, draft, prompts, max_new_tokens=max_new_tokens, sampling=sampling, tree=shape
    )
    model = target.replace(tokenizer=None)
    head = draft.bind_head(model) if draft is not None else None
    jax.block_until_ready((state, head))
    first = time.perf_counter()
    state = decode(model, draft, head, plan, state, np.int32(max_rounds))
    jax.block_until_ready(state)
    end = time.perf_counter()
    rounds_B = np.asarray(state.rounds)[: len(prompts)]
    tokens_BO, num_tokens_B = np.asarray(state.tokens), np.asarray(state.num_tokens)
    return Run(
        tree=tree,
        batch=batch,
        repetition=repetition,
        prefill_seconds=first - begin,
        decode_seconds=end - first,
        rounds=int(rounds_B.sum()),
        batch_rounds=int(rounds_B.max()),
        tokens=tuple(tuple(tokens_BO[b, : num_tokens_B[b]].tolist()) for b in range(len(prompts))),
    )


def warm_up(
    target: Target,
    draft: Draft | None,
    batches: Sequence[Sequence[Sequence[int]]],
    trees: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: SamplingParams = SamplingParams(),
) -> None:
    """Compiles every program that `measure` runs, by one round of each batch."""
    for prompts in batches:
        for tree in _variants(trees):
            timed_run(
                target, draft, prompts, tree,
                max_new_tokens=max_new_tokens, sampling=sampling, max_rounds=1,
            )  # fmt: skip


def measure(
    target: Target,
    draft: Draft | None,
    batches: Sequence[Sequence[Sequence[int]]],
    trees: Sequence[str],
    *,
    max_new_tokens: int,
    repetitions: int = 3,
    sampling: SamplingParams = SamplingParams(),
) -> Iterator[Run]:
    """Runs every batch plainly and with each tree, interleaved; call `warm_up` before.

    Args:
      batches: lists of prompts that are decoded together, as token ids.
      trees: tree strings; plain decoding is always measured too.
    """
    variants = _variants(trees)
    for repetition in range(repetitions):
        for i, prompts in enumerate(batches):
            shift = (repetition + i) % len(variants)
            for tree in variants[shift:] + variants[:shift]:
                yield timed_run(
                    target, draft, prompts, tree, max_new_tokens=max_new_tokens,
                    sampling=sampling, batch=i, repetition=repetition,
                )  # fmt: skip


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """One summary a tree, plain decoding first. Runs that ended at the first token are left out."""
    runs = [run for run in runs if run.decode_tokens]
    plain = {(run.batch, run.repetition): run for run in runs if run.tree == PLAIN}
    pairs = [(plain.get((run.batch, run.repetition)), run) for run in runs]
    summaries = []
    for tree in _variants([run.tree for run in runs]):
        own = [(base, run) for base, run in pairs if base is not None and run.tree == tree]
        if own:
            summaries.append(_summary(tree, own))
    return summaries


def _summary(tree: str, pairs: Sequence[tuple[Run, Run]]) -> Summary:
    runs = [run for _, run in pairs]
    ratios = [plain.seconds_per_token / run.seconds_per_token for plain, run in pairs]
    calls = [plain.call_seconds_per_token / run.call_seconds_per_token for plain, run in pairs]
    low, high = np.quantile(ratios, [0.25, 0.75])
    rounds = sum(run.rounds for run in runs)
    return Summary(
        tree=tree,
        acceptance_length=sum(run.decode_tokens for run in runs) / rounds,
        rounds=rounds // len({run.repetition for run in runs}),
        tokens_per_second=float(np.median([1 / run.seconds_per_token for run in runs])),
        ratio=float(np.median(ratios)),
        ratio_quartiles=(float(low), float(high)),
        call_ratio=float(np.median(calls)),
        same_text=float(np.mean([plain.tokens == run.tokens for plain, run in pairs])),
    )


def weight_bytes(target: Target) -> int:
    """Bytes of parameters that a plain round reads: of an untied embedding only a row."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(unpack_params(target.params)))
    if target.config.tie_embeddings:
        return total  # the embedding is the head, which is read whole
    embedding = target.params["embed"]["embedding"]
    return total - embedding.nbytes + embedding.nbytes // target.config.vocab_size


def floor(target: Target, runs: Sequence[Run], bandwidths: Sequence[float]) -> Floor:
    """The median plain round of `runs` against the median of the bandwidths sampled among them."""
    seconds = [
        run.decode_seconds / run.batch_rounds
        for run in runs
        if run.tree == PLAIN and run.batch_rounds
    ]
    return Floor(weight_bytes(target), float(np.median(bandwidths)), float(np.median(seconds)))


def bandwidth_probe(num_bytes: int = 2**28) -> Callable[[], float]:
    """A function that measures the read bandwidth, in bytes a second, by a float32 sum.

    A sample is the best of a few sums, as XLA compiles it and, on a CPU, as numpy does on all cores
    (either can be the faster one): the limit must not be an understatement.
    """
    rows = jnp.ones((num_bytes // (4 * 4096), 4096), jnp.float32)
    row_sums = jax.jit(lambda x: jnp.sum(x, axis=1))
    sums = [lambda: row_sums(rows).block_until_ready()]
    if jax.default_backend() == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        pieces = np.array_split(np.asarray(rows).reshape(-1), cores or 1)
        pool = ThreadPoolExecutor(len(pieces))
        sums.append(lambda: list(pool.map(np.sum, pieces)))
    for one in sums:
        one()

    def sample() -> float:
        seconds = []
        for one in sums * 3:
            begin = time.perf_counter()
            one()
            seconds.append(time.perf_counter() - begin)
        return rows.nbytes / min(seconds)

    return sample


def _variants(trees: Sequence[str]) -> list[str]:
    return [PLAIN, *(tree for tree in dict.fromkeys(trees) if tree != PLAIN)]
