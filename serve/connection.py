"""A client's connection: uvicorn's, with a limit on the time a request may take to arrive.

uvicorn waits for the first bytes of a request, and for the rest of its headers, as long as the
client likes. Here a connection that is not answering a request is closed after HEADER_SECONDS,
whatever trickles in meanwhile: half-open sockets, headers sent letter by letter, bodies that go on
after they were refused. What a client that does not read has not taken yet is dropped (`cut_off`).
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
MAX_HEADER_BYTES = 32 * 1024


class Connection(H11Protocol):
    """h11 on asyncio; h11 itself bounds the size of the headers."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "cut_off": transport.abort}
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._disarm()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Bytes arrived, or a pipelined request has its turn."""
        super().handle_events()
        if self._answering:
            self._disarm()
        elif self._deadline is None:
            self._arm()

    def on_response_complete(self) -> None:
        """An answer is out."""
        super().on_response_complete()
        if not self._answering and self._deadline is None:
            self._arm()

    @property
    def _answering(self) -> bool:
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._expire)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if not self._answering:
            self.transport.abort()
