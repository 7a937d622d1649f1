"""The engine: the one border between host and device.

A step plans (`Scheduler.step`), enqueues the planned calls, and only then reads the results of the
calls before them. So the device works on call t + 1 while the host reads, detokenises and plans;
what a call must know of the one before it (last tokens, lengths, who is done) is on the device. A
sequence that has ended is noticed one call late: its rows in that call do nothing.

Host and device exchange arrays by explicit transfers alone. Every program is compiled by `warm_up`.
"""

import dataclasses
import functools
import operator
import time
from collections import Counter, deque
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
from jax_eagle.state import FINISH_REASONS, Plan
from jax_eagle.tree import StaticTree, parse_tree

from .dispatch import PLAIN, Programs
from .pages import PagePool
from .request import Delta, EngineStatus, Request, RequestStats, TokenLogprob
from .scheduler import Chunk, Decode, Scheduler, Sequence
from .statistics import Statistics, by_index
from .text import TextStream

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


@dataclasses.dataclass
class _Live:
    """A request in the engine, with what only the engine knows of it."""

    request: Request
    sequence: Sequence
    text: TextStream
    deliver: Callable[[Delta], None]
    arrived: float
    admitted: float = 0.0
    first: float = 0.0
    rounds: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted: Counter[int] = dataclasses.field(default_factory=Counter)
    """Draft tokens, by depth from 0 for the root's children."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call under way: who has which row in it, and where its results will be."""

    rows: list[tuple[_Live, int]]
    """With the epoch in which the call was enqueued."""
    tree: str | None
    """None: a prefill call."""
    resumed: bool
    """The token it gives is known already."""
    outputs: slots.Outputs


class Engine:
    """Runs requests. Not thread-safe: one thread calls everything but the constructor."""

    def __init__(self, target: Target, draft: Draft | None, config: EngineConfig):
        """Allocates the cache and the slots; `warm_up` comes next."""
        self.config = config
        self._tokenizer = target.tokenizer
        self._target, self._draft = target.replace(tokenizer=None), draft
        self._head = draft.bind_head(target) if draft is not None else None
        self.vocab_size = target.config.vocab_size
        self.stop_token_ids = target.config.stop_token_ids
        programs = config.programs
        if draft is None and programs.trees != (PLAIN,):
            raise ValueError("trees need a draft: give one, or the plain ladder")
        self._plans = {
            name: Plan(StaticTree(()) if name == PLAIN else parse_tree(name))
            for name in programs.trees
        }
        depths = {name: plan.shape.max_depth for name, plan in self._plans.items()}
        path_length = max(depths.values()) + 1
        sync_length = max(path_length, _BACKLOG)
        self._num_slots = programs.buckets[-1]
        self._table_width = -(-config.max_model_len // config.page_size)
        self._slots = slots.init_slots(
            self._target,
            draft,
            num_slots=self._num_slots,
            num_pages=config.num_pages,
            page_size=config.page_size,
            max_tokens=config.max_model_len,
            path_length=path_length,
            sync_length=sync_length,
            num_stop_ids=MAX_STOP_IDS,
        )
        self.pool = PagePool(
            config.num_pages, config.page_size, prefix_caching=config.prefix_caching
        )
        self.scheduler = Scheduler(
            self.pool,
            programs,
            depths,
            chunk_sizes=config.chunk_sizes,
            tokens_per_step=config.tokens_per_step,
            sync_length=sync_length if draft is not None else 2**30,
        )
        self._live: dict[str, _Live] = {}
        self._calls: deque[_Call] = deque()
        self.statistics = Statistics()
        self._compilations = 0
        self._warm = False
        jax.monitoring.register_event_duration_secs_listener(self._on_compile)

    # ---- requests ------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raises ValueError if the request can never run here. Safe from any thread."""
        config, total = self.config, len(request.prompt) + request.max_tokens
        room = min(config.max_model_len, (config.num_pages - 1) * config.page_size)
        if not request.prompt or request.max_tokens < 1 or total > room:
            raise ValueError(
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} new ones, expected "
                f"at least one of each and {room} in all at most"
            )
        if request.tree is not None and request.tree not in self._plans:
            raise ValueError(
                f"tree {request.tree!r} is not compiled: expected one of {', '.join(self._plans)}"
            )
        if len(request.stop_token_ids) > MAX_STOP_IDS:
            raise ValueError(f"{len(request.stop_token_ids)} stop tokens, at most {MAX_STOP_IDS}")
        for token in (*request.prompt, *request.stop_token_ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is outside 0..{self.vocab_size - 1}")
        request.sampling.check_tokens(self.vocab_size)

    def add(self, request: Request, deliver: Callable[[Delta], None]) -> None:
        """Queues a request that passes `check`; `deliver` gets its deltas, in this thread."""
        self.check(request)
        sequence = Sequence(
            request.id,
            request.prompt,
            request.max_tokens,
            priority=request.priority,
            tree=request.tree,
            salt=request.cache_salt,
        )
        self.scheduler.add(sequence)
        text = TextStream(
            self._tokenizer,
            request.stop,
            include_stop=request.include_stop,
            skip_special_tokens=request.skip_special_tokens,
            min_tokens=request.sampling.min_tokens,
        )
        self._live[request.id] = _Live(request, sequence, text, deliver, time.monotonic())

    def abort(self, request_id: str, reason: str = "abort") -> None:
        """Ends a request; its pages are free for the next step. Nothing if it is not there."""
        live = self._live.get(request_id)
        if live is not None:
            self._end(live, reason, Delta(live.text.finish(), ()))

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._live or self._calls)

    @property
    def status(self) -> EngineStatus:
        """Gauges and totals."""
        return self.statistics.status(self.scheduler, self._compilations)

    # ---- a step --------------------------------------------------------------------------------

    def step(self) -> None:
        """Enqueues the next calls, then reads the results of those before."""
        begin = time.perf_counter()
        self._expire()
        plan = self.scheduler.step()
        earlier = len(self._calls)
        for decode in plan.decodes:
            self._enqueue_decode(decode)
        for sequence in plan.admitted:
            self._enqueue_admission(self._live[sequence.id])
        for chunk in plan.chunks:
            self._enqueue_chunk(chunk)
        waited = sum(self._read(self._calls.popleft()) for _ in range(earlier))
        self.statistics.count_step(time.perf_counter() - begin, waited)

    def _expire(self) -> None:
        now = time.monotonic()
        late = [
            live
            for live in self._live.values()
            if live.request.timeout is not None and now - live.arrived > live.request.timeout
        ]
        for live in late:
            self.abort(live.request.id, "timeout")

    def _enqueue_decode(self, decode: Decode) -> None:
        if decode.catch_up:
            self._enqueue_catch_up(decode.catch_up)
        rows, table = self._rows(decode.sequences, decode.rows)
        self._slots, outputs = slots.decode(
            self._target, self._draft, self._head, self._plans[decode.tree],
            self._slots, *jax.device_put((rows, table)),
        )  # fmt: skip
        self._launched(decode.sequences, decode.tree, False, outputs)

    def _enqueue_catch_up(self, sequences: list[Sequence]) -> None:
        size = 1 if len(sequences) == 1 else self._num_slots
        self._slots = slots.catch_up(
            self._target, self._draft, self._slots,
            *jax.device_put(self._rows(sequences, size)),
        )  # fmt: skip

    def _enqueue_admission(self, live: _Live) -> None:
        live.admitted = live.admitted or time.monotonic()
        new = self._admission(live.request, live.sequence)
        slot = np.int32(live.sequence.slot)
        self._slots = slots.admit(self._slots, *jax.device_put((slot, new)))

    def _admission(self, request: Request, sequence: Sequence) -> slots.Admission:
        stop_ids = np.full(MAX_STOP_IDS, -1, np.int32)
        stop_ids[: len(request.stop_token_ids)] = request.stop_token_ids
        given = sequence.output[:-1]
        tokens = np.zeros(self.config.max_model_len, np.int32)
        tokens[: len(given)] = given
        controls = None
        if uses_controls(request.sampling):
            controls = Row.of(request.sampling, self.vocab_size, request.prompt, given)
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

    def _enqueue_chunk(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        tokens = np.zeros((1, chunk.size), np.int32)
        tokens[0, : chunk.count] = sequence.context[chunk.begin : chunk.begin + chunk.count]
        rows, table = self._rows([sequence], 1)
        self._slots, outputs = slots.prefill(
            self._target, self._draft, self._slots,
            *jax.device_put((
                rows, table, tokens, np.array([chunk.count], np.int32), np.array([chunk.last]),
                np.array([sequence.root], np.int32),
            )),
        )  # fmt: skip
        if chunk.last:
            self._launched([sequence], None, sequence.root >= 0, outputs)

    def _rows(self, sequences: list[Sequence], size: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots and page tables of a call; rows that nobody needs are those of the idle slot."""
        rows = np.full(size, self._num_slots, np.int32)
        table = np.zeros((size, self._table_width), np.int32)
        for i, sequence in enumerate(sequences):
            rows[i] = sequence.slot
            table[i, : len(sequence.pages)] = sequence.pages
        return rows, table

    def _launched(self, sequences, tree: str | None, resumed: bool, outputs: slots.Outputs) -> None:
        rows = [(self._live[s.id], s.epoch) for s in sequences]
        if not any(live.request.logprobs is not None for live, _ in rows):
            outputs = outputs.replace(logprobs=None)
        for leaf in jax.tree.leaves(outputs):
            leaf.copy_to_host_async()
        self._calls.append(_Call(rows, tree, resumed, outputs))

    # ---- results -------------------------------------------------------------------------------

    def _read(self, call: _Call) -> float:
        """Takes in the results of a call; returns the seconds spent waiting for them."""
        begin = time.perf_counter()
        outputs = jax.device_get(call.outputs)
        waited = time.perf_counter() - begin
        for i, (live, epoch) in enumerate(call.rows):
            if live.sequence.epoch == epoch:
                self._take(live, call, jax.tree.map(operator.itemgetter(i), outputs))
        return waited

    def _take(self, live: _Live, call: _Call, row: slots.Outputs) -> None:
        """One sequence's share of a call."""
        count = 0 if call.resumed else int(row.count)
        tokens, length = row.tokens[:count].tolist(), int(row.length)
        if call.tree is not None:
            self._count_round(live, call.tree, row, count)
        self.scheduler.read(live.sequence, tokens, length)
        self.scheduler.written(live.sequence, min(length, int(row.draft_length)))
        reason = FINISH_REASONS[int(row.finish)]
        if not count and not reason:
            return
        if not live.first:
            live.first = time.monotonic()
            self.statistics.prompt_tokens += len(live.request.prompt)
        text, used = live.text.push(tokens)
        stop_reason: int | str | None = live.text.stopped_by
        if stop_reason is not None:
            reason, tokens = "stop", tokens[:used]
            del live.sequence.output[len(live.sequence.output) - count + used :]
        elif reason:
            text += live.text.finish()
            own = reason != "stop" or tokens[-1] in self.stop_token_ids
            stop_reason = None if own else tokens[-1]
        self.statistics.generation_tokens += len(tokens)
        delta = Delta(text, tuple(tokens), _logprobs(live.request, row, len(tokens)))
        if reason:
            self._end(live, reason, delta, stop_reason)
        else:
            live.deliver(delta)

    def _count_round(self, live: _Live, tree: str, row: slots.Outputs, count: int) -> None:
        """Statistics of one target call; what a limit or stop token cut off was not accepted."""
        accepted = min(int(row.num_accepted), count)
        drafted = self._plans[tree].shape.num_nodes - 1
        ranks = row.path_ranks[1 : accepted + 1].tolist()
        live.rounds += 1
        if drafted:
            live.drafts += 1
            live.draft_tokens += drafted
            live.accepted.update(range(accepted))
        self.statistics.count_round(tree, drafted, ranks)

    def _end(
        self, live: _Live, reason: str, last: Delta, stop_reason: int | str | None = None
    ) -> None:
        """Takes a request out and delivers its last delta."""
        sequence = live.sequence
        known = min(sequence.length, len(sequence.prompt) + len(sequence.output))
        if known // self.config.page_size > sequence.registered and sequence.decoding:
            if self._draft is not None:  # its last pairs have not been through the draft
                self._enqueue_catch_up([sequence])
            self.scheduler.written(sequence, known)
        self.scheduler.finish(sequence)
        del self._live[live.request.id]
        now = time.monotonic()
        started = live.admitted or now
        first = live.first or now
        stats = RequestStats(
            prompt_tokens=len(live.request.prompt),
            cached_tokens=sequence.cached,
            new_tokens=len(sequence.output),
            rounds=live.rounds,
            drafts=live.drafts,
            draft_tokens=live.draft_tokens,
            accepted_by_depth=by_index(live.accepted),
            queue_seconds=started - live.arrived,
            prefill_seconds=first - started,
            decode_seconds=now - first,
            preemptions=sequence.preemptions,
        )
        live.deliver(
            dataclasses.replace(last, finish_reason=reason, stop_reason=stop_reason, stats=stats)
        )

    # ---- compilation ---------------------------------------------------------------------------

    def warm_up(self) -> Iterator[tuple[str, float]]:
        """Compiles every program, or loads it from the compilation cache; yields name and seconds.

        Each is run once on the idle slot, so nothing is left to do at its first use.
        """
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
            return target, draft, head, self._plans[tree], state, *put(self._rows([], rows))

        def prefill(size, state):
            tokens = np.zeros((1, size), np.int32), np.zeros(1, np.int32), np.zeros(1, bool)
            return target, draft, state, *put((*self._rows([], 1), *tokens, np.zeros(1, np.int32)))

        def admit(params, state):
            request = Request("warm-up", (0,), params, max_tokens=1)
            slot = np.int32(self._num_slots)
            return state, *put((slot, self._admission(request, Sequence("", (0,), 1))))

        programs: list = [
            (f"decode {rows} x {tree}", slots.decode, functools.partial(decode, tree, rows))
            for rows, tree in self.config.programs.pairs
        ]
        programs += [
            (f"prefill {size}", slots.prefill, functools.partial(prefill, size))
            for size in self.config.chunk_sizes
        ]
        if draft is not None:
            programs += [
                (
                    f"catch up {rows}",
                    slots.catch_up,
                    lambda state, rows=rows: (target, draft, state, *put(self._rows([], rows))),
                )
                for rows in sorted({1, self._num_slots})
            ]
        plain, controlled = SamplingParams(), SamplingParams(presence_penalty=1.0)
        programs += [
            ("admit", slots.admit, functools.partial(admit, plain)),
            ("admit with controls", slots.admit, functools.partial(admit, controlled)),
        ]
        return programs

    def _on_compile(self, event: str, duration_secs: float, **_: Any) -> None:
        if self._warm and event == _COMPILE_EVENT:
            self._compilations += 1


def _logprobs(request: Request, row: slots.Outputs, count: int) -> tuple[TokenLogprob, ...] | None:
    if request.logprobs is None:
        return None
    own = row.logprobs
    return tuple(
        TokenLogprob(
            float(own.chosen[i]),
            tuple(zip(own.top_tokens[i].tolist(), own.top[i].tolist(), strict=True))[
                : request.logprobs
            ],
        )
        for i in range(count)
    )
