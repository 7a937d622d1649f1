"""One engine and its thread, as the event loop sees them: commands in, deltas out.

Commands (new requests, aborts) go to the engine through one inbox; deltas come back in one batch a
step, so the loop wakes once for all sequences. Detokenisation and bookkeeping thus happen in the
engine's thread while the device works, HTTP in the loop's.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from .engine import Engine
from .group import LOSS_SECONDS
from .request import Delta, EngineStatus, Request

_log = logging.getLogger(__name__)
_STATUS_SECONDS = 0.25
"""Between two snapshots of the engine's status while it runs."""

Batch = list[tuple[str, Delta]]


class Replica:
    """Runs an engine. All methods are the loop's."""

    def __init__(
        self,
        engine: Engine,
        *,
        on_program: Callable[[str, float], None],
        on_deltas: Callable[[Batch], None],
        on_failure: Callable[[], None],
    ):
        """
        Args:
          on_program: hears of each compiled program and its seconds, in the engine's thread.
          on_deltas: takes the deltas of a step, by request, in the loop.
          on_failure: hears that the engine's thread has died, in the loop.
        """
        self.engine = engine
        self.status = EngineStatus()
        """A recent snapshot."""
        self._on_program, self._on_deltas, self._on_failure = on_program, on_deltas, on_failure
        self._published = 0.0
        self._inbox: list[Callable[[], Any]] = []
        self._wake = threading.Condition()
        self._outbox: Batch = []
        self._stopped = False
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Compiles everything; returns when the engine is warm, raises what kept it from that."""
        loop = asyncio.get_running_loop()
        warm: asyncio.Future[None] = loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(loop, warm), name="engine", daemon=True
        )
        self._thread.start()
        await warm

    def add(self, requests: list[Request]) -> None:
        """Gives the engine requests that it can run."""
        self._send(lambda: [self._add(request) for request in requests])

    def abort(self, request_id: str) -> None:
        """Ends a request, if it runs; its last delta comes."""
        self._send(lambda: self.engine.abort(request_id))

    def forget_prefixes(self) -> None:
        """Empties the prefix cache."""
        self._send(self.engine.pool.forget)

    async def stop(self) -> None:
        """Ends the thread, which has nothing left to do."""
        self._send(self._stop)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _send(self, command: Callable[[], Any]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    # ---- the engine's side ---------------------------------------------------------------------

    def _run(self, loop: asyncio.AbstractEventLoop, warm: asyncio.Future) -> None:
        try:
            for name, seconds in self.engine.warm_up():
                self._on_program(name, seconds)
        except BaseException as error:
            self.engine.has_lost(LOSS_SECONDS)  # that would be the better reason
            loop.call_soon_threadsafe(warm.set_exception, error)
            return
        self.status = self.engine.status
        loop.call_soon_threadsafe(warm.set_result, None)
        try:
            while not self._stopped:
                self._iterate(loop)
        except Exception:
            if not self.engine.has_lost(LOSS_SECONDS):
                _log.exception("the engine failed")
            self._stopped = True
            loop.call_soon_threadsafe(self._on_failure)

    def _iterate(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._wake:
            while not self._inbox and not self.engine.busy:
                self._wake.wait()
            commands, self._inbox = self._inbox, []
        for command in commands:
            command()
        if self.engine.busy:
            self.engine.step()
        now = time.monotonic()
        if not self.engine.busy or now - self._published > _STATUS_SECONDS:
            self.status, self._published = self.engine.status, now
        if self._outbox:
            batch, self._outbox = self._outbox, []
            loop.call_soon_threadsafe(self._on_deltas, batch)

    def _add(self, request: Request) -> None:
        self.engine.add(request, lambda delta: self._outbox.append((request.id, delta)))

    def _stop(self) -> None:
        self._stopped = True
