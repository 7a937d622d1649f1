"""One request and its answer on the wire, with a client that may be slow or go away.

A body is read within a size and a time, an answer is written within a time, and when the client
goes away whatever works for it is cancelled at once.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError
from .request import Delta

Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Deltas(Protocol):
    """What the service gives for each request."""

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def aclose(self) -> None:
        """Ends the request if it still runs, and frees its pages."""
        ...


async def read_body(request: HttpRequest, limit: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
      ApiError: 413, it has more than `limit` bytes (reading stops there); 408, it took longer than
        `seconds`; 400, its length is no number.
      ClientGone: the connection was closed.
    """
    too_long = ApiError(413, f"the body has more than {limit} bytes, expected {limit} at most")
    if (length := request.headers.get("content-length", "0")).isdecimal() and int(length) > limit:
        raise too_long
    content = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                content += message.get("body", b"")
                if len(content) > limit:
                    raise too_long
                if not message.get("more_body", False):
                    return bytes(content)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds") from None


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Runs `work` as long as the client is there.

    Raises:
      ClientGone: it went away first; `work` has been cancelled and has ended.
    """

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class Merged:
    """The deltas of several requests in the order in which they come, as (request, delta).

    At most one delta of each request waits here: a slow reader slows down nothing else, and what it
    has not read yet stays with the service. Leaving the `async with` block ends all requests.
    """

    def __init__(self, iterators: Sequence[Deltas]):
        """Starts listening; `aclose` has to follow whatever happens."""
        self._iterators, self._running = iterators, len(iterators)
        self._queue: asyncio.Queue[tuple[int, Delta | BaseException | None]]
        self._queue = asyncio.Queue(len(iterators))
        self._tasks = [asyncio.create_task(self._pump(i, it)) for i, it in enumerate(iterators)]

    async def _pump(self, index: int, iterator: Deltas) -> None:
        last = None
        try:
            async for delta in iterator:
                await self._queue.put((index, delta))
        except Exception as error:  # told to the one who reads
            last = error
        await self._queue.put((index, last))

    async def __aenter__(self) -> "Merged":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> "Merged":
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        while self._running:
            index, item = await self._queue.get()
            if isinstance(item, Delta):
                return index, item
            if item is not None:
                raise item
            self._running -= 1
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Ends what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for iterator in self._iterators:
            await iterator.aclose()


class EventStream(Response):
    """Server-sent events, each the JSON of an object; ends with `data: [DONE]`."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[dict[str, Any], None], deltas: Merged, patience: float
    ):
        """`deltas` is closed when the stream ends, whatever ends it. A client that leaves the
        stream unread for `patience` seconds is cut off."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._deltas, self._patience = events, deltas, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        try:
            await while_connected(receive, self._write(send))
        except ClientGone:
            pass  # nobody is left to tell
        except _Unread:
            scope["state"]["cut_off"]()
        finally:
            await self._events.aclose()
            await self._deltas.aclose()

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._put(send, start)
        async for event in self._events:
            text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
            await self._put(send, _body(f"data: {text}\n\n"))
        await self._put(send, _body("data: [DONE]\n\n"))
        await self._put(send, _body("", more=False))

    async def _put(self, send: Send, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await send(message)
        except TimeoutError:
            raise _Unread from None


class _Unread(Exception):
    """The client does not read."""


def _body(text: str, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}
