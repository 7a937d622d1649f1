"""The one border between host and device: the engine's programs, called with lists of sequences.

Calls are only enqueued; their outputs are read later. Host and device exchange arrays by explicit
transfers alone. `warm_up` compiles every program that a call can ask for. Where other processes
have a part of the devices, each call goes to them before it is enqueued here (`group`).
"""

import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_eagle import slots
from jax_eagle.controls import Row, uses_controls
from jax_eagle.draft import Draft
from jax_eagle.llama import Target
from jax_eagle.sampling import Sampling, SamplingParams
from jax_eagle.state import Plan
from jax_eagle.tree import parse_tree

from .dispatch import PLAIN, Programs
from .group import Leader
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

    def __init__(
        self,
        target: Target,
        draft: Draft | None,
        config: EngineConfig,
        leader: Leader | None = None,
    ):
        """Allocates the cache and the slots.

        Args:
          leader: sends calls to the processes that have the other devices of the mesh.

        Raises:
          ValueError: trees without a draft.
        """
        programs = config.programs
        if draft is None and programs.trees != (PLAIN,):
            raise ValueError("trees need a draft: give one, or the plain ladder")
        self._target, self._config, self._leader = target.replace(tokenizer=None), config, leader
        mesh = target.backend.mesh
        self._whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        head = draft.bind_head(target) if draft is not None else None
        self.plans = {name: Plan(parse_tree(name)) for name in programs.trees}
        models = self._target, draft
        self._functions: dict[str, tuple[Any, tuple]] = {
            "admit with controls": (slots.admit, ()),
            "admit": (slots.admit, ()),
            "prefill": (slots.prefill, models),
            "catch up": (slots.catch_up, models),
        } | {f"decode {t}": (slots.decode, (*models, head, p)) for t, p in self.plans.items()}
        """By name; with the arguments that come before the slots and the host arrays."""
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
        self._structures: dict[str, Any] = {}
        """Of the host arrays of a call."""
        self.compilations = 0
        """Programs compiled since `warm_up`: someone waited for the compiler."""
        self._thread: threading.Thread | None = None
        """The one that calls, once everything is compiled."""

    # ---- calls ---------------------------------------------------------------------------------

    def decode(self, tree: str, rows: int, sequences: list[Sequence]) -> slots.Outputs:
        """One round of the sequences, in a program of `rows` rows."""
        return self._call(f"decode {tree}", self._rows(sequences, rows))

    def catch_up(self, sequences: list[Sequence]) -> None:
        """Brings the draft's cache of the sequences up to date."""
        if self.sync_length is not None:
            size = 1 if len(sequences) == 1 else self._idle
            self._call("catch up", self._rows(sequences, size))

    def admit(self, request: Request, sequence: Sequence) -> None:
        """Puts a sequence into its slot."""
        name = "admit with controls" if uses_controls(request.sampling) else "admit"
        self._call(name, (np.int32(sequence.slot), self._admission(request, sequence)))

    def prefill(self, chunk: Chunk) -> slots.Outputs:
        """A chunk of a prompt; behind the last one comes the first token."""
        sequence, tokens = chunk.sequence, np.zeros((1, chunk.size), np.int32)
        tokens[0, : chunk.count] = sequence.context[chunk.begin : chunk.begin + chunk.count]
        count, last = np.array([chunk.count], np.int32), np.array([chunk.last])
        forced = np.array([sequence.root], np.int32)
        return self._call("prefill", (*self._rows([sequence], 1), tokens, count, last, forced))

    def replay(self, name: str, arrays: list[np.ndarray]) -> None:
        """A call that the leader has sent: its name, and its host arrays in order."""
        self._enqueue(name, jax.tree.unflatten(self._structures[name], arrays))

    def has_lost(self, seconds: float) -> bool:
        """Whether a process with some of the devices is gone, or soon found to be."""
        return self._leader is not None and self._leader.has_lost(seconds)

    def _call(self, name: str, arrays: tuple) -> Any:
        if self._leader is not None:
            self._leader.send(name, jax.tree.leaves(arrays))
        return self._enqueue(name, arrays)

    def _enqueue(self, name: str, arrays: tuple) -> Any:
        """Runs a program on the slots; returns its outputs, None if it has none."""
        function, first = self._functions[name]
        result = function(*first, self._slots, *self._put(arrays))
        self._slots, outputs = result if isinstance(result, tuple) else (result, None)
        return outputs

    def _put(self, arrays: Any) -> Any:
        """Host arrays on all devices of the mesh."""
        whole = self._whole
        if whole is None or whole.is_fully_addressable:
            return jax.device_put(arrays, whole)
        # `device_put` would have the processes compare the values, at every call.
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(np.shape(x), whole, lambda i: np.asarray(x)[i]),
            arrays,
        )

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
        samples = self._samples()
        self._structures = {name: jax.tree.structure(arrays) for _, name, arrays in samples}
        with ThreadPoolExecutor(_COMPILERS) as pool:  # compilers run beside the tracing of the next
            compiled = [pool.submit(self._compile, name, arrays) for _, name, arrays in samples]
            for (label, name, arrays), future in zip(samples, compiled, strict=True):
                seconds = future.result()
                begin = time.perf_counter()
                self._enqueue(name, arrays)
                jax.block_until_ready(self._slots)
                yield label, seconds + time.perf_counter() - begin
        self._thread = threading.current_thread()

    def _compile(self, name: str, arrays: tuple) -> float:
        begin = time.perf_counter()
        function, first = self._functions[name]
        function.lower(*first, self._slots, *self._put(arrays)).compile()
        return time.perf_counter() - begin

    def _samples(self) -> list[tuple[str, str, tuple]]:
        """A label, name and host arrays of every call that `step` can make."""

        def admit(params: SamplingParams) -> tuple:
            request = Request("warm-up", (0,), params, max_tokens=1)
            return np.int32(self._idle), self._admission(request, Sequence("", (0,), 1))

        def prefill(size: int) -> tuple:
            tokens = np.zeros((1, size), np.int32), np.zeros(1, np.int32), np.zeros(1, bool)
            return *self._rows([], 1), *tokens, np.zeros(1, np.int32)

        # First, and plain last: the decode calls then end what was admitted to the idle slot.
        own, none = SamplingParams(presence_penalty=1.0), SamplingParams()
        samples: list[tuple[str, str, tuple]] = [
            (name, name, admit(params))
            for name, params in (("admit with controls", own), ("admit", none))
        ]
        samples += [
            (f"decode {rows} x {tree}", f"decode {tree}", self._rows([], rows))
            for rows, tree in self._config.programs.pairs
        ]
        samples += [(f"prefill {n}", "prefill", prefill(n)) for n in self._config.chunk_sizes]
        if self.sync_length is not None:
            sizes = sorted({1, self._idle})
            samples += [(f"catch up {n}", "catch up", self._rows([], n)) for n in sizes]
        return samples

    def _on_compile(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT and threading.current_thread() is self._thread:
            self.compilations += 1
