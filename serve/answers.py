"""Answers in OpenAI's form: whole, and as the chunks of a stream.

An answer gathers the deltas of its choices. Its chunk for a delta carries exactly what the delta
adds, so the chunks of a choice put together are its part of the whole answer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jax_eagle.tokenizer import Tokenizer

from .errors import ApiError
from .request import Delta, RequestStats, TokenLogprob
from .translation import Job

LEAST_LOGPROB = -9999.0
"""JSON has no infinities."""
FAILURES = {
    "error": (
        500,
        "no token could be drawn: logits are NaN, or bad_words forbid all the rest",
    ),
    "abort": (503, "the server is shutting down: send the request again"),
}
"""Finish reasons that are no answer, with their status."""


@dataclasses.dataclass
class Choice:
    """One sequence so far."""

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    text_offset: int = 0
    """Characters up to the next token, for completions' logprobs."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    stats: RequestStats | None = None
    begun: bool = False


class Answer:
    """What a job has come to; `Chat` and `Completion` differ in the form of a choice."""

    object: str
    chunk_object: str

    def __init__(self, job: Job, model: str, tokenizer: Tokenizer):
        """`model` is the name that the answer calls the model by."""
        self.job, self._model, self._tokenizer = job, model, tokenizer
        self.choices = [Choice() for _ in job.requests]

    def add(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """Takes in one delta; returns its chunk, None if a client would see nothing in it.

        Raises:
          ApiError: the delta says that the request failed.
        """
        if delta.finish_reason in FAILURES:
            status, message = FAILURES[delta.finish_reason]
            raise ApiError(status, message, retry_after=1 if status == 503 else None)
        choice = self.choices[index]
        first, choice.begun = not choice.begun, True
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs or ()
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        choice.stats = delta.stats
        body = self.job.body
        parts = self._piece(index, delta, first)
        choice.text += delta.text
        shown = delta.text or delta.finish_reason or first or delta.logprobs
        if not (shown or body.return_token_ids):
            return None
        entry = {"index": index, **parts, **self._ending(choice)}
        chunk = self._frame(self.chunk_object, [entry])
        if body.return_token_ids:
            entry["token_ids"] = list(delta.token_ids)
            if first:
                chunk["prompt_token_ids"] = list(self.job.requests[index].prompt)
        if first and index == 0 and self.job.ignored:
            chunk["ignored_fields"] = self.job.ignored
        return chunk

    def whole(self) -> dict[str, Any]:
        """The finished answer."""
        entries = []
        for index, choice in enumerate(self.choices):
            entry = {"index": index, **self._finished(index, choice), **self._ending(choice)}
            if self.job.body.return_token_ids:
                entry["token_ids"] = choice.token_ids
                entry["prompt_token_ids"] = list(self.job.requests[index].prompt)
            entries.append(entry)
        answer = self._frame(self.object, entries) | {"usage": self.usage()}
        if self.job.body.speculative.stats:
            answer["metrics"] = self._metrics([choice.stats for choice in self.choices])
        if self.job.ignored:
            answer["ignored_fields"] = self.job.ignored
        return answer

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk without a choice that ends a stream with usage."""
        chunk = self._frame(self.chunk_object, []) | {"usage": self.usage()}
        if self.job.body.speculative.stats:
            chunk["metrics"] = self._metrics([choice.stats for choice in self.choices])
        return chunk

    def usage(self) -> dict[str, Any]:
        """Tokens so far. A prompt counts once, however many choices continue it."""
        n = self.job.body.n
        prompt = sum(len(request.prompt) for request in self.job.requests[::n])
        new = sum(len(choice.token_ids) for choice in self.choices)
        cached = sum(c.stats.cached_tokens for c in self.choices[::n] if c.stats)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        job = self.job
        return {
            "id": job.id,
            "object": kind,
            "created": job.created,
            "model": self._model,
            "choices": choices,
        }

    def _ending(self, choice: Choice) -> dict[str, Any]:
        ending: dict[str, Any] = {
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if choice.stats and self.job.body.speculative.stats:
            ending["metrics"] = self._metrics([choice.stats])
        return ending

    def _metrics(self, stats: list[RequestStats | None]) -> dict[str, Any]:
        return {"speculative_decoding": acceptance([s for s in stats if s is not None])}

    def _piece(self, index: int, delta: Delta, first: bool) -> dict[str, Any]:
        """What a delta adds to its choice, in the form of a chunk."""
        raise NotImplementedError

    def _finished(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice in the form of a whole answer."""
        raise NotImplementedError

    def _token(self, token: int) -> str:
        return self._tokenizer.decode([token])


class Chat(Answer):
    """The answer of /v1/chat/completions."""

    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def _piece(self, index: int, delta: Delta, first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        content = {"content": delta.text} if first or delta.text else {}
        return {
            "delta": role | content,
            "logprobs": self._logprobs(delta.token_ids, delta.logprobs),
        }

    def _finished(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": self._logprobs(choice.token_ids, choice.logprobs),
        }

    def _logprobs(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None
    ) -> dict[str, Any] | None:
        if self.job.body.top_logprobs is None:
            return None
        content = [
            self._entry(token, entry.logprob)
            | {"top_logprobs": [self._entry(*other) for other in entry.top]}
            for token, entry in zip(ids, logprobs or (), strict=True)
        ]
        return {"content": content}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        return {
            "token": text,
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(text.encode("utf-8")),
        }


class Completion(Answer):
    """The answer of /v1/completions."""

    object = chunk_object = "text_completion"

    def _piece(self, index: int, delta: Delta, first: bool) -> dict[str, Any]:
        choice = self.choices[index]
        text = (self._echo(index) if first else "") + delta.text
        offset = choice.text_offset
        logprobs = self._logprobs(delta.token_ids, delta.logprobs, offset)
        if logprobs and delta.token_ids:
            choice.text_offset = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
        return {"text": text, "logprobs": logprobs}

    def _finished(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "text": self._echo(index) + choice.text,
            "logprobs": self._logprobs(choice.token_ids, choice.logprobs, 0),
        }

    def _echo(self, index: int) -> str:
        return self.job.prompt_texts[self.job.prompt_of(index)]

    def _logprobs(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None, offset: int
    ) -> dict[str, Any] | None:
        if self.job.body.top_logprobs is None:
            return None
        tokens = [self._token(token) for token in ids]
        offsets = list(_offsets(tokens, offset))
        entries = list(zip(tokens, logprobs or (), strict=True))
        return {
            "tokens": tokens,
            "token_logprobs": [max(entry.logprob, LEAST_LOGPROB) for _, entry in entries],
            "top_logprobs": [self._top(token, entry) for token, entry in entries],
            "text_offset": offsets,
        }

    def _top(self, token: str, entry: TokenLogprob) -> dict[str, float]:
        """Likeliest tokens and the one that was taken. Of tokens that read alike the likeliest."""
        top: dict[str, float] = {}
        for other, logprob in entry.top:
            top.setdefault(self._token(other), max(logprob, LEAST_LOGPROB))
        top.setdefault(token, max(entry.logprob, LEAST_LOGPROB))
        return top


def _offsets(tokens: list[str], begin: int) -> Iterator[int]:
    for token in tokens:
        yield begin
        begin += len(token)


def acceptance(stats: list[RequestStats]) -> dict[str, Any]:
    """Acceptance of one sequence or several, in the form of vLLM's `metrics.speculative_decoding`.

    For a tree `num_draft_tokens` counts its nodes, so `draft_acceptance_rate` falls with the width
    of the tree; `mean_acceptance_length` is what speed follows.
    """
    depth = max((len(s.accepted_by_depth) for s in stats), default=0)
    reached = [0] * (depth + 1)  # rounds that accepted `d` tokens or more
    for one in stats:
        reached[0] += one.drafts
        for d, count in enumerate(one.accepted_by_depth, start=1):
            reached[d] += count
    drafts, accepted = reached[0], sum(reached[1:])
    nodes = sum(one.draft_tokens for one in stats)
    return {
        "mean_acceptance_length": 1 + accepted / drafts if drafts else 1.0,
        "draft_acceptance_rate": accepted / nodes if nodes else 0.0,
        "acceptance_histogram": [
            reached[d] - (reached[d + 1] if d < depth else 0) for d in range(depth + 1)
        ],
        "num_spec_steps": drafts,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": nodes,
        "num_spec_tokens": depth,
    }
