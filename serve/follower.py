"""A process of a server other than the first: it has devices, and replays what the leader calls.

It ends when the leader says so. A signal to it is passed on to the leader, which then drains and
ends all processes.
"""

import contextlib
import logging
import os
import queue
import signal
import threading
import time
from typing import Any, NoReturn

import numpy as np

from . import group, log
from .config import ServerConfig
from .loading import load_device

Message = tuple[dict[str, Any], list[np.ndarray]]


def run(config: ServerConfig) -> None:
    """Follows the leader until it ends.

    Raises:
      OSError: the processes did not find each other.
      ValueError: flags that differ from the leader's, or files that cannot be used.
    """
    log.set_up(config.log_format, config.uvicorn_log_level)
    begin = time.perf_counter()
    leader = group.follow(config)
    log.event("following", leader=config.master_addr, process=config.node_rank)
    calls: queue.SimpleQueue[Message] = queue.SimpleQueue()
    started = threading.Event()
    threading.Thread(target=_listen, args=(leader, calls, started), daemon=True).start()

    words = iter(("stop", "hurry"))

    def pass_on(*_: object) -> None:  # by a thread: whatever the signal interrupts may be sending
        threading.Thread(target=_say, args=(leader, next(words, "hurry")), daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    try:
        device = load_device(config)
        for name, seconds in device.warm_up():
            log.event("compiled", program=name, seconds=seconds)
        started.set()
        log.event("ready to follow", seconds=time.perf_counter() - begin)
        while (call := calls.get())[0]["name"] != "end":
            device.replay(call[0]["name"], call[1])
    except RuntimeError:  # the other thread ends the process if the leader's end is the reason
        time.sleep(group.LOSS_SECONDS)
        raise
    log.event("stopped")


def _say(leader: group.Connection, word: str) -> None:
    with contextlib.suppress(OSError):
        leader.send(word)


def _listen(leader: group.Connection, calls: queue.SimpleQueue, started: threading.Event) -> None:
    """Hears the leader, also while the main thread computes or waits for a collective."""
    ending = False
    try:
        while True:
            message = leader.receive()
            ending = message[0]["name"] == "end"
            if ending and not started.is_set():
                log.event("stopped while loading")
                _leave(0)
            calls.put(message)
    except OSError as error:
        if ending:
            _leave(0)
        log.event(f"the leader is gone ({error.strerror or error})", level=logging.ERROR)
        _leave(1)


def _leave(code: int) -> NoReturn:
    """Ends the process though its main thread may be waiting for processes that are gone."""
    logging.shutdown()
    os._exit(code)
