"""The engine: requests in, deltas out, one step at a time.

A step plans (`Scheduler.step`), enqueues the planned calls, and only then reads the results of the
calls before them. So the device works on call t + 1 while the host reads, detokenises and plans;
what a call must know of the one before it (last tokens, lengths, who is done) is on the device. A
sequence that has ended is noticed one call late: its rows in that call do nothing.
"""

import dataclasses
import operator
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator

import jax

from jax_eagle import slots
from jax_eagle.draft import Draft
from jax_eagle.llama import Target
from jax_eagle.state import FINISH_REASONS

from .device import MAX_STOP_IDS, Device, EngineConfig
from .group import Leader
from .pages import PagePool
from .request import Delta, EngineStatus, Request, RequestStats, TokenLogprob
from .scheduler import Scheduler, Sequence
from .statistics import Statistics, by_index
from .text import TextStream


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

    def __init__(
        self,
        target: Target,
        draft: Draft | None,
        config: EngineConfig,
        leader: Leader | None = None,
    ):
        """Allocates the cache and the slots; `warm_up` comes next. Arguments: those of `Device`."""
        self.config = config
        self._tokenizer = target.tokenizer
        self.vocab_size = target.config.vocab_size
        self.stop_token_ids = target.config.stop_token_ids
        self._device = Device(target, draft, config, leader)
        self._plans = self._device.plans
        self.pool = PagePool(
            config.num_pages, config.page_size, prefix_caching=config.prefix_caching
        )
        self.scheduler = Scheduler(
            self.pool,
            config.programs,
            {name: plan.shape.max_depth for name, plan in self._plans.items()},
            chunk_sizes=config.chunk_sizes,
            tokens_per_step=config.tokens_per_step,
            sync_length=self._device.sync_length,
        )
        self._live: dict[str, _Live] = {}
        self._calls: deque[_Call] = deque()
        self.statistics = Statistics()

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
        named = (*request.prompt, *request.stop_token_ids)
        for token in (min(named), max(named)):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is outside 0..{self.vocab_size - 1}")
        sampling = request.sampling
        sampling.check_tokens(self.vocab_size)
        if sampling.allowed_token_ids is not None:
            never = {word[0] for word in sampling.bad_words if len(word) == 1}
            early = set(request.stop_token_ids) if sampling.min_tokens else set()
            if not set(sampling.allowed_token_ids) - never - early:
                raise ValueError(
                    "allowed_token_ids leaves no token: all of them are bad_words, or stop tokens "
                    "before min_tokens"
                )

    def add(self, request: Request, deliver: Callable[[Delta], None]) -> None:
        """Queues a request that passes `check`; `deliver` gets its deltas, in this thread."""
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

    def warm_up(self) -> Iterator[tuple[str, float]]:
        """Compiles every program, or loads it from the cache; yields names and seconds."""
        return self._device.warm_up()

    def has_lost(self, seconds: float) -> bool:
        """Whether a process with some of the devices is gone, or soon found to be."""
        return self._device.has_lost(seconds)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._live or self._calls)

    @property
    def status(self) -> EngineStatus:
        """Gauges and totals."""
        return self.statistics.status(self.scheduler, self._device.compilations)

    # ---- a step --------------------------------------------------------------------------------

    def step(self) -> None:
        """Enqueues the next calls, then reads the results of those before."""
        begin = time.perf_counter()
        self._expire()
        plan = self.scheduler.step()
        earlier = len(self._calls)
        for decode in plan.decodes:
            if decode.catch_up:
                self._device.catch_up(decode.catch_up)
            outputs = self._device.decode(decode.tree, decode.rows, decode.sequences)
            self._launched(decode.sequences, decode.tree, outputs)
        for sequence in plan.admitted:
            live = self._live[sequence.id]
            live.admitted = live.admitted or time.monotonic()
            self._device.admit(live.request, sequence)
        for chunk in plan.chunks:
            outputs = self._device.prefill(chunk)
            # Chunks before the last give nothing, but waiting for them keeps the device in reach.
            self._launched([chunk.sequence] if chunk.last else [], None, outputs)
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

    def _launched(
        self, sequences: list[Sequence], tree: str | None, outputs: slots.Outputs
    ) -> None:
        """Remembers a call whose results are to be read."""
        rows = [(self._live[s.id], s.epoch) for s in sequences]
        resumed = tree is None and any(s.root >= 0 for s in sequences)
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
            self._device.catch_up([sequence])  # its last pairs have not been through the draft
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
