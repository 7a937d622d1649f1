"""The bodies that clients send, checked: OpenAI's fields, and those that vLLM added.

A body is JSON, its fields have exactly the types written here (no number where a text belongs, no
`true` where a number does, no NaN), and `null` means that a field is not there. What is not known
is an error that names the field, or listed if the server was told to ignore it. Ranges of sampling
fields are `SamplingParams`'s own; the limits below bound what one request may cost.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from jax_eagle.logprobs import MAX_TOP
from jax_eagle.sampling import MAX_BAD_WORDS

from .errors import bad_request
from .features import NEUTRAL, NOT_BUILT, refused_pair

MAX_CHOICES = 128
"""Sequences of one request: prompts times n."""
MAX_WORDS = MAX_BAD_WORDS // 2
"""Each bad word is looked for with and without a space before it."""
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
"""Stop strings of a request, and characters of one."""
MAX_STOP_TOKENS = 16
MAX_BIASES = 1024
MAX_LABEL = 256
"""Characters of names that clients choose (cache_salt, user), and of a bad word."""

Prompt = str | tuple[int, ...]
"""A text, or token ids."""
Label = Annotated[str, Field(max_length=MAX_LABEL)]


def _prompts(value: Any) -> list[Prompt]:
    """The prompts of a completion: a text, ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("expected a text, token ids, or a list of either, not empty")
    if all(type(entry) is int for entry in value):
        return [tuple(value)]
    if all(isinstance(entry, str) for entry in value):
        return value
    if all(isinstance(e, list) and e and all(type(i) is int for i in e) for e in value):
        return [tuple(entry) for entry in value]
    raise ValueError("expected a text, token ids, or a list of either, not mixed")


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _biases(value: Any) -> list[tuple[int, float]]:
    """{"token id": bias} as pairs."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"expected an object of {MAX_BIASES} entries at most")
    pairs = []
    for key, bias in value.items():
        if not key.isdecimal() or len(key) > 9:
            raise ValueError(f"the key {key[:20]!r} is no token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} is {bias!r}, expected a number, -100 to 100")
        pairs.append((int(key), float(bias)))
    return pairs


def _is_neutral(name: str, entry: Any, fields: Mapping[str, Any]) -> bool:
    neutral = [*NEUTRAL.get(name, ())] + ([fields.get("n", 1)] if name == "best_of" else [])
    return entry is None or any(type(entry) is type(v) and entry == v for v in neutral)


class Body(BaseModel):
    """A JSON object from a client; fields that are not declared are kept apart."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, value: Any) -> Any:
        """Without nulls, and without fields of other servers that ask for nothing."""
        if not isinstance(value, Mapping):
            return value
        return {k: entry for k, entry in value.items() if not _is_neutral(k, entry, value)}


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Speculative(Body):
    """How this request is decoded; its text does not depend on it."""

    enabled: bool | None = None
    """False: plain decoding."""
    tree: Label | None = None
    """One of the server's trees; not given: the server's choice, round by round."""
    stats: bool = False
    """Whether the answer says how many drafted tokens were accepted."""


class Generation(Body):
    """What chat and plain completions have in common."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, lt=2**31)
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    min_tokens: int = Field(0, ge=0, lt=2**31)
    logit_bias: Annotated[list[tuple[int, float]], BeforeValidator(_biases)] = []
    allowed_token_ids: list[int] | None = Field(None, min_length=1)
    bad_words: Annotated[list[Label], BeforeValidator(_texts)] = Field([], max_length=MAX_WORDS)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
        BeforeValidator(_texts),
    ] = Field([], max_length=MAX_STOPS)
    stop_token_ids: list[int] = Field([], max_length=MAX_STOP_TOKENS)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=2**31)
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    request_id: Annotated[str, Field(pattern=r"^[\w.:-]{1,128}$")] | None = None
    cache_salt: Label = ""
    timeout: float | None = Field(None, gt=0)
    speculative: Speculative = Field(default_factory=Speculative)
    user: Label | None = None


class CompletionBody(Generation):
    """POST /v1/completions."""

    prompt: Annotated[list[Prompt], BeforeValidator(_prompts), Field(max_length=MAX_CHOICES)]
    max_tokens: int = Field(16, ge=1, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    echo: bool = False

    @property
    def top_logprobs(self) -> int | None:
        """Alternatives to report for each token; None: no log-probabilities."""
        return self.logprobs


class TextPart(Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


def _content(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(Body):
    """One message of a dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_content)]
    name: Label | None = None

    def as_template_input(self) -> dict[str, str]:
        """What chat templates read."""
        return {"role": self.role, "content": "\n".join(part.text for part in self.content)}


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatBody(Generation):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs_asked: int | None = Field(None, ge=0, le=MAX_TOP, validation_alias="top_logprobs")
    add_generation_prompt: bool = True

    @property
    def top_logprobs(self) -> int | None:
        """Alternatives to report for each token; None: no log-probabilities."""
        return (self.top_logprobs_asked or 0) if self.logprobs else None


class TokenizeBody(Body):
    """POST /tokenize: a text or a dialogue."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


AnyBody = TypeVar("AnyBody", bound=Body)


def read(kind: type[AnyBody], content: bytes, *, ignore_unknown: bool) -> tuple[AnyBody, list[str]]:
    """A body of `kind` from the bytes of a request, and the names of the fields it ignores.

    Raises:
      ApiError: 400; `param` is the field at fault.
    """
    fields = _object(content)
    try:
        body = kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _named(error) from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    unknown = [name[:MAX_LABEL] for name in _unknown(body)]
    for name in unknown:
        if reason := NOT_BUILT.get(name.rpartition(".")[2]):
            raise bad_request(f"{name}: {reason}", name, "unsupported_field")
    if unknown and not ignore_unknown:
        raise bad_request(
            f"{unknown[0]}: this field is not known; leave it out (or start the server with "
            "--ignore-unknown-fields)",
            unknown[0],
            "unknown_field",
        )
    _check_together(body, fields)
    return body, unknown


def _object(content: bytes) -> dict[str, Any]:
    """The JSON object of a body. NaN and infinities pass: the field's own check can name it."""
    try:
        fields = json.loads(content)
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError too
        raise bad_request(f"the body is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise bad_request(f"the body is a JSON {type(fields).__name__}, expected an object")
    if b"\\ud" in content.lower():
        _check_text(fields)
    return {key: value for key, value in fields.items() if value is not None}


def _check_text(fields: dict[str, Any]) -> None:
    """Raises for half a surrogate pair: JSON can write it, but it is no text."""
    for name, value in fields.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = "holds a lone surrogate (\\ud800 to \\udfff), which is no text"
            raise bad_request(f"{ascii(name)[1:-1]} {message}", ascii(name)[1:-1]) from None
        except RecursionError:
            raise bad_request("the body is nested too deeply") from None


def _unknown(body: Body, prefix: str = "") -> Iterator[str]:
    """Paths of the fields that no model declares."""
    for name in body.model_extra or ():
        yield prefix + name
    for name in type(body).model_fields:
        value = getattr(body, name)
        for i, entry in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(entry, Body):
                place = f"{name}.{i}" if isinstance(value, list) else name
                yield from _unknown(entry, f"{prefix}{place}.")


def _named(error: pydantic.ValidationError):
    """The first complaint as an error that names the field."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return bad_request(f"{path}: this field is missing", path, "missing_field")
    given = repr(first["input"])
    given = given if len(given) <= 80 else given[:77] + "..."
    expected = "expected an object" if first["type"] == "model_type" else first["msg"]
    expected = expected.removeprefix("Value error, ").replace("Input should be", "expected")
    return bad_request(f"{path} is {given}: {expected}", path, "invalid_value")


def _check_together(body: Body, fields: Mapping[str, Any]) -> None:
    """Raises for fields that do not go together."""
    if not isinstance(body, Generation):
        return
    if found := refused_pair(fields):
        first, second, reason = found
        param = next(iter(second.example))
        raise bad_request(f"{first.name} with {second.name}: {reason}", param, "unsupported_pair")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options: only with stream", "stream_options")
    if isinstance(body, ChatBody) and body.top_logprobs_asked is not None and not body.logprobs:
        raise bad_request("top_logprobs: only with logprobs", "top_logprobs")
