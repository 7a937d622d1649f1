"""What a request may ask for, and which of it goes together: the one table.

`python -m serve.server --explain` prints it, the protocol refuses by it, and the tests walk all its
pairs. A pair that is not in REFUSED is supported: with speculation and without, in a stream and at
once.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

CHAT, COMPLETIONS = "chat", "completions"
BOTH = (CHAT, COMPLETIONS)


@dataclasses.dataclass(frozen=True)
class Feature:
    """Something that a request body can ask for."""

    name: str
    example: Mapping[str, Any]
    """Fields that ask for it; `{tree}` stands for one of the server's trees."""
    endpoints: tuple[str, ...] = BOTH
    asked: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether a body asks for it; None: its one field is there."""

    def is_in(self, body: Mapping[str, Any]) -> bool:
        """Whether `body` (nulls removed) asks for this."""
        if self.asked is not None:
            return self.asked(body)
        return next(iter(self.example)) in body


def _speculative(key: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda body: (body.get("speculative") or {}).get(key) is not None


def _prompts_of(*kinds: type) -> Callable[[Mapping[str, Any]], bool]:
    """Whether the prompt is a list of this."""

    def asked(body):
        prompt = body.get("prompt")
        return isinstance(prompt, list) and isinstance(next(iter(prompt), None), kinds)

    return asked


FEATURES = (
    Feature("stream", {"stream": True}, asked=lambda body: body.get("stream") is True),
    Feature(
        "stream usage",
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        asked=lambda body: "stream_options" in body,
    ),
    Feature("several choices", {"n": 2}, asked=lambda body: body.get("n", 1) > 1),
    Feature("several prompts", {"prompt": ["One", "Two"]}, (COMPLETIONS,), _prompts_of(str, list)),
    Feature("token ids", {"prompt": [11, 12, 13]}, (COMPLETIONS,), _prompts_of(int, list)),
    Feature("parts of content", {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]}, (CHAT,), lambda body: any(
        isinstance(message.get("content"), list) for message in body.get("messages", ())
    )),
    Feature("truncated prompt", {"truncate_prompt_tokens": 3}),
    Feature(
        "echo", {"echo": True}, (COMPLETIONS,), lambda body: body.get("echo") is True
    ),
    Feature("limit", {"max_tokens": 4}),
    Feature("seed", {"seed": 7}),
    Feature("temperature", {"temperature": 0.7}),
    Feature("top_p", {"top_p": 0.9}),
    Feature("top_k", {"top_k": 20}),
    Feature("min_p", {"min_p": 0.05}),
    Feature("presence penalty", {"presence_penalty": 0.5}),
    Feature("frequency penalty", {"frequency_penalty": 0.5}),
    Feature("repetition penalty", {"repetition_penalty": 1.2}),
    Feature("logit bias", {"logit_bias": {"11": -5, "12": 2.5}}),
    Feature("bad words", {"bad_words": ["the"]}),
    Feature("allowed tokens", {"allowed_token_ids": list(range(200))}),
    Feature("minimum", {"min_tokens": 2}),
    Feature("no end of text", {"ignore_eos": True}),
    Feature("stop strings", {"stop": ["e", "zzz"]}),
    Feature("stop tokens", {"stop_token_ids": [11]}),
    Feature("stop string kept", {"stop": "e", "include_stop_str_in_output": True},
            asked=lambda body: "include_stop_str_in_output" in body),
    Feature("special tokens shown", {"skip_special_tokens": False}),
    Feature("logprobs, chat", {"logprobs": True, "top_logprobs": 2}, (CHAT,),
            lambda body: body.get("logprobs") is True),
    Feature("logprobs", {"logprobs": 2}, (COMPLETIONS,), lambda body: "logprobs" in body),
    Feature("token ids returned", {"return_token_ids": True}),
    Feature("tree", {"speculative": {"tree": "{tree}"}}, asked=_speculative("tree")),
    Feature("plain decoding", {"speculative": {"enabled": False}},
            asked=lambda body: (body.get("speculative") or {}).get("enabled") is False),
    Feature("acceptance statistics", {"speculative": {"stats": True}}, asked=_speculative("stats")),
    Feature("priority", {"priority": -1}),
    Feature("cache salt", {"cache_salt": "mine"}),
    Feature("time-out", {"timeout": 30.0}),
)  # fmt: skip
"""Everything that can be asked for, in the order of `--explain`."""

REFUSED = {
    frozenset({"echo", "logprobs"}): "log-probabilities of the prompt are not built yet",
    frozenset({"tree", "plain decoding"}): "plain decoding has no tree",
}
"""Pairs that a request may not ask for together, each with its reason."""

NOT_BUILT = {
    **dict.fromkeys(
        ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice",
         "guided_grammar", "guided_decoding_backend", "guided_whitespace_pattern"),
        "guided decoding is not built yet",
    ),
    **dict.fromkeys(
        ("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "tool_calls",
         "tool_call_id"),
        "tool calling is not built yet",
    ),
    **dict.fromkeys(("best_of", "use_beam_search", "length_penalty"), "there is no beam search"),
    **dict.fromkeys(("prompt_logprobs", "logprob_token_ids"),
                    "log-probabilities are of the new tokens and the likeliest ones alone"),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "continue_final_message",
                     "documents"), "the chat template takes the messages alone"),
    "suffix": "the models continue a text, they do not fill a gap",
    "prompt_embeds": "prompts are text or token ids",
    "audio": "the models read and write text", "modalities": "the models read and write text",
    "prediction": "predicted outputs are not built yet",
    "kv_transfer_params": "KV transfer is not built yet",
    "reasoning_effort": "there is no reasoning parser", "web_search_options": "there is no search",
}  # fmt: skip
"""Fields that other servers know and this one refuses, each with its reason."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "tool_calls": ([],),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "suffix": ("",),
    "modalities": (["text"],),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
}
"""Values of such fields that ask for nothing."""


def refused_pair(body: Mapping[str, Any]) -> tuple[Feature, Feature, str] | None:
    """The first pair of features that `body` may not ask for together, with the reason."""
    asked = {feature.name: feature for feature in FEATURES if feature.is_in(body)}
    for pair, reason in REFUSED.items():
        if pair <= asked.keys():
            first, second = (feature for name, feature in asked.items() if name in pair)
            return first, second, reason
    return None


def pairs() -> list[tuple[Feature, Feature, tuple[str, ...]]]:
    """All pairs of features, each with the endpoints that know both."""
    return [
        (first, second, tuple(set(first.endpoints) & set(second.endpoints)))
        for first, second in itertools.combinations(FEATURES, 2)
    ]


def explain() -> str:
    """The table as text: a triangle of all pairs, what is refused and why."""
    reasons = list(REFUSED.items())
    mark = {pair: str(number) for number, (pair, _) in enumerate(reasons, start=1)}
    wide = max(len(feature.name) for feature in FEATURES)
    lines = [
        "Features of a request, pair by pair: + supported, - on no endpoint together,",
        "a number: refused, see below. Every pair works with speculation and without.",
        "",
    ]
    for row, feature in enumerate(FEATURES):
        cells = []
        for other in FEATURES[:row]:
            pair = frozenset({feature.name, other.name})
            common = set(feature.endpoints) & set(other.endpoints)
            cells.append(mark.get(pair, "+" if common else "-"))
        lines.append(f"{feature.name:>{wide}} {' '.join(cells)}")
    lines += ["", "Refused:"]
    for number, (pair, reason) in enumerate(reasons, start=1):
        lines.append(f"  {number}  {' with '.join(sorted(pair))}: {reason}")
    lines += ["", "Fields that are refused by themselves:"]
    for reason in dict.fromkeys(NOT_BUILT.values()):
        fields = [field for field, why in NOT_BUILT.items() if why == reason]
        lines.append(f"  {reason}: {', '.join(fields)}")
    return "\n".join(lines)
