"""From checked bodies to the engine's requests: sampling, defaults, seeds, limits of the model.

Everything here may take long for a long text, so it runs beside the event loop.
"""

import dataclasses
import random
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jax_eagle.checkpoint.files import read_json
from jax_eagle.sampling import SamplingParams
from jax_eagle.tokenizer import Tokenizer

from .dispatch import PLAIN
from .errors import bad_request
from .prompts import Prompts, limit_of
from .protocol import ChatBody, CompletionBody, Generation
from .request import Request

DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's generation_config.json may preset."""


class Model(Protocol):
    """What translation needs to know; `service.Service` is one."""

    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    trees: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """A body as work for the engine: request `i` is choice `i` of the answer."""

    id: str
    created: int
    body: ChatBody | CompletionBody
    requests: list[Request]
    prompt_texts: list[str]
    """For `echo`, one a prompt; empty strings without it."""
    ignored: list[str]
    """Unknown fields that were let pass."""

    def prompt_of(self, choice: int) -> int:
        """Which prompt a choice continues."""
        return choice // self.body.n


class Translator:
    """Makes jobs for one model."""

    def __init__(
        self,
        model: Model,
        *,
        defaults: Mapping[str, float] | None = None,
        timeout: float | None = None,
        seed: int | None = None,
    ):
        """`defaults`: see `read_defaults`; `timeout`: of every request, in seconds; `seed`: of the
        seeds of requests that bring none (None: unpredictable ones)."""
        self._model, self.prompts = model, Prompts(model)
        self._defaults = {"temperature": 1.0} | dict(defaults or {})
        self._timeout = timeout
        self._seeds = secrets.SystemRandom() if seed is None else random.Random(seed)

    def job(
        self, body: ChatBody | CompletionBody, ignored: list[str], name: str | None = None
    ) -> Job:
        """The work that a body asks for; `name` is its id unless the body brings one.

        Raises:
          ApiError: 400; a field that does not fit this model.
        """
        chat = isinstance(body, ChatBody)
        name = body.request_id or name or secrets.token_hex(16)
        prompts = self.prompts.of(body)
        common, serial = self._common(body), secrets.token_hex(4)
        requests = [
            dataclasses.replace(
                common,
                id=f"{name}-{serial}-{i * body.n + j}",
                prompt=prompt,
                max_tokens=self._max_tokens(body, len(prompt)),
                sampling=dataclasses.replace(
                    common.sampling, seed=(common.sampling.seed + j) % 2**32
                ),
            )
            for i, prompt in enumerate(prompts)
            for j in range(body.n)
        ]
        return Job(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{name}",
            created=int(time.time()),
            body=body,
            requests=requests,
            prompt_texts=[] if chat else self.prompts.echo(body, prompts),
            ignored=ignored,
        )

    def _common(self, body: ChatBody | CompletionBody) -> Request:
        """What all requests of a body have in common; id, prompt and limit are still to come."""
        return Request(
            id="",
            prompt=(),
            sampling=self._sampling(body),
            max_tokens=0,
            stop_token_ids=self._stop_tokens(body),
            stop=tuple(body.stop),
            include_stop=body.include_stop_str_in_output,
            skip_special_tokens=body.skip_special_tokens,
            logprobs=body.top_logprobs,
            tree=self._tree(body),
            priority=body.priority,
            cache_salt=body.cache_salt,
            timeout=_least(self._timeout, body.timeout),
        )

    def _max_tokens(self, body: ChatBody | CompletionBody, prompt_tokens: int) -> int:
        """A limit that was asked for has to fit; a default gives way to the context."""
        room = self._model.max_model_len - prompt_tokens
        field, limit = limit_of(body)
        if limit is None or (limit > room and field is None):
            limit = room
        if limit > room:
            given = f"is {limit} and the prompt has {prompt_tokens} tokens"
            raise self.prompts.too_long(given, field or "max_tokens")
        if body.min_tokens > limit:
            expected = f"expected {limit} (max_tokens) at most"
            raise bad_request(f"min_tokens is {body.min_tokens}, {expected}", "min_tokens")
        return limit

    def _sampling(self, body: Generation) -> SamplingParams:
        given = {name: getattr(body, name) for name in DEFAULTS}
        chosen: dict[str, Any] = self._defaults | {k: v for k, v in given.items() if v is not None}
        self.prompts.check_ids([token for token, _ in body.logit_bias], "logit_bias")
        self.prompts.check_ids(body.allowed_token_ids or (), "allowed_token_ids")
        allowed = body.allowed_token_ids
        seed = self._seeds.getrandbits(32) if body.seed is None else body.seed % 2**32
        try:
            return SamplingParams(
                seed=seed,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                min_tokens=body.min_tokens,
                logit_bias=tuple(body.logit_bias),
                allowed_token_ids=None if allowed is None else tuple(sorted(set(allowed))),
                bad_words=self._bad_words(body.bad_words),
                **chosen,
            )
        except ValueError as error:  # "top_p is 2.0, expected ..."
            raise bad_request(str(error), str(error).split()[0], "invalid_value") from None

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each word, at the beginning of a text and behind a space, as vLLM does."""
        found: list[tuple[int, ...]] = []
        for word in words:
            alone = tuple(self.prompts.encode(word.lstrip(), False, "bad_words"))
            if not alone:
                raise bad_request("bad_words holds an empty word", "bad_words")
            found.append(alone)
            spaced = tuple(self.prompts.encode(" " + word.lstrip(), False, "bad_words"))
            if spaced[0] != alone[0] and len(spaced) == len(alone):
                found.append(spaced)
        return tuple(dict.fromkeys(found))

    def _stop_tokens(self, body: Generation) -> tuple[int, ...]:
        self.prompts.check_ids(body.stop_token_ids, "stop_token_ids")
        own = () if body.ignore_eos else self._model.stop_token_ids
        return tuple(dict.fromkeys([*own, *body.stop_token_ids]))

    def _tree(self, body: Generation) -> str | None:
        asked, trees = body.speculative, self._model.trees
        if asked.enabled is False:
            return PLAIN
        if asked.enabled and set(trees) <= {PLAIN}:
            raise bad_request(
                "speculative.enabled: this server has no draft", "speculative.enabled"
            )
        if asked.tree is not None and asked.tree not in trees:
            raise bad_request(
                f"speculative.tree is {asked.tree!r}, expected one of {', '.join(trees)} (those "
                "that the server was started with)",
                "speculative.tree",
            )
        return asked.tree


def read_defaults(folder: Path) -> dict[str, float]:
    """Sampling defaults out of a model folder's generation_config.json, if there is one.

    Raises:
      ValueError: a value that is no number.
    """
    if not (folder / "generation_config.json").is_file():
        return {}
    fields = read_json(folder / "generation_config.json")
    chosen = {name: fields[name] for name in DEFAULTS if fields.get(name) is not None}
    try:
        SamplingParams(**chosen)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'generation_config.json'}: {error}") from None
    return chosen


def _least(*values: float | None) -> float | None:
    return min((value for value in values if value is not None), default=None)
