"""Prompts: texts, dialogues and token ids as token ids that fit the context.

A text that cannot fit is refused by its characters, before it is tokenized.
"""

from collections.abc import Sequence
from typing import Protocol

from jax_eagle.tokenizer import Tokenizer

from .errors import ApiError, bad_request
from .protocol import (
    MAX_CHOICES,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Messages,
    Prompt,
    TokenizeBody,
)

CHARACTERS_PER_TOKEN = 128
"""No vocabulary of ours has a longer token."""


class Vocabulary(Protocol):
    """What prompts have to fit."""

    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int


class Prompts:
    """Makes token ids for one model."""

    def __init__(self, model: Vocabulary):
        """`model` is read at each call."""
        self._model = model

    def of(self, body: ChatBody | CompletionBody) -> list[tuple[int, ...]]:
        """Token ids of each prompt of a body.

        Raises:
          ApiError: 400; there is none, there are too many, or one leaves no room for an answer.
        """
        if isinstance(body, ChatBody):
            return [self._dialogue(body)]
        if (count := len(body.prompt)) * body.n > MAX_CHOICES:
            raise bad_request(
                f"n is {body.n} with {count} prompts, expected {MAX_CHOICES} in all", "n"
            )
        return [self._ids(prompt, body) for prompt in body.prompt]

    def tokens(self, body: TokenizeBody) -> list[int]:
        """Token ids of a text or of a dialogue.

        Raises:
          ApiError: 400; neither or both are given, or it is too long.
        """
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("give one of prompt and messages", "prompt")
        if body.messages is not None:
            return self._template(body.messages, body.add_generation_prompt)
        return self.encode(body.prompt or "", body.add_special_tokens is not False, "prompt")

    def text(self, body: DetokenizeBody) -> str:
        """The text of token ids.

        Raises:
          ApiError: 400; an id outside the vocabulary.
        """
        self.check_ids(body.tokens, "tokens")
        return self._model.tokenizer.decode(body.tokens)

    def echo(self, body: CompletionBody, ids: Sequence[Sequence[int]]) -> list[str]:
        """The prompts (`ids` is what `of` made of them) as texts if the body asks for them."""
        if not body.echo:
            return [""] * len(ids)
        whole, decode = body.truncate_prompt_tokens is None, self._model.tokenizer.decode
        return [
            prompt if isinstance(prompt, str) and whole else decode(kept)
            for prompt, kept in zip(body.prompt, ids, strict=True)
        ]

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError for token ids outside the vocabulary."""
        limit = self._model.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < limit:
            bad = next(i for i in ids if not 0 <= i < limit)
            raise bad_request(
                f"{param} holds token {str(bad)[:20]}, expected 0 to {limit - 1}", param
            )

    def encode(self, text: str, special: bool, param: str) -> list[int]:
        """Token ids of a text, unless it is too long; `param` is the field that it came in."""
        self._check_length(len(text), param)
        return self._model.tokenizer.encode(text, special=special)

    def too_long(self, given: str, param: str) -> ApiError:
        """The error of a field that asks for more than the context holds."""
        limit = self._model.max_model_len
        return bad_request(
            f"{param} {given}, but the context holds {limit} tokens, prompt and answer together: "
            "shorten it or ask for fewer new tokens",
            param,
            "context_length_exceeded",
        )

    def _dialogue(self, body: ChatBody) -> tuple[int, ...]:
        ids = self._template(body.messages, body.add_generation_prompt)
        if body.add_special_tokens:
            raise bad_request(
                "add_special_tokens: the chat template adds them", "add_special_tokens"
            )
        return self._fit(ids, body, "messages")

    def _template(self, messages: Messages, add_generation_prompt: bool) -> list[int]:
        self._check_length(sum(len(p.text) for m in messages for p in m.content), "messages")
        try:
            return self._model.tokenizer.apply_chat_template(
                [message.as_template_input() for message in messages], add_generation_prompt
            )
        except Exception as error:  # a template may refuse by any error of jinja2's or of Python's
            text = " ".join(str(error).split())[:200]
            raise bad_request(
                f"messages: the chat template refuses them: {text}", "messages"
            ) from None

    def _ids(self, prompt: Prompt, body: CompletionBody) -> tuple[int, ...]:
        if isinstance(prompt, str):
            ids = self.encode(prompt, body.add_special_tokens is not False, "prompt")
        else:
            ids = list(prompt)
            self.check_ids(ids, "prompt")
        return self._fit(ids, body, "prompt")

    def _check_length(self, characters: int, param: str) -> None:
        if characters > self._model.max_model_len * CHARACTERS_PER_TOKEN:
            raise self.too_long(f"has {characters} characters", param)

    def _fit(
        self, ids: Sequence[int], body: ChatBody | CompletionBody, param: str
    ) -> tuple[int, ...]:
        """A prompt that leaves room for one new token at least."""
        if not ids:
            raise bad_request(f"{param} is empty, expected one token or more", param)
        if (count := body.truncate_prompt_tokens) is not None:
            room = self._model.max_model_len - (limit_of(body)[1] or 1)
            keep = room if count == -1 else count
            if not 1 <= keep <= room:
                field = "truncate_prompt_tokens"
                raise bad_request(f"{field} is {count}, expected 1 to {room}, or -1", field)
            ids = ids[-keep:]
        if len(ids) >= self._model.max_model_len:
            raise self.too_long(f"has {len(ids)} tokens", param)
        return tuple(ids)


def limit_of(body: ChatBody | CompletionBody) -> tuple[str | None, int | None]:
    """The field that limits the new tokens and its value; without such a field None, the default.

    The default of a chat is None: as many as fit.
    """
    for name in ("max_completion_tokens", "max_tokens"):
        if name in type(body).model_fields and name in body.model_fields_set:
            return name, getattr(body, name)
    return None, body.max_tokens
