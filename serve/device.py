"""The one border between host and device: the engine's programs, called with lists of sequences.

Calls are only enqueued; their outputs are read later. Host and device exchange arrays by explicit
transfers alone. `warm_up` compiles every program that a call can ask for.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jax_eagle import slots
from jax_eagle.controls import Row, uses_controls
from jax_eagle.draft import Draft
from jax_eagle.llama import Target
from jax_eagle.sampling import Sampling, SamplingParams
from jax_eagle.state import Plan
from jax_eagle.tree import parse_tree

from .dispatch import PLAIN, Programs
from .request import Request
from .scheduler import Chunk, Sequence

MAX_STOP_IDS = 32
_BACKLOG = 16
"""Pairs that wait for the draft in plain decoding before it catches up."""
_COMPILERS = 2
"""Programs that are compiled at the same time."""
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What is fixed when the engine starts."""

    max_model_len: int
    """Prompt and new tokens of one sequence."""
    programs: Programs
    num_pages: int
    """Trash page included."""
    page_size: int = 64
    prefix_caching: bool = True
    chunk_sizes: tuple[int, ...] = (64, 256)
    """Tokens of the prefill programs, ascending."""
    tokens_per_step: int = 256
    """Prompt tokens that one step prefills at most."""


class Device:
    """Slots, and the programs that change them; one thread calls everything but the constructor."""

    def __init__(self, target: Target, draft: Draft | None, config: EngineConfig):
        """Allocates the cache and the slots.

        Raises:
          ValueError: trees without a draft.
        """
        programs = config.programs
        if draft is None and programs.trees != (PLAIN,):
            raise ValueError("trees need a draft: give one, or the plain ladder")
        self._target, self._draft, self._config = target.replace(tokenizer=None), draft, config
        self._head = draft.bind_head(target) if draft is not None else None
        self.plans = {name: Plan(parse_tree(name)) for name in programs.trees}
        path_length = max(plan.path_length for plan in self.plans.values())
        sync_length = max(path_length, _BACKLOG)
        self.sync_length = sync_length if draft is not None else None
        """Pairs that may wait for the draft; None without one."""
        self._idle = programs.buckets[-1]
        """The slot of nobody."""
        self._table_width = -(-config.max_model_len // config.page_size)
        self._slots = slots.init_slots(
            self._target,
            draft,
            num_slots=programs.buckets[-1],
            num_pages=config.num_pages,
            page_size=config.page_size,
            max_tokens=config.max_model_len,
            path_length=path_length,
            sync_length=sync_length,
            num_stop_ids=MAX_STOP_IDS,
        )
        self.compilations = 0
        """Programs compiled since `warm_up`: someone waited for the compiler."""
        self._warm = False

    # ---- calls ---------------------------------------------------------------------------------

    def decode(self, tree: str, rows: int, sequences: list[Sequence]) -> slots.Outputs:
        """One round of the sequences, in a program of `rows` rows."""
        arrays = jax.device_put(self._rows(sequences, rows))
        self._slots, outputs = slots.decode(
            self._target, self._draft, self._head, self.plans[tree], self._slots, *arrays
        )
        return outputs

    def catch_up(self, sequences: list[Sequence]) -> None:
        """Brings the draft's cache of the sequences up to date."""
        if self._draft is None:
            return
        size = 1 if len(sequences) == 1 else self._idle
        arrays = jax.device_put(self._rows(sequences, size))
        self._slots = slots.catch_up(self._target, self._draft, self._slots, *arrays)

    def admit(self, request: Request, sequence: Sequence) -> None:
        """Puts a sequence into its slot."""
        arrays = jax.device_put((np.int32(sequence.slot), self._admission(request, sequence)))
        self._slots = slots.admit(self._slots, *arrays)

    def prefill(self, chunk: Chunk) -> slots.Outputs:
        """A chunk of a prompt; behind the last one comes the first token."""
        sequence, tokens = chunk.sequence, np.zeros((1, chunk.size), np.int32)
        tokens[0, : chunk.count] = sequence.context[chunk.begin : chunk.begin + chunk.count]
        count, last = np.array([chunk.count], np.int32), np.array([chunk.last])
        forced = np.array([sequence.root], np.int32)
        arrays = jax.device_put((*self._rows([sequence], 1), tokens, count, last, forced))
        self._slots, outputs = slots.prefill(self._target, self._draft, self._slots, *arrays)
        return outputs

    def _rows(self, sequences: list[Sequence], size: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots and page tables of a call; rows that nobody needs are those of the idle slot."""
        rows = np.full(size, self._idle, np.int32)
        table = np.zeros((size, self._table_width), np.int32)
        for i, sequence in enumerate(sequences):
            rows[i] = sequence.slot
            table[i, : len(sequence.pages)] = sequence.pages
        return rows, table

    def _admission(self, request: Request, sequence: Sequence) -> slots.Admission:
        stop_ids = np.full(MAX_STOP_IDS, -1, np.int32)
        stop_ids[: len(request.stop_token_ids)] = request.stop_token_ids
        given = sequence.output[:-1]
        tokens = np.zeros(self._config.max_model_len, np.int32)
        tokens[: len(given)] = given
        controls = None
        if uses_controls(request.sampling):
            controls = Row.of(
                request.sampling, self._target.config.vocab_size, request.prompt, given
            )
        return slots.Admission(
            sampling=jax.tree.map(lambda x: x[0], Sampling.stack([request.sampling])),
            controls=controls,
            wants_logprobs=np.asarray(request.logprobs is not None),
            stop_ids=stop_ids,
            max_tokens=np.int32(request.max_tokens),
            tokens=tokens,
            num_tokens=np.int32(len(given)),
            length=np.int32(sequence.found),
            boundary_page=np.int32(sequence.boundary_page),
        )

    # ---- compilation ---------------------------------------------------------------------------

    def warm_up(self) -> Iterator[tuple[str, float]]:
        """Compiles every program, or loads it from the compilation cache; yields name and seconds.

        Each is run once on the idle slot, so nothing is left to do at its first use.
        """
        jax.monitoring.register_event_duration_secs_listener(self._on_compile)
        programs = self._programs()
        with ThreadPoolExecutor(_COMPILERS) as pool:  # compilers run beside the tracing of the next
            compiled = [pool.submit(self._compile, *program[1:]) for program in programs]
            for (name, function, arguments), future in zip(programs, compiled, strict=True):
                seconds = future.result()
                begin = time.perf_counter()
                result = function(*arguments(self._slots))
                self._slots = result[0] if isinstance(result, tuple) else result
                jax.block_until_ready(self._slots)
                yield name, seconds + time.perf_counter() - begin
        self._warm = True

    def _compile(self, function: Any, arguments: Callable) -> float:
        begin = time.perf_counter()
        function.lower(*arguments(self._slots)).compile()
        return time.perf_counter() - begin

    def _programs(self) -> list[tuple[str, Any, Callable[[slots.Slots], tuple]]]:
        """Name, function and arguments of every call that `step` can make."""
        target, draft, head = self._target, self._draft, self._head
        put = jax.device_put

        def decode(tree, rows, state):
            return target, draft, head, self.plans[tree], state, *put(self._rows([], rows))

        def prefill(size, state):
            tokens = np.zeros((1, size), np.int32), np.zeros(1, np.int32), np.zeros(1, bool)
            return target, draft, state, *put((*self._rows([], 1), *tokens, np.zeros(1, np.int32)))

        def admit(params, state):
            request = Request("warm-up", (0,), params, max_tokens=1)
            slot = np.int32(self._idle)
            return state, *put((slot, self._admission(request, Sequence("", (0,), 1))))

        # First, and plain last: the decode calls then end what was admitted to the idle slot.
        plain, controlled = SamplingParams(), SamplingParams(presence_penalty=1.0)
        programs: list = [
            ("admit with controls", slots.admit, functools.partial(admit, controlled)),
            ("admit", slots.admit, functools.partial(admit, plain)),
        ]
        programs += [
            (f"decode {rows} x {tree}", slots.decode, functools.partial(decode, tree, rows))
            for rows, tree in self._config.programs.pairs
        ]
        programs += [
            (f"prefill {size}", slots.prefill, functools.partial(prefill, size))
            for size in self._config.chunk_sizes
        ]
        if draft is not None:
            programs += [
                (
                    f"catch up {rows}",
                    slots.catch_up,
                    lambda state, rows=rows: (target, draft, state, *put(self._rows([], rows))),
                )
                for rows in sorted({1, self._idle})
            ]
        return programs

    def _on_compile(self, event: str, duration_secs: float, **_: Any) -> None:
        if self._warm and event == _COMPILE_EVENT:
            self.compilations += 1
