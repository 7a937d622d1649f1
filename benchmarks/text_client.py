"""Streamed completions over HTTP: those whose tokens are wanted, and others for company.

The others ask for random lengths, temperatures and ways of decoding, one request after the other,
and close about half of their connections in mid-stream.
"""

import asyncio
import dataclasses
import json
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, cast

import httpx2

from .load_metrics import ServerFigures, read_metrics_when_idle

_IDLE_SECONDS = 30.0
_STATUS_SECONDS = 0.3  # what the server says of itself is a quarter of a second old at most
_CLOSED_SHARE, _MOST_CHUNKS_READ = 0.5, 8


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one stream brought."""

    tokens: list[int]
    text: str
    cached_tokens: int
    """Of the prompt, found in the prefix cache."""


@dataclasses.dataclass
class Company:
    """`count` others, and how often they closed a stream that was not at its end."""

    count: int
    prompts: Sequence[list[int]]
    most_tokens: int
    """Of one answer."""
    seed: int
    closed: int = 0

    async def keep_asking(self, http: httpx2.AsyncClient, number: int) -> None:
        """One of the others, until it is cancelled."""
        rng = random.Random(f"{self.seed}, {number}")
        while True:
            body = {
                "prompt": rng.choice(self.prompts),
                "max_tokens": rng.randint(1, self.most_tokens),
                "temperature": rng.choice([0.0, 1.0]),
                "seed": rng.getrandbits(32),
                "speculative": rng.choice([{}, {"enabled": False}]),
            }
            last = rng.randint(1, _MOST_CHUNKS_READ) if rng.random() < _CLOSED_SHARE else 0
            async with aclosing(_events(http, body)) as events:
                async for event in events:
                    last -= 1
                    choices = event["choices"]
                    if last == 0 and choices and not choices[0]["finish_reason"]:
                        self.closed += 1
                        break


async def ask(
    url: str, bodies: Sequence[dict[str, Any]], company: Company, *, at_once: bool = False
) -> tuple[list[Answer], ServerFigures]:
    """The answers to completions that want token ids, and what the server counted meanwhile.

    One body is sent after the other, in company, or all of them at once.

    Raises:
      RuntimeError: the server refuses a request, breaks off, or has no metrics; several at a time,
        as an ExceptionGroup.
    """
    async with httpx2.AsyncClient(base_url=url, timeout=None, trust_env=False) as http:
        before = await read_metrics_when_idle(http, _IDLE_SECONDS)
        async with asyncio.TaskGroup() as group:
            others = [group.create_task(company.keep_asking(http, i)) for i in range(company.count)]
            if at_once:
                answers = await asyncio.gather(*(_answer(http, body) for body in bodies))
            else:
                answers = [await _answer(http, body) for body in bodies]
            for task in others:
                task.cancel()
        await asyncio.sleep(_STATUS_SECONDS)
        after = await read_metrics_when_idle(http, _IDLE_SECONDS)
    if before is None or after is None:
        raise RuntimeError(f"{url}/metrics cannot be read")
    return answers, ServerFigures.between(before, after)


async def _answer(http: httpx2.AsyncClient, body: dict[str, Any]) -> Answer:
    tokens, text, cached = [], "", 0
    async for event in _events(http, body):
        for choice in event["choices"]:
            tokens += choice["token_ids"]
            text += choice["text"]
        if usage := event.get("usage"):
            cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Answer(tokens, text, cached)


async def _events(http: httpx2.AsyncClient, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    """The events of one stream; closing the generator closes the connection."""
    body = {"stream": True, "stream_options": {"include_usage": True}} | body
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise RuntimeError(f"the server answers {response.status_code}: {text}")
        source = cast(AsyncGenerator, aiter(httpx2.EventSource(response)))
        async with aclosing(source):
            async for event in source:
                if event.data == "[DONE]":
                    return
                data = json.loads(event.data)
                if "error" in data:
                    raise RuntimeError(f"the server breaks off: {data['error']['message']}")
                yield data
    raise RuntimeError("the server breaks off without [DONE]")
