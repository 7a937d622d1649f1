"""The engine as the event loop sees it: requests in, streams of deltas out.

The engine runs in a thread of its own. Commands (new requests, aborts) go to it through one inbox;
deltas come back in one batch a step, so the loop wakes once for all sequences. Detokenisation and
bookkeeping thus happen in the engine's thread while the device works, HTTP in the loop's.

A stream holds at most the deltas of its request, which `max_tokens` bounds.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from jax_eagle.tokenizer import Tokenizer

from .engine import Engine
from .request import Delta, Draining, EngineStatus, QueueFull, Request

_log = logging.getLogger(__name__)
_STATUS_SECONDS = 0.25
"""Between two snapshots of the engine's status while it runs."""


class Stream(AsyncIterator[Delta]):
    """The deltas of one request; `aclose` ends the request if it still runs."""

    def __init__(self, service: "Service", request: Request):
        """Made by `Service.submit`."""
        self._service, self.request = service, request
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
    """Runs an engine for an asyncio application. All methods are the loop's."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        max_queued_requests: int | None = None,
        max_queued_tokens: int | None = None,
        on_program: Callable[[str, float], None] = lambda name, seconds: None,
    ):
        """
        Args:
          max_queued_requests: sequences that wait or run at most.
          max_queued_tokens: prompt tokens of sequences without their first token, at most.
          on_program: hears of each compiled program and its seconds, in the engine's thread.
        """
        self.tokenizer = tokenizer
        self.max_model_len = engine.config.max_model_len
        self.vocab_size = engine.vocab_size
        self.stop_token_ids = engine.stop_token_ids
        self.trees = engine.config.programs.trees
        self._engine, self._on_program = engine, on_program
        self._max_requests, self._max_tokens = max_queued_requests, max_queued_tokens
        self._streams: dict[str, Stream] = {}
        self._waiting_tokens: dict[str, int] = {}
        self._seconds = 1.0
        """Of a request on average, lately."""
        self._inbox: list[Callable[[], Any]] = []
        self._wake = threading.Condition()
        self._outbox: list[tuple[str, Delta]] = []
        self._status, self._published = EngineStatus(), 0.0
        self._warm = self._draining = self._stopped = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.failed = asyncio.Event()
        """Set when the engine's thread has died: nothing will be answered any more."""
        self._thread: threading.Thread | None = None

    # ---- the loop's side -----------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether requests are taken: warm, not draining, not failed."""
        return self._warm and not self._draining and not self._stopped

    async def start(self) -> None:
        """Compiles everything; returns when the engine is warm, raises what kept it from that."""
        loop = asyncio.get_running_loop()
        warm: asyncio.Future[None] = loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(loop, warm), name="engine", daemon=True
        )
        self._thread.start()
        await warm
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
            self._engine.check(request)
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
        streams = [Stream(self, request) for request in requests]
        for stream in streams:
            request = stream.request
            self._streams[request.id] = stream
            self._waiting_tokens[request.id] = len(request.prompt)
        self._idle.clear()
        self._send(lambda: [self._add(request) for request in requests])
        return streams

    def abort(self, request_id: str) -> None:
        """Ends a request, if it runs; its stream gets the last delta unless it was closed."""
        if request_id in self._streams:
            self._send(lambda: self._engine.abort(request_id))

    def status(self) -> EngineStatus:
        """A recent snapshot."""
        return self._status

    def forget_prefixes(self) -> None:
        """Empties the prefix cache."""
        self._send(self._engine.pool.forget)

    async def drain(self, timeout: float) -> None:
        """Takes no more requests, waits for the running ones, ends what is left at the time-out."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            for request_id in list(self._streams):
                self.abort(request_id)
            if not self._stopped:
                await self._idle.wait()
        self._send(self._stop)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _send(self, command: Callable[[], Any]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _distribute(self, batch: list[tuple[str, Delta]]) -> None:
        for request_id, delta in batch:
            stream = self._streams[request_id]
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

    # ---- the engine's side ---------------------------------------------------------------------

    def _run(self, loop: asyncio.AbstractEventLoop, warm: asyncio.Future) -> None:
        try:
            for name, seconds in self._engine.warm_up():
                self._on_program(name, seconds)
        except BaseException as error:
            loop.call_soon_threadsafe(warm.set_exception, error)
            return
        self._status = self._engine.status
        loop.call_soon_threadsafe(warm.set_result, None)
        try:
            while not self._stopped:
                self._iterate(loop)
        except Exception:
            _log.exception("the engine failed")
            self._stopped = True
            loop.call_soon_threadsafe(self._fail)

    def _iterate(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._wake:
            while not self._inbox and not self._engine.busy:
                self._wake.wait()
            commands, self._inbox = self._inbox, []
        for command in commands:
            command()
        if self._engine.busy:
            self._engine.step()
        now = time.monotonic()
        if not self._engine.busy or now - self._published > _STATUS_SECONDS:
            self._status, self._published = self._engine.status, now
        if self._outbox:
            batch, self._outbox = self._outbox, []
            loop.call_soon_threadsafe(self._distribute, batch)

    def _add(self, request: Request) -> None:
        self._engine.add(request, lambda delta: self._outbox.append((request.id, delta)))

    def _stop(self) -> None:
        self._stopped = True

    def _fail(self) -> None:
        """Ends all streams after the engine's thread has died."""
        self.failed.set()
        last = Delta("", (), finish_reason="error")
        self._distribute([(request_id, last) for request_id in list(self._streams)])
