"""SIGTERM and Ctrl-C ask a run to stop; it saves first and ends with status 0."""

import signal
from types import FrameType
from typing import Any


class StopSignal:
    """While entered, notes a stop signal; the second Ctrl-C is Python's own."""

    def __init__(self):
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        for kind in (signal.SIGTERM, signal.SIGINT):
            self._before[kind] = signal.signal(kind, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
