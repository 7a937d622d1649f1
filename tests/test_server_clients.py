"""A server process with a real (tiny) model, as clients use it: openai, langchain, curl.

The model's weights are random, so its texts are noise; what is tested is that every client gets the
same noise as `generate` gives, in the form that it expects.
"""

import asyncio
import json
import shutil
import subprocess
import sys
import threading
import time

import httpx2
import openai
import pytest
from langchain_openai import ChatOpenAI

from jax_eagle import generate, load_target
from serve.features import CHAT, COMPLETIONS, REFUSED, pairs
from tests.serving import ROOT, ServerProcess, example, tiny_server

pytestmark = pytest.mark.usefixtures("quick_compiler")

KEY = "secret"
PROMPT = "The quick brown fox"
MESSAGES = [{"role": "user", "content": PROMPT}]
PLAIN = {"speculative": {"enabled": False}}
NO_END = {"ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def server(folder):
    with tiny_server(folder, "--api-key", KEY) as server:
        yield server
        page = httpx2.get(server.url + "/metrics").text
        values = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")
        assert values['jax_eagle:leaked_pages{engine="0",model_name="tiny"}'] == "0.0"
        assert (
            values['jax_eagle:compilations_since_warm_total{engine="0",model_name="tiny"}'] == "0.0"
        )
        assert values['vllm:num_requests_running{engine="0",model_name="tiny"}'] == "0.0"
        assert server.stop() == 0
        assert "Traceback" not in server.text() and "stopped" in server.lines[-1]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


def chat(client, **options):
    return client.chat.completions.create(
        **{"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0} | options
    )


def complete(client, **options):
    return client.completions.create(
        **{"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0} | options
    )


# ---- the openai client --------------------------------------------------------------------------


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


def test_the_text_is_that_of_generate(client, folder):
    target = load_target(folder / "target")
    assert target.tokenizer is not None
    expected = generate(target, None, [PROMPT], max_new_tokens=40).tokens[0]
    for extra in {}, PLAIN, {"speculative": {"tree": "static:3"}}:
        answer = complete(client, max_tokens=40, extra_body=extra | {"return_token_ids": True})
        assert answer.choices[0].token_ids == expected
        assert answer.usage.completion_tokens == len(expected)
        text = target.tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.choices[0].text == text


def test_chat_and_its_stream(client):
    whole = chat(client)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    finish = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert finish[-1] == whole.choices[0].finish_reason and set(finish[:-1]) <= {None}
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_sdks_own_stream_helper(client):
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, max_tokens=8) as stream:
        kinds = {event.type for event in stream}
        final = stream.current_completion_snapshot
    assert "content.delta" in kinds and final.choices[0].message.content


def test_completion_stream(client):
    whole = complete(client, n=2, seed=3, temperature=1.0, extra_body=NO_END)
    stream = complete(client, n=2, seed=3, temperature=1.0, extra_body=NO_END, stream=True)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_seeds(client):
    def text(**options):
        body = NO_END | options.pop("extra", {})
        options = {"temperature": 1.0} | options
        return [c.text for c in complete(client, extra_body=body, **options).choices]

    first = text(seed=5, n=2)
    assert text(seed=5, n=2) == first and text(seed=5) == first[:1] and text(seed=6) == first[1:]
    assert text(seed=5, extra=PLAIN) == first[:1]
    assert len({text()[0] for _ in range(3)}) == 3


def test_logprobs(client):
    content = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.logprob == entry.top_logprobs[0].logprob <= 0 for entry in content)  # greedy
    logprobs = complete(client, logprobs=2).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    ranked = [sorted(top.values(), reverse=True) for top in logprobs.top_logprobs]
    assert [top[0] for top in ranked] == logprobs.token_logprobs


def test_stop(client):
    full = complete(client, max_tokens=30, extra_body=NO_END).choices[0].text
    stop = next(c for c in full[3:] if c.isascii() and full.index(c) > 0)
    choice = complete(client, max_tokens=30, stop=[stop], extra_body=NO_END).choices[0]
    assert choice.finish_reason == "stop" and choice.stop_reason == stop
    assert choice.text == full[: full.index(stop)]
    kept = complete(
        client, max_tokens=30, stop=stop, extra_body=NO_END | {"include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == choice.text + stop


def test_controls_hold(client):
    only = {"allowed_token_ids": list(range(64, 70)), "return_token_ids": True, **NO_END}
    ids = complete(client, extra_body=only).choices[0].token_ids
    assert len(ids) == 12 and set(ids) <= set(range(64, 70))
    wanted = complete(client, logit_bias={"65": 100}, extra_body={"return_token_ids": True})
    assert set(wanted.choices[0].token_ids) == {65}


def test_acceptance_statistics(client):
    body = {"speculative": {"stats": True}, **NO_END}
    answer = complete(client, n=2, extra_body=body)
    both = answer.metrics["speculative_decoding"]
    each = [choice.metrics["speculative_decoding"] for choice in answer.choices]
    assert both["num_spec_steps"] == sum(one["num_spec_steps"] for one in each) > 0
    # One token comes from prefill, the others from rounds: one each, and what was accepted.
    assert all(1 + o["num_spec_steps"] + o["num_accepted_draft_tokens"] >= 12 for o in each)


@pytest.mark.parametrize("error, options", [
    (openai.BadRequestError, {"temperature": -1}),
    (openai.BadRequestError, {"extra_body": {"guided_json": {}}}),
    (openai.BadRequestError, {"response_format": {"type": "json_object"}}),
    (openai.NotFoundError, {"model": "gpt-5"}),
])  # fmt: skip
def test_errors(client, error, options):
    with pytest.raises(error) as caught:
        chat(client, **options)
    body = caught.value.body
    assert body["message"] and body["type"]
    assert body["param"] == next(iter(options.get("extra_body", options)))


def test_a_wrong_key(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="no", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            chat(client)


# ---- other clients ------------------------------------------------------------------------------


def test_langchain(server, client):
    expected = chat(client).choices[0].message.content
    model = ChatOpenAI(
        base_url=server.url + "/v1", api_key=KEY, model="tiny", temperature=0, max_tokens=12
    )
    answer = model.invoke(PROMPT)
    assert answer.content == expected
    assert answer.usage_metadata["output_tokens"] == chat(client).usage.completion_tokens
    assert "".join(chunk.content for chunk in model.stream(PROMPT)) == expected


def test_curl(server, client):
    curl = shutil.which("curl")
    assert curl, "curl is needed"
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}

    def run(*options, data=None):
        command = [curl, "-sS", "-N", "-H", f"Authorization: Bearer {KEY}", *options]
        if data is not None:
            command += ["-H", "Content-Type: application/json", "-d", json.dumps(data)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout

    url = server.url + "/v1/completions"
    assert json.loads(run(url, data=body))["choices"][0]["text"] == complete(client).choices[0].text
    lines = run(url, data=body | {"stream": True}).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert run("-w", "%{http_code}", "-o", "/dev/null", server.url + "/health") == "200"


# ---- everything with everything -----------------------------------------------------------------


def test_every_pair_of_features_runs(server):
    """The table of features against the engine: what it says is supported answers."""
    bodies = {
        CHAT: {"messages": MESSAGES, "max_tokens": 3},
        COMPLETIONS: {"prompt": PROMPT, "max_tokens": 3},
    }
    paths = {CHAT: "/v1/chat/completions", COMPLETIONS: "/v1/completions"}
    work = [
        (first, second, endpoint)
        for first, second, endpoints in pairs()
        for endpoint in endpoints
        if frozenset({first.name, second.name}) not in REFUSED
    ]

    async def run():
        headers, free = {"Authorization": f"Bearer {KEY}"}, asyncio.Semaphore(8)
        async with httpx2.AsyncClient(base_url=server.url, headers=headers, timeout=120) as client:

            async def one(first, second, endpoint):
                body = {"max_tokens": 3} | example(bodies[endpoint], "static:3", first, second)
                async with free:
                    answer = await client.post(paths[endpoint], json=body)
                assert answer.status_code == 200, (first.name, second.name, answer.text)
                finish = '"finish_reason":"' if body.get("stream") else '"finish_reason"'
                assert finish in answer.text and '"error"' not in answer.text

            await asyncio.gather(*(one(*entry) for entry in work))

    asyncio.run(run())


# ---- the end ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_a_socket(folder, tmp_path_factory):
    """A server with its own template and logs in JSON, and the socket that it listens on."""
    own = tmp_path_factory.mktemp("own")
    (own / "template").write_text("{{ 'say ' + messages[0]['content'] }}")
    flags = ("--chat-template", str(own / "template"), "--uds", str(own / "socket"))
    more = ("--log-format", "json", "--log-stats-interval", "0.2", "--shutdown-timeout", "0")
    with tiny_server(folder, *flags, *more) as server:
        yield server, str(own / "socket")


def stream_in_thread(url, uds=None, **options):
    """Reads a stream beside the test: (thread, lines so far)."""
    lines, begun = [], threading.Event()

    def read():
        body = {"prompt": PROMPT, "max_tokens": 200, "stream": True, "ignore_eos": True} | options
        with (
            httpx2.Client(transport=httpx2.HTTPTransport(uds=uds), timeout=60) as client,
            client.stream("POST", url + "/v1/completions", json=body) as answer,
        ):
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(60)
    return thread, lines


def test_sigterm_lets_requests_finish_and_refuses_new_ones(folder):
    with tiny_server(folder, "--shutdown-timeout", "60") as server:
        readers = [stream_in_thread(server.url) for _ in range(6)]
        server.process.terminate()
        server.wait_for("draining")
        answer = httpx2.get(server.url + "/health")
        assert answer.status_code == 503 and "retry-after" in answer.headers
        for thread, lines in readers:
            thread.join(60)
            assert lines[-2] == "data: [DONE]"
            assert '"finish_reason":"length"' in lines[-4]
        assert server.process.wait(60) == 0


def test_a_socket_a_template_and_logs_in_json(on_a_socket):
    server, path = on_a_socket
    transport = httpx2.HTTPTransport(uds=path)
    with httpx2.Client(transport=transport, base_url="http://server") as client:
        ids = client.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
        text = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
        assert text == "say " + PROMPT
        client.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "mine"})
    server.wait_for('"message": "load"')
    lines = [json.loads(line) for line in server.lines]
    (done,) = [line for line in lines if line.get("request_id") == "mine"]
    assert done["status"] == 200 and done["prompt_tokens"] == 1
    assert {"running", "waiting", "kv_use", "acceptance_length"} <= lines[-1].keys()


def test_sigterm_at_once_tells_the_clients(on_a_socket):
    """The last test of this server."""
    server, path = on_a_socket
    readers = [stream_in_thread("http://server", path, n=3) for _ in range(4)]
    begin = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begin < 15
    for thread, lines in readers:
        thread.join(60)
        assert lines[-2] == "data: [DONE]"
        assert '"finish_reason":"length"' in lines[-4] or '"error"' in lines[-4]


def test_sigterm_while_loading(server, folder):
    with ServerProcess(folder / "target", "--speculative-config", "none") as loading:
        begin = time.monotonic()
        assert loading.stop() == 0
        assert time.monotonic() - begin < 15
        assert "stopped while loading" in loading.lines[-1]


ONE_BY_ONE = """
import json, sys
from serve.server import main

for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        print("ended with", end.code, file=sys.stderr)
"""
"""The program once for each list of arguments, in a process that has imported it."""


def test_what_cannot_be_served_is_one_line(server, folder):
    target, port = folder / "target", httpx2.URL(server.url).port
    free = ("--port", 0)
    plain = ("--speculative-config", "none", *free)
    oak = json.dumps({"model": str(folder / "draft"), "tree": "oak"})
    cases = {
        "no such file or folder": (folder / "nothing", *free),
        "no draft is known": (target, *free),
        "Address already in use": (target, "--port", port),
        "this model's context holds 256": (target, "--max-model-len", 300, *plain),
        "--max-num-seqs is 2": (target, "--max-num-seqs", 2, "--batch-buckets", 4, *plain),
        "unknown tree 'oak'": (target, "--speculative-config", oak, *free),
    }
    arguments = json.dumps([[str(argument) for argument in case] for case in cases.values()])
    command = [sys.executable, "-c", ONE_BY_ONE, arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    *texts, rest = done.stderr.split("ended with 2\n")
    assert len(texts) == len(cases) and not rest, done.stderr
    for message, text in zip(cases, texts, strict=True):
        last = text.splitlines()[-1]
        assert last.startswith("serve.server: error: ") and message in last
