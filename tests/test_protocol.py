"""Bodies to requests: what is taken, what is refused and how; every pair of features."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eagle.sampling import SamplingParams
from serve import protocol
from serve.answers import acceptance
from serve.errors import ApiError
from serve.features import CHAT, COMPLETIONS, FEATURES, NEUTRAL, NOT_BUILT, REFUSED, explain, pairs
from serve.protocol import MAX_WORDS, ChatBody, CompletionBody, TokenizeBody
from serve.translation import Translator, read_defaults
from tests.serving import ScriptedService, byte_tokenizer, example, stats

SERVICE = ScriptedService()
SAY = {"prompt": "Hello"}
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
TREE = SERVICE.trees[0]
BODIES = {CHAT: HELLO, COMPLETIONS: SAY}


def read(body, kind=None, *, ignore_unknown=False):
    """The checked body of fields, or of raw bytes."""
    if kind is None:
        kind = ChatBody if isinstance(body, dict) and "messages" in body else CompletionBody
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return protocol.read(kind, content, ignore_unknown=ignore_unknown)[0]


def translate(body, **options):
    return Translator(SERVICE, **options).job(read(body), [])


def refused(body, kind=None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        Translator(SERVICE).job(read(body, kind), [])
    assert caught.value.status == 400
    return caught.value


# ---- what fields become --------------------------------------------------------------------------


def test_fields_reach_the_engine():
    body = SAY | {
        "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3,
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.3,
        "min_tokens": 2, "logit_bias": {"5": -1, "6": 2}, "allowed_token_ids": [6, 5, 6],
        "bad_words": ["ab"], "stop": "x", "stop_token_ids": [7], "logprobs": 0, "priority": 4,
        "include_stop_str_in_output": True, "skip_special_tokens": False, "cache_salt": "s",
        "timeout": 5, "speculative": {"tree": TREE}, "request_id": "r", "user": "me",
    }  # fmt: skip
    (request,) = translate(body).requests
    encode = byte_tokenizer().encode
    assert request.sampling == SamplingParams(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=3, presence_penalty=0.1,
        frequency_penalty=0.2, repetition_penalty=1.3, min_tokens=2,
        logit_bias=((5, -1.0), (6, 2.0)), allowed_token_ids=(5, 6),
        bad_words=(tuple(encode("ab")),),
    )  # fmt: skip
    assert request.prompt == tuple(encode("Hello")) and request.max_tokens == 9
    assert request.stop == ("x",) and request.stop_token_ids == (257, 7) and request.include_stop
    assert (request.logprobs, request.tree, request.priority) == (0, TREE, 4)
    assert (request.cache_salt, request.timeout, request.skip_special_tokens) == ("s", 5.0, False)
    assert request.id.startswith("r-")


def test_defaults():
    (request,) = translate(SAY).requests
    assert request.max_tokens == 16 and request.logprobs is None and request.tree is None
    assert request.sampling == SamplingParams(temperature=1.0, seed=request.sampling.seed)
    assert request.stop_token_ids == SERVICE.stop_token_ids and request.timeout is None
    (chat,) = translate(HELLO).requests
    assert len(chat.prompt) + chat.max_tokens == SERVICE.max_model_len
    assert translate(SAY).requests[0].sampling.seed != request.sampling.seed
    (late,) = translate(SAY | {"prompt": "x" * 195}).requests
    assert late.max_tokens == 5  # the default gives way to the context, a wish does not


def test_defaults_of_the_model_and_of_the_server(tmp_path):
    assert read_defaults(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.6, "top_p": 0.9, "do_sample": true, "eos_token_id": 2}')
    defaults = read_defaults(tmp_path)
    (request,) = translate(SAY | {"top_p": 0.5}, defaults=defaults).requests
    assert (request.sampling.temperature, request.sampling.top_p) == (0.6, 0.5)
    (request,) = translate(SAY | {"timeout": 9}, timeout=4.0).requests
    assert request.timeout == 4.0
    for text in '{"top_p": 7}', '{"top_p": "a"}':
        file.write_text(text)
        with pytest.raises(ValueError, match="generation_config.json: "):
            read_defaults(tmp_path)


def test_seeds_count_up_and_wrap():
    seeds = lambda body: [r.sampling.seed for r in translate(SAY | body).requests]  # noqa: E731
    assert seeds({"seed": 5, "n": 3}) == [5, 6, 7]
    assert seeds({"seed": -1, "n": 2}) == [2**32 - 1, 0]
    same = [translate(SAY, seed=1).requests[0].sampling.seed for _ in range(2)]
    assert same[0] == same[1]


def test_speculation_is_asked_for_by_request():
    tree = lambda asked: translate(SAY | {"speculative": asked}).requests[0].tree  # noqa: E731
    assert tree({}) is None and tree({"enabled": True}) is None
    assert tree({"enabled": False}) == "plain" and tree({"tree": "plain"}) == "plain"
    assert tree({"enabled": True, "tree": "static:3"}) == "static:3"
    error = refused(SAY | {"speculative": {"tree": "oak"}})
    assert error.param == "speculative.tree" and "chain:2, static:3, plain" in str(error)


def test_speculation_without_a_draft():
    service = ScriptedService()
    service.trees = ("plain",)
    with pytest.raises(ApiError, match="no draft"):
        Translator(service).job(read(SAY | {"speculative": {"enabled": True}}), [])
    Translator(service).job(read(SAY | {"speculative": {"enabled": False}}), [])


def test_prompts_may_be_truncated():
    ids = byte_tokenizer().encode("0123456789")
    prompt = lambda **body: translate({"prompt": "0123456789"} | body).requests[0].prompt  # noqa: E731
    assert prompt(truncate_prompt_tokens=3) == tuple(ids[-3:])
    job = translate({"prompt": "0123", "truncate_prompt_tokens": 2, "echo": True})
    assert job.prompt_texts == ["23"]
    long = {"prompt": "x" * 500, "max_tokens": 50, "truncate_prompt_tokens": -1}
    assert len(translate(long).requests[0].prompt) == 150
    assert refused(long | {"truncate_prompt_tokens": 0}).param == "truncate_prompt_tokens"
    assert refused(long | {"truncate_prompt_tokens": 151}).param == "truncate_prompt_tokens"


def test_bad_words_are_found_behind_spaces_too():
    class Words:
        """A vocabulary with one token a word, with a space before it or not."""

        ids = {"a": (1,), " a": (2,), "bc": (3, 4), " bc": (5, 3, 4)}

        def encode(self, text, special=True):
            return list(self.ids.get(text, ()) or [9])

    service = ScriptedService()
    service.tokenizer = Words()
    (request,) = Translator(service).job(read(SAY | {"bad_words": ["a", " bc"]}), []).requests
    assert request.sampling.bad_words == ((1,), (2,), (3, 4))


def test_messages_of_all_kinds():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": parts, "name": "n"},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []},
        {"role": "user", "content": ""},
    ]  # fmt: skip
    (request,) = translate({"messages": messages, "add_generation_prompt": False}).requests
    text = "<system>s<end><user>a\nb<end><assistant>c<end><user><end>"
    assert list(request.prompt) == byte_tokenizer().encode(text)


# ---- what is refused ----------------------------------------------------------------------------

BAD_FIELDS = {
    "n": (0, -1, 129, 1.0, True, "1", [1]),
    "seed": (2**63, "1", 0.5),
    "temperature": (-0.1, math.nan, math.inf, "hot", True, [], 1e400),
    "top_p": (0, 1.01, math.nan),
    "top_k": (-2, 1.5, 2**40),
    "min_p": (-0.1, 1.1, -math.inf),
    "presence_penalty": (2.1, math.nan),
    "frequency_penalty": (-2.1, "a"),
    "repetition_penalty": (0, -1, math.inf),
    "min_tokens": (-1, 17, True),
    "max_tokens": (0, -1, 1.5, "4", 2**40, 200, True),
    "logit_bias": ([], {"a": 1}, {"258": 1}, {"-1": 1}, {"1": 101}, {"1": math.nan},
                   {"1": "x"}, {"1": True}, {str(i): 0 for i in range(1025)}),
    "allowed_token_ids": ([], [258], [-1], [True], "1", [1.0]),
    "bad_words": ([""], [1], ["x" * 9], ["x" * 257], [str(i) for i in range(MAX_WORDS + 1)]),
    "stop": ([""], 1, ["a"] * 17, ["x" * 257], {}, [["a"]]),
    "stop_token_ids": ([258], ["a"], list(range(17))),
    "logprobs": (-1, 21, True, "2"),
    "echo": (1, "yes"),
    "stream": (1, "true"),
    "stream_options": (True, {}, {"include_usage": True}),
    "timeout": (0, -1, math.inf, "1"),
    "priority": (2**31, 0.5),
    "request_id": ("", "a b", "x" * 129, 1),
    "cache_salt": ("x" * 257, 1),
    "truncate_prompt_tokens": (-2, "a"),
    "speculative": (True, [], "static:3"),
    "prompt": ("", [], [[]], ["a", 1], [1, "a"], [1.5], {}, [True], [[1], 2], ["a", ""], [258],
               ["a"] * 129, "x" * 200, "x" * 10**6, "\ud800"),
    "model": (1, ["a"]),
    "user": ("x" * 257, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_values_name_their_field(name):
    for value in BAD_FIELDS[name]:
        error = refused(SAY | {name: value})
        assert (error.param or "").split(".")[0] == name, (value, error)
        assert name in str(error) and len(str(error)) < 500
        json.dumps(error.body()).encode()


@pytest.mark.parametrize("body, param", [
    ({}, "prompt"), ({"messages": []}, "messages"), ({"messages": "x"}, "messages"),
    ({"messages": [1]}, "messages.0"), ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
     "messages.0.content.0.type"),
    (HELLO | {"top_logprobs": 2}, "top_logprobs"),
    (HELLO | {"logprobs": 2}, "logprobs"),
    (HELLO | {"max_completion_tokens": 0}, "max_completion_tokens"),
    (HELLO | {"max_completion_tokens": 200}, "max_completion_tokens"),
    (HELLO | {"max_tokens": 200}, "max_tokens"),
    (HELLO | {"prompt": "x"}, "prompt"), (HELLO | {"echo": True}, "echo"),
    (SAY | {"messages_": []}, "messages_"), (SAY | {"speculative": {"x": 1}}, "speculative.x"),
    ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages.0.x"),
    (HELLO | {"add_special_tokens": True}, "add_special_tokens"),
])  # fmt: skip
def test_bad_bodies_name_the_field(body, param):
    assert refused(body).param == param


@pytest.mark.parametrize("content", [
    b"", b"{", b"null", b"[]", b'"a"', b"\xff\xfe", b"[" * 10**5, b'{"a":' * 10**5,
    b'{"prompt":' + b"[" * 10**5 + b"]" * 10**5 + b"}", b'{"prompt": "a"',
    b'{"seed":' + b"9" * 5000 + b"}", b'{"prompt":"a","\\ud800":1}',
    b'{"prompt":"a","logit_bias":{"\\ud800":1}}', b'{"prompt":"a"}x',
])  # fmt: skip
def test_what_is_no_body(content):
    error = refused(content)
    json.dumps(error.body()).encode()
    assert len(str(error)) < 500


def test_a_long_prompt_is_refused_before_it_is_tokenized():
    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(name)

    service = ScriptedService()
    service.tokenizer = Untouchable()
    translator = Translator(service)
    long = "x" * (200 * 128 + 1)
    for body in {"prompt": long}, {"messages": [{"role": "user", "content": long}]}:
        with pytest.raises(ApiError, match="characters"):
            translator.job(read(body), [])
    with pytest.raises(ApiError, match="characters"):
        translator.prompts.tokens(read({"prompt": long}, TokenizeBody))


def test_null_is_not_there():
    nulls = {name: None for name in protocol.Generation.model_fields} | {"tools": None, "x": None}
    (request,) = translate(nulls | SAY).requests
    assert request.max_tokens == 16


@pytest.mark.parametrize("name", NOT_BUILT)
def test_fields_that_are_not_built_say_so(name):
    error = refused(SAY | {name: {"type": "json_object"}})
    assert error.param == name and NOT_BUILT[name] in str(error)
    for value in NEUTRAL.get(name, ()):
        translate(SAY | {name: value})


def test_fields_that_are_ignored_are_listed():
    body = HELLO | {"x": 1, "stream": True, "stream_options": {"y": 2}}
    content = json.dumps(body).encode()
    assert protocol.read(ChatBody, content, ignore_unknown=True)[1] == ["x", "stream_options.y"]


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
), st.sampled_from(sorted(CompletionBody.model_fields | ChatBody.model_fields.keys())))  # fmt: skip
def test_any_value_of_a_field_is_taken_or_refused(value, name):
    for body in SAY | {name: value}, HELLO | {name: value}:
        kind = CompletionBody if "prompt" in body and "messages" not in body else ChatBody
        try:
            job = Translator(SERVICE).job(read(body, kind), [])
        except ApiError as error:
            assert error.status == 400
            json.dumps(error.body()).encode()
        else:
            for request in job.requests:
                assert len(request.prompt) + request.max_tokens <= SERVICE.max_model_len


# ---- pairs of features --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first, second, endpoints", pairs(), ids=lambda value: getattr(value, "name", None)
)
def test_every_pair_is_as_the_table_says(first, second, endpoints):
    for endpoint in endpoints:
        body = example(BODIES[endpoint], TREE, first, second)
        assert first.is_in(body) and second.is_in(body)
        reason = REFUSED.get(frozenset({first.name, second.name}))
        if reason is None:
            assert translate(body).requests
        else:
            assert reason in str(refused(body))


def test_every_feature_is_told_apart():
    for feature, endpoint in itertools.product(FEATURES, BODIES):
        body = BODIES[endpoint]
        assert not feature.is_in(body)
        if endpoint in feature.endpoints:
            assert translate(example(body, TREE, feature)).requests


def test_the_table_speaks_of_features():
    names = {feature.name for feature in FEATURES}
    assert len(names) == len(FEATURES) and all(pair <= names for pair in REFUSED)
    text = explain()
    assert all(name in text for name in names)
    assert all(reason in text for reason in [*REFUSED.values(), *NOT_BUILT.values()])
    known = CompletionBody.model_fields | ChatBody.model_fields
    fields = {field for feature in FEATURES for field in feature.example}
    assert fields <= known.keys() | {"top_logprobs"}


def test_acceptance_of_nothing():
    nothing = {
        "mean_acceptance_length": 1.0, "draft_acceptance_rate": 0.0, "acceptance_histogram": [0],
        "num_spec_steps": 0, "num_accepted_draft_tokens": 0, "num_draft_tokens": 0,
        "num_spec_tokens": 0,
    }  # fmt: skip
    assert acceptance([]) == nothing
    assert sum(acceptance([stats(1, 9)])["acceptance_histogram"]) == 10
