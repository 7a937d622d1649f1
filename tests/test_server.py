"""The routes against a scripted service, and the program as its users start it.

The scripted service says the prompt again, a byte a token, so every expected text is plain to see.
"""

import json
import subprocess
import sys
import time

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.config import ServerConfig, SpeculativeConfig, parse
from serve.request import Draining, EngineStatus
from tests.serving import ROOT, ScriptedDeltas, ScriptedService, byte_tokenizer, hosted

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
SAY = {"prompt": "Hello", "max_tokens": 4}


@pytest.fixture(scope="module")
def server():
    with hosted(ScriptedService(), ServerConfig(served_model_name=("tiny", "other"))) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with httpx2.Client(base_url=server.url, timeout=30) as client:
        yield client


def events(response: httpx2.Response) -> list:
    """The events of a stream, without the last one, which has to be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def refusal(response: httpx2.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error


# ---- generation ---------------------------------------------------------------------------------


def test_completion(client):
    answer = client.post(COMPLETIONS, json=SAY).json()
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": 0, "text": "Hell", "logprobs": None, "finish_reason": "length",
         "stop_reason": None}
    ]  # fmt: skip
    assert answer["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 1},
    }  # fmt: skip


def test_chat(client):
    answer = client.post(CHAT, json=HELLO).json()
    assert answer["object"] == "chat.completion"
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "<use"}
    prompt = "<user>Hello<end><assistant>"
    assert answer["usage"]["prompt_tokens"] == len(byte_tokenizer().encode(prompt))


def test_chat_takes_parts_and_defaults_to_the_whole_context(client, server):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "user", "content": parts}]}
    answer = client.post(CHAT, json=body).json()
    assert answer["choices"][0]["message"]["content"].startswith("<user>a\nb")
    assert answer["usage"]["total_tokens"] == server.service.max_model_len


@pytest.mark.parametrize("path, body", [(CHAT, HELLO), (COMPLETIONS, SAY)])
def test_a_stream_adds_up_to_the_whole_answer(client, path, body):
    asked = body | {"n": 2, "return_token_ids": True}
    whole = client.post(path, json=asked).json()
    options = {"include_usage": True}
    chunks = events(client.post(path, json=asked | {"stream": True, "stream_options": options}))
    *chunks, last = chunks
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    assert all(chunk["usage"] is None for chunk in chunks)
    for index, choice in enumerate(whole["choices"]):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        if path == CHAT:
            assert own[0]["delta"]["role"] == "assistant"
            text = "".join(c["delta"].get("content", "") for c in own)
            assert text == choice["message"]["content"]
        else:
            assert "".join(c["text"] for c in own) == choice["text"]
        assert sum((c["token_ids"] for c in own), []) == choice["token_ids"]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["length"]


def test_continuous_usage(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(
        client.post(COMPLETIONS, json=SAY | {"stream": True, "stream_options": options})
    )
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]
    assert "usage" not in events(client.post(COMPLETIONS, json=SAY | {"stream": True}))[0]


def test_logprobs_of_a_completion(client):
    body = SAY | {"logprobs": 2}
    whole = client.post(COMPLETIONS, json=body).json()["choices"][0]["logprobs"]
    assert whole["tokens"] == list("Hell") and whole["text_offset"] == [0, 1, 2, 3]
    assert whole["token_logprobs"] == [-0.5] * 4
    other = byte_tokenizer().decode([7])
    assert whole["top_logprobs"][0] == {"H": -0.5, other: -1.5}
    chunks = events(client.post(COMPLETIONS, json=body | {"stream": True}))
    for name in whole:
        parts = [chunk["choices"][0]["logprobs"][name] for chunk in chunks]
        assert sum(parts, []) == whole[name]


def test_logprobs_of_a_chat(client):
    body = HELLO | {"logprobs": True, "top_logprobs": 1}
    choice = client.post(CHAT, json=body).json()["choices"][0]
    first = {"token": "<", "logprob": -0.5, "bytes": [60]}
    assert choice["logprobs"]["content"][0] == first | {"top_logprobs": [first]}
    assert len(choice["logprobs"]["content"]) == 4


def test_echo_prompts_and_choices(client, server):
    body = {"prompt": ["One", "Two"], "n": 2, "seed": 2**32 - 1, "echo": True, "max_tokens": 3}
    answer = client.post(COMPLETIONS, json=body).json()
    assert [c["text"] for c in answer["choices"]] == ["OneOne"] * 2 + ["TwoTwo"] * 2
    assert answer["usage"]["prompt_tokens"] == 6 and answer["usage"]["completion_tokens"] == 12
    assert [r.sampling.seed for r in server.service.requests[-4:]] == [2**32 - 1, 0] * 2
    ids = byte_tokenizer().encode("Hi")
    answer = client.post(COMPLETIONS, json={"prompt": ids, "echo": True, "max_tokens": 2}).json()
    assert answer["choices"][0]["text"] == "HiHi"


def test_acceptance_statistics_of_each_choice_and_of_all(client):
    body = SAY | {"n": 2, "speculative": {"stats": True}}
    answer = client.post(COMPLETIONS, json=body).json()
    one = {
        "mean_acceptance_length": 1.8, "draft_acceptance_rate": pytest.approx(8 / 30),
        "acceptance_histogram": [4, 4, 2], "num_spec_steps": 10, "num_accepted_draft_tokens": 8,
        "num_draft_tokens": 30, "num_spec_tokens": 2,
    }  # fmt: skip
    assert [c["metrics"]["speculative_decoding"] for c in answer["choices"]] == [one, one]
    both = answer["metrics"]["speculative_decoding"]
    assert both["acceptance_histogram"] == [8, 8, 4] and both["mean_acceptance_length"] == 1.8
    chunks = events(client.post(COMPLETIONS, json=body | {"stream": True}))
    last = [c for c in chunks if c["choices"][0]["finish_reason"]]
    assert [c["choices"][0]["metrics"]["speculative_decoding"] for c in last] == [one, one]


def test_ids_of_requests(client, server):
    answer = client.post(COMPLETIONS, json=SAY, headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1" and answer.json()["id"] == "cmpl-mine-1"
    assert server.service.requests[-1].id.startswith("mine-1-")
    answer = client.post(COMPLETIONS, json=SAY, headers={"X-Request-Id": "bad id\u00e9".encode()})
    assert answer.headers["x-request-id"].isalnum()
    assert client.post(COMPLETIONS, json=SAY | {"request_id": "b"}).json()["id"] == "cmpl-b"


# ---- the other routes ---------------------------------------------------------------------------


def test_models(client, server):
    models = client.get("/v1/models").json()
    assert [card["id"] for card in models["data"]] == ["tiny", "other"]
    card = client.get("/v1/models/other").json()
    assert card["max_model_len"] == server.service.max_model_len
    assert refusal(client.get("/v1/models/none"), 404)["code"] == "model_not_found"
    assert client.post(COMPLETIONS, json=SAY | {"model": "other"}).json()["model"] == "tiny"


def test_tokenize_and_back(client, server):
    text = "H\u00e4llo <end>"
    answer = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == byte_tokenizer().encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["token_strs"][-1] == "<end>" and answer["max_model_len"] == 200
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = client.post("/tokenize", json={"messages": HELLO["messages"]}).json()
    assert chat["tokens"] == byte_tokenizer().encode("<user>Hello<end><assistant>")
    assert refusal(client.post("/tokenize", json={}), 400)["param"] == "prompt"
    assert refusal(client.post("/detokenize", json={"tokens": [-1]}), 400)["param"] == "tokens"


def test_small_routes(client, server):
    for path in "/health", "/ping":
        assert client.get(path).status_code == 200
    assert client.get("/load").json() == {"server_load": 0}
    assert client.get("/version").json()["version"].count(".") == 2
    before = server.service.forgotten
    assert client.post("/reset_prefix_cache").status_code == 200
    assert server.service.forgotten == before + 1


def test_metrics_have_vllms_names(client):
    client.post(COMPLETIONS, json=SAY)
    page = client.get("/metrics")
    families = {f.name: f for f in text_string_to_metric_families(page.text)}
    samples = {
        (
            s.name,
            *(v for k, v in sorted(s.labels.items()) if k not in ("model_name", "engine")),
        ): s.value
        for family in families.values()
        for s in family.samples
    }
    for key, value in {
        ("vllm:num_requests_running",): 0, ("vllm:num_requests_waiting",): 2,
        ("vllm:kv_cache_usage_perc",): 0.25, ("vllm:prompt_tokens_total",): 10,
        ("vllm:generation_tokens_total",): 20, ("vllm:num_preemptions_total",): 0,
        ("vllm:spec_decode_num_drafts_total",): 5,
        ("vllm:spec_decode_num_draft_tokens_total",): 10,
        ("vllm:spec_decode_num_accepted_tokens_total",): 4,
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", "1"): 1,
        ("jax_eagle:spec_decode_accepted_tokens_by_depth_total", "1"): 3,
        ("jax_eagle:spec_decode_accepted_tokens_by_rank_total", "0"): 3,
        ("jax_eagle:spec_decode_target_calls_by_tree_total", "plain"): 1,
        ("jax_eagle:spec_decode_accepted_tokens_per_node", "static:3"): 0.4,
        ("jax_eagle:leaked_pages",): 0, ("jax_eagle:compilations_since_warm_total",): 0,
        ("jax_eagle:host_share",): 0.25,
    }.items():  # fmt: skip
        assert samples[key] == value, key
    assert samples["vllm:request_success_total", "length"] >= 1
    assert samples["vllm:time_to_first_token_seconds_count",] >= 1
    assert samples["vllm:request_queue_time_seconds_sum",] >= 0.1
    assert samples["http_requests_total", COMPLETIONS, "POST", "200"] >= 1


def test_histograms_count_tokens_and_choices(client):
    def count(name):
        for line in client.get("/metrics").text.splitlines():
            if line.startswith(f"vllm:{name}_count"):
                return float(line.split()[-1])
        raise AssertionError(name)

    names = ("time_to_first_token_seconds", "inter_token_latency_seconds",
             "request_generation_tokens")  # fmt: skip
    before = [count(name) for name in names]
    client.post(COMPLETIONS, json=SAY | {"n": 2, "max_tokens": 5})
    gained = [count(name) - old for name, old in zip(names, before, strict=True)]
    assert gained == [2, 8, 2]


# ---- refusals -----------------------------------------------------------------------------------


def test_unknown_routes_and_methods(client):
    assert "no such route" in refusal(client.get("/v2/x"), 404)["message"]
    answer = client.get(COMPLETIONS)
    refusal(answer, 405)
    assert answer.headers["allow"] == "POST"
    assert refusal(client.post(COMPLETIONS, json=SAY | {"model": "no"}), 404)["param"] == "model"


def test_bad_bodies_name_the_field(client):
    for body, param in (
        (SAY | {"temperature": -1}, "temperature"),
        (SAY | {"top_p": 0}, "top_p"),
        (SAY | {"max_tokens": "4"}, "max_tokens"),
        (SAY | {"frobnicate": 1}, "frobnicate"),
        (SAY | {"prompt": [258]}, "prompt"),
        (SAY | {"prompt": "x" * 200}, "prompt"),
        (SAY | {"prompt": "x" * 198}, "max_tokens"),
        (SAY | {"speculative": {"tree": "oak"}}, "speculative.tree"),
    ):
        error = refusal(client.post(COMPLETIONS, json=body), 400)
        assert error["param"] == param and param in error["message"]
    assert (
        "guided decoding is not built"
        in refusal(
            client.post(CHAT, json=HELLO | {"response_format": {"type": "json_object"}}), 400
        )["message"]
    )
    messages = [{"role": "assistant", "content": "I am first"}]
    error = refusal(client.post(CHAT, json={"messages": messages}), 400)
    assert error["param"] == "messages" and "the user speaks first" in error["message"]


def test_unknown_fields_are_listed_where_they_are_ignored():
    with hosted(ScriptedService(), ServerConfig(ignore_unknown_fields=True)) as server:
        body = SAY | {"frobnicate": 1, "stream_options": {"x": 2}, "stream": True}
        whole = httpx2.post(server.url + COMPLETIONS, json=SAY | {"frobnicate": 1}).json()
        assert whole["ignored_fields"] == ["frobnicate"]
        chunks = events(httpx2.post(server.url + COMPLETIONS, json=body))
        assert chunks[0]["ignored_fields"] == ["frobnicate", "stream_options.x"]
        assert all("ignored_fields" not in chunk for chunk in chunks[1:])
        tools = SAY | {"guided_json": {}}
        refusal(httpx2.post(server.url + COMPLETIONS, json=tools), 400)


def test_keys_guard_what_costs():
    with hosted(ScriptedService(), ServerConfig(api_key=("one", "two"))) as server:

        def post(path, key=None, body=SAY):
            headers = {} if key is None else {"Authorization": key}
            return httpx2.post(server.url + path, json=body, headers=headers)

        for key in None, "Bearer", "Bearer wrong", "Basic one", "one", "Bearer one two":
            answer = post(COMPLETIONS, key)
            assert refusal(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in "/tokenize", "/detokenize", "/reset_prefix_cache", "/v1/nothing":
            refusal(post(path, "Bearer x"), 401)
        for key in "Bearer one", "Bearer two", "bearer  two":
            assert post(COMPLETIONS, key).status_code == 200
        for path in "/health", "/ping", "/version", "/load", "/metrics":
            assert httpx2.get(server.url + path).status_code == 200


def test_a_full_queue_says_when_to_come_back():
    with hosted(ScriptedService(room=3)) as server:
        answer = httpx2.post(server.url + COMPLETIONS, json=SAY | {"n": 4})
        assert refusal(answer, 429)["type"] == "rate_limit_error"
        assert answer.headers["retry-after"] == "7"
        assert httpx2.post(server.url + COMPLETIONS, json=SAY | {"n": 3}).status_code == 200


def test_not_ready_and_draining():
    with hosted(ScriptedService()) as server:
        server.service.ready = False
        for answer in (
            httpx2.get(server.url + "/health"),
            httpx2.post(server.url + COMPLETIONS, json=SAY),
            httpx2.post(server.url + "/tokenize", json={"prompt": "a"}),
        ):
            refusal(answer, 503)
            assert int(answer.headers["retry-after"]) > 0
        server.service.ready = True

        def refuse(requests):
            raise Draining

        server.service.submit = refuse
        refusal(httpx2.post(server.url + COMPLETIONS, json=SAY), 503)


def test_loading_answers_what_it_can():
    with hosted(ScriptedService()) as server:
        server.api.service = None
        refusal(httpx2.get(server.url + "/health"), 503)
        assert httpx2.get(server.url + "/v1/models").json()["data"][0]["max_model_len"] is None
        assert "vllm:num_requests_running" not in httpx2.get(server.url + "/metrics").text


@pytest.mark.parametrize("reason, status", [("error", 500), ("abort", 503)])
def test_requests_that_fail(reason, status):
    with hosted(ScriptedService(reason=reason)) as server:
        refusal(httpx2.post(server.url + CHAT, json=HELLO), status)
        *chunks, last = events(httpx2.post(server.url + CHAT, json=HELLO | {"stream": True}))
        assert len(chunks) == 3 and last["error"]["type"]


def test_a_bug_gives_a_500_without_its_trace():
    with hosted(ScriptedService()) as server:

        def broken(requests):
            raise KeyError("secret")

        server.service.submit = broken
        assert "secret" not in refusal(httpx2.post(server.url + CHAT, json=HELLO), 500)["message"]


def test_a_bug_in_the_middle_of_a_stream_is_its_last_event():
    class BrokenDeltas(ScriptedDeltas):
        async def __anext__(self):
            if self._next:
                raise KeyError("secret")
            return await super().__anext__()

    class Broken(ScriptedService):
        def submit(self, requests):
            super().submit(requests)
            return [BrokenDeltas(self, request) for request in requests]

    with hosted(Broken()) as server:
        *chunks, last = events(httpx2.post(server.url + CHAT, json=HELLO | {"stream": True}))
        assert len(chunks) == 1 and last["error"]["type"] == "server_error"
        assert "secret" not in last["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_requests(stream):
    with hosted(ScriptedService(delay=0.02)) as server:
        body = HELLO | {"max_tokens": 150, "n": 2, "stream": stream}
        try:
            with httpx2.stream("POST", server.url + CHAT, json=body, timeout=0.4) as answer:
                next(answer.iter_lines())
        except httpx2.ReadTimeout:
            assert not stream
        end = time.monotonic() + 5
        while len(server.service.aborted) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert len(server.service.aborted) == 2 and not server.service.open
        page = httpx2.get(server.url + "/metrics").text
        assert 'vllm:request_success_total{engine="0",finished_reason="abort"' in page
        assert httpx2.get(server.url + "/load").json() == {"server_load": 0}


# ---- the program --------------------------------------------------------------------------------


def program(*arguments):
    command = [sys.executable, "-X", "importtime", "-m", "serve.server", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("flag, expected", [
    ("--help", "--speculative-config JSON"), ("--explain", "echo with logprobs"),
    ("--version", "jax-eagle "),
])  # fmt: skip
def test_texts_need_no_jax(flag, expected):
    done = program(flag)
    assert done.returncode == 0 and expected in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"jax", "transformers", "uvicorn"}


def test_bad_flags_give_one_line():
    done = program("--port", "none")
    assert done.returncode == 2 and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert errors == ["serve.server: error: --port is 'none', expected a whole number"]


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text(
        "model: ./llama\nmax-num-seqs: 4\nport: 9000\nbatch_buckets: [1, 4]\n"
        "speculative-config: {tree: [[2, 'static:8'], [null, plain]], model: ./eagle}\n"
        "enable-prefix-caching: false\nrequest-timeout: null\n"
    )
    config = parse(["--config", str(path), "--port", "9001", "--api-key", "a", "--api-key", "b"])
    assert config.config == ServerConfig(
        model="./llama", max_num_seqs=4, port=9001, batch_buckets=(1, 4), api_key=("a", "b"),
        speculative_config=SpeculativeConfig(
            model="./eagle", tree=((2, "static:8"), (None, "plain"))
        ),
        enable_prefix_caching=False, request_timeout=None,
    )  # fmt: skip


BAD_FLAGS = {
    "--nothing": "unrecognized arguments: --nothing",
    "--seed": "expected one argument",
    "--port=70000": "--port is 70000, expected from 0 to 65535",
    "--port=8.5": "--port is '8.5', expected a whole number",
    "--shutdown-timeout=nan": "expected a number",
    "--stream-timeout=0": "expected 0.01 or more",
    "--dtype=int8": "expected one of auto, float32",
    "--batch-buckets=0": "--batch-buckets is 0, expected 1 or more",
    "--api-key=": "--api-key",
    "--config=/nothing.yaml": "No such file",
    "--speculative-config={": "is no JSON",
    "--speculative-config=[]": "expected an object",
    '--speculative-config={"k": 1}': "unknown key 'k'",
    '--speculative-config={"method": "medusa"}': "expected 'eagle'",
    '--speculative-config={"tree": "auto", "num_speculative_tokens": 2}': "give one of them",
    '--speculative-config={"num_speculative_tokens": 0}': "expected 1 or more",
    '--speculative-config={"tree": [[4, "chain:1"]]}': "the last one is null",
    '--speculative-config={"tree": [[4, "a"], [2, "b"], [null, "c"]]}': "have to rise",
}


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_bad_flags_say_what_is_expected(flag):
    with pytest.raises(ValueError) as refused:
        parse([flag])
    assert BAD_FLAGS[flag] in str(refused.value)


@pytest.mark.parametrize("text, expected", [
    ("max-seqs: 4", "unknown key 'max-seqs'"), ("port: true", "port is True"), ("- a", "keys and"),
    ("a: [", "not YAML"), ("model: 3", "model is 3, expected a text"),
    ("api-key: [1]", "expected a text"), ("enable-prefix-caching: 1", "expected true or false"),
])  # fmt: skip
def test_bad_files_say_what_is_expected(tmp_path, text, expected):
    path = tmp_path / "server.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as refused:
        parse(["--config", str(path)])
    assert str(path) in str(refused.value) and expected in str(refused.value)


def test_num_speculative_tokens_is_a_chain():
    config = SpeculativeConfig.parse('{"num_speculative_tokens": 3}')
    assert config == SpeculativeConfig(tree=((None, "chain:3"),))
    assert SpeculativeConfig.parse("none") is None


def test_the_load_line(caplog):
    from serve.log import LoadLine

    line = LoadLine(EngineStatus())
    line.write(EngineStatus())
    assert not caplog.records
    with caplog.at_level("INFO", logger="serve"):
        busy = ScriptedService().status()
        line.write(busy)
        line.write(busy)
        line.write(busy)
    first, *rest = [record.fields for record in caplog.records]
    assert first["waiting"] == 2 and first["kv_use"] == 0.25 and first["host_share"] == 0.25
    assert first["acceptance_length"] == pytest.approx(1 + 4 / 6)
    assert first["generation_tokens_per_second"] > 0
    assert all(fields["generation_tokens_per_second"] == 0 for fields in rest)
