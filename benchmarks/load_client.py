"""One request of a load run: how it is sent, how its stream is read, and what became of it.

Every request ends in one status:

    completed          finish reason, usage and [DONE] came, and as many tokens as they say
    cancelled          closed by this client in the middle of the stream, as planned
    refused            429 or 503: the server had no room
    malformed-refused  broken on purpose, and answered with a 4xx
    error              all else: 5xx, 4xx on a sound request, a stream that broke or lacks its end,
                       a malformed request that was accepted, no end within the time-out

Nothing of an answer is kept but counts and times, so memory does not grow with its length.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
import time
from array import array
from collections.abc import AsyncGenerator
from typing import Any, Literal, cast

import httpx2

from .load_plan import Plan

Status = Literal["completed", "cancelled", "refused", "malformed-refused", "error"]
STATUSES: tuple[Status, ...] = ("completed", "cancelled", "refused", "malformed-refused", "error")

_GOOD_ENDS = {"stop", "length", "content_filter", "tool_calls", "function_call"}
_DEFAULT_RETRY_SECONDS = 1.0
_LONGEST_MESSAGE = 200


@dataclasses.dataclass
class Record:
    """What became of one request. Times are seconds after the start of the run."""

    index: int
    begin: float
    """When it was sent, or was due if it had to wait for a connection."""
    status: Status = "error"
    detail: str = ""
    """Why it was refused or what was wrong."""
    first: float | None = None
    """Arrival of the first chunk that carries tokens or, if none does, the finish reason."""
    last: float | None = None
    end: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    """New tokens by the server's count; of cancelled requests chunks, where it did not count."""
    retries: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds; None if none came."""
        return None if self.first is None else self.first - self.begin

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds a token after the first; None unless completed with two tokens or more."""
        if self.status != "completed" or self.tokens < 2 or self.first is None or self.last is None:
            return None
        return (self.last - self.first) / (self.tokens - 1)


class Reservoir:
    """A fair sample of at most `capacity` values of a stream; all of them while they fit."""

    def __init__(self, capacity: int = 200_000, seed: int = 0):
        self.values = array("d")
        self.count = 0
        self._capacity = capacity
        self._rng = random.Random(seed)

    def add(self, value: float) -> None:
        """Takes one value."""
        self.count += 1
        if len(self.values) < self._capacity:
            self.values.append(value)
        elif (place := self._rng.randrange(self.count)) < self._capacity:
            self.values[place] = value


class _Refused(Exception):
    """A server that shuts down gives a request back, in a stream that is already open."""


@dataclasses.dataclass
class _Answer:
    """One stream, as far as it came."""

    tokens: int = 0
    """By the server's count, once there is one; chunks until then."""
    prompt_tokens: int = 0
    counted: bool = False
    reason: str = ""
    done: bool = False

    def take(self, data: str) -> bool:
        """Reads one event; whether it brings tokens.

        Raises:
          ValueError: an error that the server reports, or no event of a completion.
        """
        if data == "[DONE]":
            self.done = True
            return False
        try:
            event = json.loads(data)
            error, usage = event.get("error"), event.get("usage")
            choice = (event.get("choices") or [{}])[0]
            delta = choice.get("delta") or {}
            texts = [choice.get("text"), choice.get("token_ids")]
            brings_tokens = any(texts + [v for k, v in delta.items() if k != "role"])
            self.reason = choice.get("finish_reason") or self.reason
            if usage:
                self.tokens, self.counted = int(usage["completion_tokens"]), True
                self.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        except (AttributeError, LookupError, TypeError, ValueError):
            raise ValueError(f"not an event of a completion: {data}") from None
        if error and error.get("type") == "service_unavailable_error":
            raise _Refused(f"in the stream: {error.get('message')}")
        if error:
            raise ValueError(f"error in the stream: {error}")
        self.tokens += brings_tokens and not self.counted
        return brings_tokens

    def fault(self, body: dict[str, Any]) -> str:
        """What a whole answer to this body would have and this one lacks; empty: nothing."""
        if not self.done:
            return "the stream ended without [DONE]"
        if self.reason not in _GOOD_ENDS:
            return f"finish_reason {self.reason}" if self.reason else "no finish_reason"
        if not self.counted:
            return "no usage, though it was asked for"
        if self.reason == "length" and self.tokens != body["max_tokens"]:
            return f"finish_reason length after {self.tokens} of {body['max_tokens']} tokens"
        told_to_stop = "stop" in body or "stop_token_ids" in body
        if self.reason == "stop" and body.get("ignore_eos") and not told_to_stop:
            return "finish_reason stop in spite of ignore_eos"
        return ""


class LoadClient:
    """Sends requests to one endpoint and times them. The run starts when this is made."""

    def __init__(self, http: httpx2.AsyncClient, path: str, *, timeout: float, retry: bool):
        """
        Args:
          http: knows the server's address and the key.
          timeout: seconds that one request may take, retries included.
          retry: ask again after a 429, when its Retry-After says, if that is before the time-out.
        """
        self.gaps = Reservoir()
        """Seconds between chunks of one stream that bring tokens."""
        self._http, self._path, self._timeout, self._retry = http, path, timeout, retry
        self._start = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    async def send(self, plan: Plan) -> Record:
        """Carries out one plan, when it is due. Whatever goes wrong is in the record."""
        if plan.due is not None:
            await asyncio.sleep(plan.due - self.now())
        record = Record(plan.index, self.now() if plan.due is None else plan.due)
        try:
            async with asyncio.timeout(self._timeout) as limit:
                while (wait := await self._attempt(plan, record)) is not None:
                    if asyncio.get_running_loop().time() + wait >= (limit.when() or 0):
                        break
                    record.retries += 1
                    await asyncio.sleep(wait)
        except TimeoutError:
            record.status, record.detail = "error", f"no end within {self._timeout:g} s"
        except httpx2.ConnectError as error:
            record.status, record.detail = "error", f"no connection: {error}"
        except _Refused as error:
            record.status, record.detail = "refused", str(error)[:_LONGEST_MESSAGE]
        except (httpx2.HTTPError, ValueError) as error:
            text = str(error) or type(error).__name__
            record.status, record.detail = "error", text[:_LONGEST_MESSAGE]
        record.end = self.now()
        return record

    async def _attempt(self, plan: Plan, record: Record) -> float | None:
        """Sends the request once; seconds to wait if it is worth another try."""
        headers = {"Content-Type": "application/json"}
        async with self._http.stream(
            "POST", self._path, content=plan.content, headers=headers
        ) as response:
            code = response.status_code
            record.detail = ""
            if code == 200 and plan.malformation is None:
                await self._read(response, plan, record)
            elif code == 200:
                record.status, record.detail = "error", f"accepted with 200: {plan.malformation}"
            else:
                record.detail = f"{code}: {await _error_message(response)}"
                if code in (429, 503):
                    record.status = "refused"
                    return _retry_after(response) if self._retry and code == 429 else None
                refused = plan.malformation is not None and 400 <= code < 500
                record.status = "malformed-refused" if refused else "error"
        return None

    async def _read(self, response: httpx2.Response, plan: Plan, record: Record) -> None:
        answer = _Answer()
        events = cast(AsyncGenerator, aiter(httpx2.EventSource(response)))
        async with contextlib.aclosing(events):
            async for event in events:
                now, running = self.now(), not answer.reason
                brings_tokens = answer.take(event.data)
                record.tokens, record.prompt_tokens = answer.tokens, answer.prompt_tokens
                if brings_tokens and record.last is not None:
                    self.gaps.add(now - record.last)
                if brings_tokens or (running and answer.reason):
                    record.first = now if record.first is None else record.first
                    record.last = now
                if plan.cancel_after is not None and not answer.reason:
                    if answer.tokens >= plan.cancel_after:
                        record.status = "cancelled"
                        return
        record.detail = answer.fault(plan.body)
        record.status = "error" if record.detail else "completed"


async def _error_message(response: httpx2.Response) -> str:
    """What an error body says, or its beginning."""
    begin = b""
    async with contextlib.aclosing(cast(AsyncGenerator, response.aiter_bytes())) as parts:
        async for part in parts:
            begin += part
            if len(begin) > 10_000:
                break
    try:
        text = json.loads(begin)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = begin.decode(errors="replace")
    return str(text)[:_LONGEST_MESSAGE]


def _retry_after(response: httpx2.Response) -> float:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return _DEFAULT_RETRY_SECONDS
