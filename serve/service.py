"""The engines as the event loop sees them: requests in, streams of deltas out.

There may be several replicas of one engine (data parallelism), each with devices, slots and pages
of its own. A request goes to the replica with the fewest sequences, and stays there with all its
choices, which share the pages of their prompt. Seeds make its text the same on each.

A stream holds at most the deltas of its request, which `max_tokens` bounds.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from jax_eagle.tokenizer import Tokenizer

from .engine import Engine
from .replica import Batch, Replica
from .request import Delta, Draining, EngineStatus, QueueFull, Request


class Stream(AsyncIterator[Delta]):
    """The deltas of one request; `aclose` ends the request if it still runs."""

    def __init__(self, service: "Service", request: Request, engine: int):
        """Made by `Service.submit`; `engine` is the number of the replica that runs it."""
        self._service, self.request, self.engine = service, request, engine
        self._deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self._over = False

    async def __anext__(self) -> Delta:
        if self._over:
            raise StopAsyncIteration
        delta = await self._deltas.get()
        self._over = delta.finish_reason is not None
        return delta

    async def aclose(self) -> None:
        """Frees what the request holds; nothing more is delivered."""
        self._over = True
        self._service.abort(self.request.id)

    def put(self, delta: Delta) -> None:
        """Called in the loop."""
        self._deltas.put_nowait(delta)


class Service:
    """Runs engines for an asyncio application. All methods are the loop's."""

    def __init__(
        self,
        engines: Sequence[Engine],
        tokenizer: Tokenizer,
        *,
        max_queued_requests: int | None = None,
        max_queued_tokens: int | None = None,
        on_program: Callable[[str, float], None] = lambda name, seconds: None,
    ):
        """
        Args:
          engines: one or several, of one model and one configuration.
          max_queued_requests: sequences that wait or run at most.
          max_queued_tokens: prompt tokens of sequences without their first token, at most.
          on_program: hears of each compiled program and its seconds, in an engine's thread.
        """
        first = engines[0]
        self.tokenizer = tokenizer
        self.max_model_len = first.config.max_model_len
        self.vocab_size = first.vocab_size
        self.stop_token_ids = first.stop_token_ids
        self.trees = first.config.programs.trees
        self._replicas = [
            Replica(
                engine,
                on_program=on_program,
                on_deltas=self._distribute,
                on_failure=self.fail,
            )
            for engine in engines
        ]
        self._check = first.check
        self._max_requests, self._max_tokens = max_queued_requests, max_queued_tokens
        self._streams: dict[str, Stream] = {}
        self._waiting_tokens: dict[str, int] = {}
        self._seconds = 1.0
        """Of a request on average, lately."""
        self._warm = self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.failed = asyncio.Event()
        """Set when an engine's thread has died: nothing will be answered any more."""

    @property
    def ready(self) -> bool:
        """Whether requests are taken: warm, not draining, not failed."""
        return self._warm and not self._draining and not self.failed.is_set()

    async def start(self) -> None:
        """Compiles everything; returns when all are warm, raises what kept one from that."""
        await asyncio.gather(*(replica.start() for replica in self._replicas))
        self._warm = True

    def submit(self, requests: Sequence[Request]) -> list[Stream]:
        """Queues requests, all of them or none.

        Raises:
          ValueError: a request that this engine or this queue can never take.
          QueueFull: too much is queued.
          Draining: the service is about to end, or not warm yet.
        """
        if not self.ready:
            raise Draining
        for request in requests:
            self._check(request)
        tokens = sum(len(request.prompt) for request in requests)
        limits = (
            (self._max_requests, len(self._streams), len(requests)),
            (self._max_tokens, sum(self._waiting_tokens.values()), tokens),
        )
        for limit, _, more in limits:
            if limit is not None and more > limit:
                raise ValueError(f"the request alone is {more} of at most {limit} that may queue")
        for limit, queued, more in limits:
            if limit is not None and queued + more > limit:
                raise QueueFull(retry_after=max(1.0, self._seconds))
        engine = self._least_busy()
        streams = [Stream(self, request, engine) for request in requests]
        for stream in streams:
            request = stream.request
            self._streams[request.id] = stream
            self._waiting_tokens[request.id] = len(request.prompt)
        self._idle.clear()
        self._replicas[engine].add(list(requests))
        return streams

    def _least_busy(self) -> int:
        """The replica with the fewest sequences that wait or run, the first of them."""
        busy = Counter(stream.engine for stream in self._streams.values())
        return min(range(len(self._replicas)), key=lambda engine: busy[engine])

    def abort(self, request_id: str) -> None:
        """Ends a request, if it runs; its stream gets the last delta unless it was closed."""
        if stream := self._streams.get(request_id):
            self._replicas[stream.engine].abort(request_id)

    def statuses(self) -> list[EngineStatus]:
        """A recent snapshot of each replica."""
        return [replica.status for replica in self._replicas]

    def forget_prefixes(self) -> None:
        """Empties the prefix caches."""
        for replica in self._replicas:
            replica.forget_prefixes()

    async def drain(self, timeout: float) -> None:
        """Takes no more requests, waits for the running ones, ends what is left at the time-out."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            for request_id in list(self._streams):
                self.abort(request_id)
            if not self.failed.is_set():
                await self._idle.wait()
        await asyncio.gather(*(replica.stop() for replica in self._replicas))

    def fail(self) -> None:
        """Ends all streams: nothing will be answered any more."""
        self.failed.set()
        last = Delta("", (), finish_reason="error")
        self._distribute([(request_id, last) for request_id in list(self._streams)])

    def _distribute(self, batch: Batch) -> None:
        for request_id, delta in batch:
            stream = self._streams.get(request_id)
            if stream is None:  # it has been told that all is over
                continue
            self._waiting_tokens.pop(request_id, None)
            if delta.finish_reason is not None:
                del self._streams[request_id]
                if delta.stats is not None:
                    stats = delta.stats
                    taken = stats.queue_seconds + stats.prefill_seconds + stats.decode_seconds
                    self._seconds += 0.1 * (taken - self._seconds)
            stream.put(delta)
        if not self._streams:
            self._idle.set()
