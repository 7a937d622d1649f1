"""What the HTTP side and the engine say to each other: requests in, deltas out.

A request is one sequence: the `n` choices of an HTTP request are `n` requests with seeds of their
own. Prompts are token ids; everything about text but stop strings and pieces has happened before.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from jax_eagle.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to generate."""

    id: str
    """Unique among the running ones; part of the logs."""
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    """New tokens at most; prompt and new tokens together must fit the context."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence, the model's own included where they should."""
    stop: tuple[str, ...] = ()
    """Texts that end the sequence."""
    include_stop: bool = False
    """Whether a stop string stays in the text."""
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """Alternatives to report for each token, `logprobs.MAX_TOP` at most; None: no logprobs at all.
    They are those of the target's own logits, before penalties, bias, temperature and filters."""
    tree: str | None = None
    """None: the dispatcher's choice; "plain": no speculation; or one of the engine's trees."""
    priority: int = 0
    """Lower goes first."""
    cache_salt: str = ""
    """Prefix-cache pages are shared only among requests of one salt."""
    timeout: float | None = None
    """Seconds after which the request ends with the reason "timeout"."""


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one new token, and of the likeliest tokens in its place."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), the likeliest first."""


@dataclasses.dataclass(frozen=True)
class RequestStats:
    """What one finished request took."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose pages came from the prefix cache."""
    new_tokens: int
    rounds: int
    """Target calls after prefill."""
    drafts: int
    """Rounds that speculated."""
    draft_tokens: int
    """Tree nodes drafted, roots excluded."""
    accepted_by_depth: tuple[int, ...]
    """Accepted draft tokens by depth, from depth 1."""
    queue_seconds: float
    prefill_seconds: float
    """From admission to the first token."""
    decode_seconds: float
    """From the first token to the last."""
    preemptions: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens per target call, bonus included."""
        return (self.new_tokens - 1) / self.rounds if self.rounds else 1.0


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one request gained since its last delta."""

    text: str
    """New text, never ending inside a character or inside what may become a stop string."""
    token_ids: tuple[int, ...]
    """New tokens. Their text may come with a later delta."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each of `token_ids`."""
    finish_reason: str | None = None
    """stop | length | error | abort | timeout; None while running."""
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it (None for the model's own end-of-text token)."""
    stats: RequestStats | None = None
    """With the last delta."""


class QueueFull(Exception):
    """The queue holds as many requests as it may; try again later."""

    def __init__(self, retry_after: float):
        super().__init__("the queue is full")
        self.retry_after = retry_after


class Draining(Exception):
    """The server is shutting down and takes no new requests."""


@dataclasses.dataclass(frozen=True)
class EngineStatus:
    """Gauges and running totals of the engine, for metrics and the log."""

    running: int = 0
    """Sequences in slots."""
    waiting: int = 0
    kv_usage: float = 0.0
    """Share of the pages that running sequences hold."""
    leaked_pages: int = 0
    """Pages that nobody holds and that are not free either; 0, or there is a bug."""
    compilations: int = 0
    """Programs compiled since the engine was warm; 0, or a request waited for the compiler."""
    preemptions: int = 0
    prompt_tokens: int = 0
    """Prefilled, cached ones included."""
    generation_tokens: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    rounds_by_tree: dict[str, int] = dataclasses.field(default_factory=dict)
    """Target calls of sequences (a batch of 8 counts 8), "plain" included."""
    draft_tokens_by_tree: dict[str, int] = dataclasses.field(default_factory=dict)
    """Tree nodes drafted, roots excluded."""
    accepted_by_tree: dict[str, int] = dataclasses.field(default_factory=dict)
    accepted_by_depth: tuple[int, ...] = ()
    """Accepted draft tokens by depth, from depth 1."""
    accepted_by_rank: tuple[int, ...] = ()
    """The same by sibling rank, from 0."""
    steps: int = 0
    """Iterations of the engine's loop that did something."""
    step_seconds: float = 0.0
    """Their time ..."""
    wait_seconds: float = 0.0
    """... and how much of it the host only waited for the device."""


def together(statuses: Sequence[EngineStatus]) -> EngineStatus:
    """Several engines as one: sums, and the mean use of their pages."""

    def add(name: str) -> Any:
        values = [getattr(status, name) for status in statuses]
        if isinstance(values[0], dict):
            return dict(sum(map(Counter, values), Counter()))
        if isinstance(values[0], tuple):
            return tuple(map(sum, zip_longest(*values, fillvalue=0)))
        return sum(values)

    total = EngineStatus(
        **{field.name: add(field.name) for field in dataclasses.fields(EngineStatus)}
    )
    return dataclasses.replace(total, kv_usage=total.kv_usage / len(statuses))
