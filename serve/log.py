"""Logs: one line an event, to be read by people or (JSON) by programs, with the request's id.

The id of the HTTP request that a line belongs to travels in a context variable, so whoever logs
need not know it.
"""

import contextvars
import json
import logging
import sys
import time
from typing import Any

from .request import EngineStatus

logger = logging.getLogger("serve")
request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)


def set_up(form: str, level: str) -> None:
    """Sends all logs to stderr; `form` is text or json, `level` the least that is logged."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    for name in ("serve", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())


def event(message: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Logs a message with fields, which a program can read out of the JSON form."""
    logger.log(level, message, extra={"fields": fields})


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        words = [clock, record.levelname, _printable(record.getMessage())]
        fields = getattr(record, "fields", {})
        if name := request_id.get():
            fields = fields | {"request_id": name}
        words += [f"{key}={_short(value)}" for key, value in fields.items()]
        text = " ".join(words)
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text.encode(errors="backslashreplace").decode()


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower()}
        line["message"] = record.getMessage()
        if name := request_id.get():
            line["request_id"] = name
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


def _printable(text: str) -> str:
    """One line, whatever a client put into a path."""
    return text if text.isprintable() else ascii(text)[1:-1]


class LoadLine:
    """The line about load and speed: what happened between two looks at the engine."""

    def __init__(self, status: EngineStatus):
        """`status` is where the first line counts from."""
        self._before, self._clock, self._quiet = status, time.monotonic(), True

    def write(self, now: EngineStatus) -> None:
        """Logs one line; an idle server is silent after the line that says so."""
        before, begin = self._before, self._clock
        self._before, self._clock = now, time.monotonic()
        steps = now.steps - before.steps
        quiet = not (steps or now.running or now.waiting)
        if quiet and self._quiet:
            return
        self._quiet = quiet
        seconds = max(self._clock - begin, 1e-9)
        event(
            "load",
            running=now.running,
            waiting=now.waiting,
            kv_use=round(now.kv_usage, 4),
            prompt_tokens_per_second=(now.prompt_tokens - before.prompt_tokens) / seconds,
            generation_tokens_per_second=(now.generation_tokens - before.generation_tokens)
            / seconds,
            acceptance_length=acceptance_length(before, now),
            host_share=host_share(before, now),
        )


def acceptance_length(before: EngineStatus, now: EngineStatus) -> float:
    """Tokens per target call between two looks, bonus included; 1.0 without a call."""
    rounds = sum(now.rounds_by_tree.values()) - sum(before.rounds_by_tree.values())
    accepted = sum(now.accepted_by_tree.values()) - sum(before.accepted_by_tree.values())
    return 1 + accepted / rounds if rounds else 1.0


def host_share(before: EngineStatus, now: EngineStatus) -> float:
    """Share of the steps' time in which the host did not only wait for the device."""
    seconds = now.step_seconds - before.step_seconds
    return 1 - (now.wait_seconds - before.wait_seconds) / seconds if seconds else 0.0
