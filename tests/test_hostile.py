"""Clients that mean harm or are broken: a clear 4xx or a closed connection, and others unharmed."""

import contextlib
import dataclasses
import json
import socket
import struct
import threading
import time
from pathlib import Path

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve import connection
from serve.config import ServerConfig
from serve.protocol import ChatBody, CompletionBody
from tests.serving import ScriptedDeltas, ScriptedService, hosted, tiny_server

pytestmark = pytest.mark.usefixtures("quick_compiler")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAY = {"prompt": "Hello", "max_tokens": 4}
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
BODY_LIMIT = 200_000


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """A real model in a process of its own."""
    limit = ("--max-request-body-size", str(BODY_LIMIT), "--stream-timeout", "5")
    with tiny_server(tmp_path_factory.mktemp("tiny"), *limit) as server:
        yield server
        page = httpx2.get(server.url + "/metrics").text
        values = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[0] != "#")
        assert values['jax_eagle:leaked_pages{engine="0",model_name="tiny"}'] == "0.0"
        assert (
            values['jax_eagle:compilations_since_warm_total{engine="0",model_name="tiny"}'] == "0.0"
        )
        assert server.stop() == 0
        assert server.text().partition("Traceback")[2] == ""


@pytest.fixture(scope="module")
def client(process):
    with httpx2.Client(base_url=process.url, timeout=120) as client:
        yield client


@pytest.fixture
def neighbour(process):
    """A well-behaved client that asks again and again, and must always be answered alike."""
    stop, texts, slowest = threading.Event(), [], [0.0]

    def ask():
        body = SAY | {"temperature": 0, "ignore_eos": True}
        with httpx2.Client(base_url=process.url, timeout=60) as client:
            while not stop.is_set() or not texts:
                begin = time.monotonic()
                texts.append(client.post(COMPLETIONS, json=body).json()["choices"][0]["text"])
                slowest[0] = max(slowest[0], time.monotonic() - begin)

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    stop.set()
    thread.join(60)
    assert len(set(texts)) == 1
    assert slowest[0] < 20


def resident_bytes(server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def refused(answer: httpx2.Response) -> dict:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error["message"] and len(answer.text) < 2000
    return error


@contextlib.contextmanager
def raw(port: int, content: bytes = b""):
    """A bare connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        if content:
            sock.sendall(content)
        yield sock


def is_closed(sock: socket.socket, seconds: float) -> bool:
    """Whether the server ends the connection within so long, whatever it says before."""
    sock.settimeout(seconds)
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def post_head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


# ---- bodies -------------------------------------------------------------------------------------

HUGE = {
    "stop strings": SAY | {"stop": [str(i) for i in range(10_000)]},
    "long stop string": SAY | {"stop": "x" * 100_000},
    "prompt": SAY | {"prompt": "x" * 150_000},
    "messages": {"messages": [{"role": "user", "content": "x"}] * 4_000},
    "prompts": SAY | {"prompt": ["x"] * 10_000},
    "choices": SAY | {"n": 10**9},
    "biases": SAY | {"logit_bias": {str(i): 1 for i in range(10_000)}},
    "bad words": SAY | {"bad_words": ["x"] * 10_000 + ["y" * 9]},
    "allowed": SAY | {"allowed_token_ids": [10**30] * 100},
    "name": SAY | {"x" * 100_000: 1},
    "number": SAY | {"max_tokens": 10**400},
    "text": SAY | {"prompt": "\u0000" * 30_000},
    "role": HELLO | {"messages": [{"role": "x" * 100_000, "content": "a"}]},
}


@pytest.mark.parametrize("case", HUGE)
def test_huge_values(client, neighbour, case):
    body = HUGE[case]
    path = CHAT if "messages" in body else COMPLETIONS
    begin = time.monotonic()
    refused(client.post(path, json=body))
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("content", [
    b"", b"{", b"\x00" * 1000, b'{"prompt": NaN}', b'{"prompt":"a","temperature":NaN}',
    b'{"prompt":"a","top_p":Infinity}', b'{"prompt":"a","min_p":-Infinity}',
    b'{"prompt":"a","temperature":1e999}', b"[" * 100_000, b'{"prompt":' * 10_000,
    b'{"prompt":"\\ud800"}', b'\xef\xbb\xbf{"prompt":"a"}x', b"\xff" * 1000,
])  # fmt: skip
def test_broken_json(client, content):
    for path in CHAT, COMPLETIONS, "/tokenize", "/detokenize":
        refused(client.post(path, content=content))


def test_bodies_over_the_limit(process, client, neighbour):
    answer = client.post(COMPLETIONS, content=b"x" * (BODY_LIMIT + 1))
    assert refused(answer) and answer.status_code == 413

    def endless():
        for _ in range(2_000):
            yield b" " * 65_536

    before = resident_bytes(process)
    with contextlib.suppress(httpx2.TransportError):  # it may close before it has read all of it
        assert client.post(COMPLETIONS, content=endless()).status_code == 413
    assert resident_bytes(process) - before < 50e6
    port = httpx2.URL(process.url).port
    for length in "99999999999999999999", "-1", "x", "1" * 5000:
        with raw(port, post_head(COMPLETIONS, f"Content-Length: {length}")) as sock:
            assert sock.recv(100).startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)
FIELDS = st.sampled_from(sorted(CompletionBody.model_fields | ChatBody.model_fields.keys()))
SMALL = (
    st.integers(-3, 300) | st.floats(-3, 3) | st.booleans() | st.text(max_size=4)
    | st.lists(st.integers(-1, 300) | st.text(max_size=4), max_size=4)
    | st.dictionaries(st.sampled_from(["1", "300", "tree", "stats"]), st.integers(-9, 9) | JSON)
)  # fmt: skip


@settings(max_examples=200)
@given(
    path=st.sampled_from([CHAT, COMPLETIONS]),
    fields=st.dictionaries(FIELDS, SMALL | JSON, max_size=4),
    cut=st.none() | st.integers(0, 200),
)
def test_whatever_is_posted_is_answered(client, path, fields, cut):
    body = (HELLO if path == CHAT else SAY) | fields
    content = json.dumps(body).encode()[:cut]
    answer = client.post(path, content=content)
    if answer.status_code == 200:
        assert "finish_reason" in answer.text and '"error"' not in answer.text
    else:
        refused(answer)


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_http(process, noise):
    with raw(httpx2.URL(process.url).port, noise + b"\r\n\r\n") as sock:
        sock.shutdown(socket.SHUT_WR)
        assert is_closed(sock, 10)


# ---- connections --------------------------------------------------------------------------------


def test_half_open_connections_are_closed(monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    with hosted(ScriptedService()) as server, contextlib.ExitStack() as stack:
        starts = [b"", b"GET /health", b"GET /health HTTP/1.1\r\nHost: x\r\nA: "] * 10
        socks = [stack.enter_context(raw(server.port, start)) for start in starts]
        assert httpx2.post(server.url + COMPLETIONS, json=SAY).status_code == 200
        assert all(is_closed(sock, 5) for sock in socks)


def test_headers_letter_by_letter(monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    with hosted(ScriptedService()) as server, raw(server.port, b"GET / HTTP/1.1\r\nA: ") as sock:
        begin = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - begin < 5:
                sock.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() - begin < 3


def test_a_connection_lives_from_request_to_request(monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    with hosted(ScriptedService(delay=0.3)) as server, httpx2.Client() as client:
        for _ in range(2):  # each takes longer than a head may
            assert client.post(server.url + COMPLETIONS, json=SAY).status_code == 200


def test_a_body_that_does_not_arrive():
    config = ServerConfig(stream_timeout=0.5)
    with hosted(ScriptedService(), config) as server:
        head = post_head(COMPLETIONS, "Content-Length: 1000")
        with raw(server.port, head + b'{"prompt"') as sock:
            assert sock.recv(1000).startswith(b"HTTP/1.1 408")
        with raw(server.port, head):
            pass  # gone at once
        assert httpx2.get(server.url + "/health").status_code == 200


def test_header_floods(process, client, neighbour):
    before, port = resident_bytes(process), httpx2.URL(process.url).port
    flood = "".join(f"X-{i}: {'y' * 1000}\r\n" for i in range(5_000)).encode()
    for begin in b"GET /health HTTP/1.1\r\nHost: x\r\n", b"GET /" + b"x" * 10**6:
        with raw(port, begin) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(flood)
            assert is_closed(sock, 10)
    answer = client.get("/health", headers={"X-Big": "x" * 20_000, "Authorization": "x" * 5_000})
    assert answer.status_code == 200
    assert resident_bytes(process) - before < 50e6


class Wordy(ScriptedService):
    """Its tokens are 100 kB each, so that buffers are full soon."""

    def submit(self, requests):
        super().submit(requests)
        return [WordyDeltas(self, request) for request in requests]


class WordyDeltas(ScriptedDeltas):
    async def __anext__(self):
        return dataclasses.replace(await super().__anext__(), text="x" * 100_000)


def test_readers_that_do_not_read_are_cut_off():
    config = ServerConfig(stream_timeout=0.5)
    with hosted(Wordy(), config) as server:
        content = json.dumps(SAY | {"max_tokens": 150, "stream": True}).encode()
        head = post_head(COMPLETIONS, f"Content-Length: {len(content)}")
        with raw(server.port, head + content) as sock:
            end = time.monotonic() + 10
            while not server.service.aborted and time.monotonic() < end:
                time.sleep(0.05)
            assert len(server.service.aborted) == 1 and not server.service.open
            assert httpx2.post(server.url + COMPLETIONS, json=SAY).status_code == 200
            assert is_closed(sock, 10)


def test_readers_that_are_slow_get_everything():
    with hosted(Wordy(), ServerConfig(stream_timeout=2.0)) as server:
        body = SAY | {"max_tokens": 40, "stream": True}
        with httpx2.stream("POST", server.url + COMPLETIONS, json=body) as answer:
            size = 0
            for chunk in answer.iter_bytes(500_000):
                size += len(chunk)
                time.sleep(0.1)
        assert size > 40 * 100_000 and not server.service.aborted


def test_clients_that_reset_in_the_middle(process, client, neighbour):
    body = SAY | {"max_tokens": 200, "stream": True, "ignore_eos": True, "n": 4}
    content = json.dumps(body).encode()
    head = post_head(COMPLETIONS, f"Content-Length: {len(content)}")
    for i in range(20):
        with raw(httpx2.URL(process.url).port, head + content) as sock:
            if i % 2:
                sock.recv(100)
            # No lingering: the connection ends with a reset.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end = time.monotonic() + 30
    while client.get("/load").json()["server_load"] > 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert client.get("/load").json()["server_load"] <= 1  # the neighbour's


def test_too_many_connections():
    with hosted(ScriptedService(), ServerConfig(limit_concurrency=5)) as server:
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(raw(server.port))
            time.sleep(0.2)
            assert httpx2.get(server.url + "/health").status_code == 503
        time.sleep(0.2)
        assert httpx2.get(server.url + "/health").status_code == 200
