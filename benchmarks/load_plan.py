"""What a load run asks: its settings, prompts, random choices, and ways to break a request.

Arrivals, lengths, cancels and malformed requests depend on the seed and the request's number alone,
and plans are made when they are wanted: a long run takes no more memory than a short one.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jax_eagle.prompts import mt_bench

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

_CLOSED_LOOP, _OPEN_LOOP = 8, 512
_OWN_FIELDS = {"model", "messages", "prompt", "max_tokens", "temperature", "stream", "n"}


@dataclasses.dataclass(frozen=True)
class LoadSettings:
    """What load to put on which server."""

    url: str
    num_requests: int = 200
    concurrency: int | None = None
    """Requests in flight at most; None: 8 in a closed loop, 512 in an open one."""
    request_rate: float | None = None
    """Arrivals a second (open loop); None: a new request whenever one has ended."""
    endpoint: str = "chat"
    """A key of PATHS."""
    prompts: Path | None = None
    """JSONL; None: the first questions of MT-Bench."""
    model: str | None = None
    """None: the first that the server lists."""
    max_tokens: tuple[int, int] = (64, 64)
    """Least and most; each request draws its own."""
    temperature: float = 0.0
    cancel: float = 0.0
    """Share of the sound requests that are closed in the middle of their stream."""
    malformed: float = 0.0
    """Share of the requests that are broken on purpose."""
    ignore_eos: bool = False
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields for every body."""
    api_key: str | None = dataclasses.field(default=None, repr=False)
    warmup: int = 0
    """Requests before the measured ones: sound ones, not counted."""
    retry: bool = False
    """Whether to ask again after a 429."""
    timeout: float = 120.0
    """Seconds that a request may take."""
    seed: int = 0

    def __post_init__(self) -> None:
        least, most = self.max_tokens
        rules = {
            "num_requests must be at least 1": self.num_requests >= 1,
            "concurrency must be at least 1": self.concurrency is None or self.concurrency >= 1,
            "request_rate must be above 0": self.request_rate is None or self.request_rate > 0,
            f"endpoint must be one of {list(PATHS)}": self.endpoint in PATHS,
            "max_tokens must be a positive number, or least:most": 1 <= least <= most,
            "cancel must be a share, from 0 to 1": 0 <= self.cancel <= 1,
            "malformed must be a share, from 0 to 1": 0 <= self.malformed <= 1,
            "warmup must not be negative": self.warmup >= 0,
            "timeout must be above 0": self.timeout > 0,
            f"extra must hold none of {sorted(_OWN_FIELDS)}": _OWN_FIELDS.isdisjoint(self.extra),
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"{rule}, got {getattr(self, rule.split()[0])}")

    @property
    def workers(self) -> int:
        """Requests in flight at most."""
        return self.concurrency or (_OPEN_LOOP if self.request_rate else _CLOSED_LOOP)

    def as_data(self) -> dict[str, Any]:
        """For json.dumps; without the key."""
        data = dataclasses.asdict(self) | {"prompts": self.prompts and str(self.prompts)}
        return {k: v for k, v in data.items() if k != "api_key"}


def _changed(**fields: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda body: json.dumps(body | fields).encode()


def _asking(value: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda body: json.dumps(body | {_asks(body): value}).encode()


def _asks(body: dict[str, Any]) -> str:
    return "messages" if "messages" in body else "prompt"


def _too_long(body: dict[str, Any]) -> bytes:
    words = "word " * 200_000  # more tokens than a context of 131,072 holds
    chat = "messages" in body
    return _asking([{"role": "user", "content": words}] if chat else words)(body)


MALFORMATIONS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "no body": lambda body: b"",
    "cut JSON": lambda body: json.dumps(body).encode()[:-1],
    "not UTF-8": lambda body: json.dumps(body).encode()[:-1] + b', "user": "\xff"}',
    "not an object": lambda body: json.dumps([body]).encode(),
    "no question": lambda body: json.dumps(
        {k: v for k, v in body.items() if k != _asks(body)}
    ).encode(),
    "question of the wrong type": _asking({"text": 7}),
    "question too long": _too_long,
    "max_tokens of the wrong type": _changed(max_tokens="many"),
    "negative max_tokens": _changed(max_tokens=-1),
    "NaN temperature": _changed(temperature=float("nan")),
    "infinite top_p": _changed(top_p=float("inf")),
    "unknown field": _changed(no_such_field=1),
    "unknown model": _changed(model="no-such-model"),
}
"""Ways to break a sound body. A server must answer each with a 4xx."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One request to make."""

    index: int
    body: dict[str, Any]
    due: float | None = None
    """Seconds after the start at which it is sent; None: as soon as a worker is free."""
    cancel_after: int | None = None
    """Tokens (chunks, where the server does not count tokens in each) after which to close."""
    malformation: str | None = None
    """A key of MALFORMATIONS."""

    @property
    def content(self) -> bytes:
        """The body as it is sent."""
        if self.malformation is None:
            return json.dumps(self.body).encode()
        return MALFORMATIONS[self.malformation](self.body)


def plans(settings: LoadSettings, questions: list[dict[str, Any]]) -> Iterator[Plan]:
    """The measured requests, one by one."""
    arrivals, due = random.Random(settings.seed), None
    for index in range(settings.num_requests):
        if settings.request_rate:
            due = (due or 0.0) + arrivals.expovariate(settings.request_rate)
        rng = random.Random(f"{settings.seed} {index}")
        body = _body(settings, questions[index % len(questions)], rng)
        malformation = cancel_after = None
        if rng.random() < settings.malformed:
            malformation = rng.choice(list(MALFORMATIONS))
        elif rng.random() < settings.cancel:
            # Where chunks are counted, of several tokens each, a later point may never come.
            cancel_after = rng.randint(0, body["max_tokens"] // 4)
        yield Plan(index, body, due, cancel_after, malformation)


def warmup_plans(settings: LoadSettings, questions: list[dict[str, Any]]) -> Iterator[Plan]:
    """Sound requests, as soon as there is room."""
    for index in range(settings.warmup):
        rng = random.Random(f"{settings.seed} warmup {index}")
        yield Plan(index, _body(settings, questions[index % len(questions)], rng))


def _body(settings: LoadSettings, question: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    body = question | {
        "model": settings.model,
        "max_tokens": rng.randint(*settings.max_tokens),
        "temperature": settings.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body | ({"ignore_eos": True} if settings.ignore_eos else {}) | settings.extra


def read_questions(settings: LoadSettings) -> list[dict[str, Any]]:
    """The part of the bodies that asks, {"messages": ...} or {"prompt": ...}, one a prompt.

    Raises:
      ValueError: no prompts, a line that holds none, or messages for the completions endpoint.
    """
    path = settings.prompts
    if path is None:
        return [_question_of({"prompt": text}, settings.endpoint) for text in mt_bench()]
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                questions.append(_question_of(json.loads(line), settings.endpoint))
            except (ValueError, LookupError, AttributeError, TypeError):
                raise ValueError(
                    f"{path}:{number}: expected JSON with prompt, turns or (chat only) messages"
                ) from None
    if not questions:
        raise ValueError(f"{path}: holds no prompts")
    return questions


def _question_of(row: dict[str, Any], endpoint: str) -> dict[str, Any]:
    if endpoint == "chat" and "messages" in row:
        return {"messages": row["messages"]}
    text = row["prompt"] if "prompt" in row else row["turns"][0]
    if not isinstance(text, str):
        raise TypeError
    if endpoint == "chat":
        return {"messages": [{"role": "user", "content": text}]}
    return {"prompt": text}
