"""A server from its first breath to its last.

The socket listens at once, so that /health says 503 while the model loads; requests are taken when
everything is compiled. SIGTERM and SIGINT drain: no new requests, the running ones get
`shutdown_timeout` seconds, a second signal gives them none. Then the process ends with code 0, or
with 1 if an engine does not come to its end. Of several processes the first one lives like this,
and the end of any is the end of all.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import uvicorn

from . import log
from .api import Api
from .config import ServerConfig
from .connection import MAX_HEADER_BYTES, Connection
from .group import Leader, Lost
from .log import LoadLine
from .request import together

FLUSH_SECONDS = 5
"""What clients get at the end to read answers that are finished."""
STUCK_SECONDS = 60
"""What an engine gets to end its last call, before a device or a process counts as frozen."""


class _Uvicorn(uvicorn.Server):
    """uvicorn, with the signals left to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Ending:
    """What may end a server: the first signal asks to stop, the second one to hurry."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        self._loss: asyncio.Future[str] = self._loop.create_future()
        self.leader: Leader | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._receive)

    def lead(self, config: ServerConfig) -> Leader | None:
        """Forms the group of processes, if there are several; in another thread."""
        if config.nnodes > 1:
            self.leader = Leader(
                config,
                on_word=lambda word: self._loop.call_soon_threadsafe(self._hear, word),
                on_loss=lambda reason: self._loop.call_soon_threadsafe(self._lose, reason),
            )
        return self.leader

    async def first(self, task: asyncio.Task[Any], event: asyncio.Event) -> bool:
        """Whether `task` ended before `event` was set; its error is raised.

        Raises:
          Lost: a process is gone.
        """
        waiting = asyncio.create_task(event.wait())
        await asyncio.wait({task, waiting, self._loss}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._loss.done():
            raise Lost(self._loss.result())
        if task.done():
            task.result()
        return task.done()

    def _receive(self) -> None:
        self._hear("hurry" if self.stop.is_set() else "stop")

    def _hear(self, word: str) -> None:
        (self.hurry if word == "hurry" else self.stop).set()

    def _lose(self, reason: str) -> None:
        if not self._loss.done():
            self._loss.set_result(reason)


Load = Callable[[ServerConfig, Api, Ending], None]


async def run(config: ServerConfig, load: Load) -> None:
    """Serves until a signal.

    Args:
      load: loads the model, beside the event loop, and attaches its service to the `Api`.

    Raises:
      OSError: the address cannot be listened on.
      Exception: whatever kept the service from starting.
    """
    log.set_up(config.log_format, config.uvicorn_log_level)
    ending, api = Ending(), Api(config)
    with _listen(config) as listener:
        http = _Uvicorn(_settings(config, api))
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        log.event("listening", address=_address(config, listener), model=config.model)
        tasks: set[asyncio.Task[Any]] = {serving}
        try:
            tasks.add(starting := asyncio.create_task(_start(config, api, ending, load)))
            if await ending.first(starting, ending.stop):
                tasks.add(asyncio.create_task(_load_lines(api, config.log_stats_interval)))
                assert api.service is not None
                failure = asyncio.create_task(api.service.failed.wait())
                tasks.add(failure)
                if await ending.first(failure, ending.stop):
                    raise RuntimeError("the engine failed; its log line says why")
                await _drain(api, config.shutdown_timeout, ending)
            else:  # Nothing is lost, and a thread that compiles cannot be stopped.
                if ending.leader is not None:
                    ending.leader.close()
                log.event("stopped while loading")
                _leave(0)
        except Lost as error:
            log.event(str(error), level=logging.ERROR)
            if api.service is not None:
                api.service.fail()
            http.should_exit = True
            await asyncio.wait({serving})
            _leave(1)  # A thread that waits for that process cannot be stopped.
        finally:
            http.should_exit = True
            await asyncio.wait({serving})
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if ending.leader is not None:
                ending.leader.close()
    log.event("stopped")


def _leave(code: int) -> NoReturn:
    """Ends the process at once, whatever its threads do."""
    logging.shutdown()
    os._exit(code)


async def _start(config: ServerConfig, api: Api, ending: Ending, load: Load) -> None:
    begin = time.perf_counter()
    await asyncio.to_thread(load, config, api, ending)
    assert api.service is not None
    await api.service.start()
    log.event("ready", seconds=time.perf_counter() - begin, trees=",".join(api.service.trees))


async def _drain(api: Api, seconds: float, ending: Ending) -> None:
    assert api.service is not None
    log.event("draining", seconds=seconds)
    try:
        async with asyncio.timeout(seconds + STUCK_SECONDS):
            task = asyncio.create_task(api.service.drain(seconds))
            if await ending.first(task, ending.hurry):
                return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(STUCK_SECONDS):
            await ending.first(asyncio.create_task(api.service.drain(0)), asyncio.Event())
    except TimeoutError:
        raise Lost(f"an engine has not answered for {STUCK_SECONDS} seconds") from None


async def _load_lines(api: Api, seconds: float) -> None:
    """The line about load and speed, again and again."""
    assert api.service is not None
    line = LoadLine(together(api.service.statuses()))
    while seconds:
        await asyncio.sleep(seconds)
        line.write(together(api.service.statuses()))


def _settings(config: ServerConfig, api: Api) -> uvicorn.Config:
    return uvicorn.Config(
        api.app(),
        http=Connection,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=config.uvicorn_log_level,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=config.limit_concurrency,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )


def _listen(config: ServerConfig) -> socket.socket:
    if config.uds is None:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            return socket.create_server((config.host, config.port), family=family, backlog=2048)
        except OSError as error:
            place = f"{config.host} port {config.port}"
            raise OSError(f"cannot listen on {place}: {error.strerror or error}") from None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(config.uds)  # left over by a server that was killed
        listener.bind(config.uds)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {config.uds}: {error.strerror or error}") from None
    return listener


def _address(config: ServerConfig, listener: socket.socket) -> str:
    if config.uds is not None:
        return config.uds
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{listener.getsockname()[1]}"
