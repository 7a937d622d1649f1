"""The load tool against a real HTTP server that behaves like OpenAI's, or misbehaves as told."""

import asyncio
import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import httpx2
import numpy as np
import prometheus_client
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from benchmarks import serve_load
from benchmarks.load_client import LoadClient, Record, Reservoir
from benchmarks.load_plan import (
    MALFORMATIONS,
    PATHS,
    LoadSettings,
    Plan,
    plans,
    read_questions,
)
from benchmarks.load_report import LoadResult, html_page, summarise, timeline
from benchmarks.serve_load import run_load
from jax_eagle.program import run_program

ROOT = Path(__file__).parent.parent
KNOWN_FIELDS = {
    "model", "messages", "prompt", "max_tokens", "temperature", "top_p", "stream",
    "stream_options", "ignore_eos", "user",
}  # fmt: skip


# ---- the server --------------------------------------------------------------------------------


@dataclasses.dataclass
class Script:
    """How the server behaves."""

    first: float = 0.0
    """Seconds before the first token."""
    gap: float = 0.0
    """Seconds between chunks."""
    chunk: int = 1
    """Tokens in each chunk but the first, which has one."""
    fault: str = ""
    refusals: int = 0
    """So many requests get a 429 before any is let in."""
    retry_after: str = "0.3"
    strict: bool = True
    """Whether broken requests are refused."""
    key: str = ""
    metrics: bool = True
    leaked_pages: int = 0
    compilations: int = 0
    stuck: int = 0
    """Requests that never end."""


class Server:
    """The scripted server, in a thread of its own, and what it has seen."""

    def __init__(self):
        routes = [Route(path, self.answer, methods=["POST"]) for path in PATHS.values()]
        routes += [Route("/v1/models", self.models), Route("/metrics", self.metrics)]
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            Starlette(routes=routes), log_level="critical", lifespan="off", ws="none",
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self.reset()

    def reset(self):
        self.script = Script()
        self.bodies, self.running, self.most_running, self.left = [], 0, 0, 0
        self.registry = prometheus_client.CollectorRegistry()
        names = "num_drafts", "num_draft_tokens", "num_accepted_tokens"
        self.counters = {
            name: self._counter(f"vllm:spec_decode_{name}", "model_name") for name in names
        }
        self.by_depth = self._counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "model_name", "position"
        )
        self.tokens = self._counter("vllm:generation_tokens", "model_name")

    def _counter(self, name, *labels):
        return prometheus_client.Counter(name, name, labels, registry=self.registry)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    async def models(self, request: Request):
        return JSONResponse({"object": "list", "data": [{"id": "toy"}]})

    async def metrics(self, request: Request):
        if not self.script.metrics:
            return PlainTextResponse("not here", 404)
        gauges = {
            "vllm:num_requests_running": self.running + self.script.stuck,
            "vllm:num_requests_waiting": 0,
            "jax_eagle:leaked_pages": self.script.leaked_pages,
            "jax_eagle:compilations_since_warm_total": self.script.compilations,
        }
        text = prometheus_client.generate_latest(self.registry).decode()
        text += "".join(f"# TYPE {name} gauge\n{name} {value}\n" for name, value in gauges.items())
        return PlainTextResponse(text)

    async def answer(self, request: Request):
        script = self.script
        content = await request.body()
        self.bodies.append(content)
        if script.key and request.headers.get("Authorization") != f"Bearer {script.key}":
            return error(401, "wrong key")
        if script.refusals:
            script.refusals -= 1
            return error(429, "the queue is full", {"Retry-After": script.retry_after})
        if script.fault in ("400", "500", "503"):
            return error(int(script.fault), "told to")
        if script.fault == "page":
            return HTMLResponse("<h1>Welcome</h1>")
        chat = request.url.path == PATHS["chat"]
        if fault := script.strict and body_fault(content, chat):
            return error(404 if fault == "model" else 400, fault)
        body = json.loads(content) if script.strict else {"max_tokens": 2}
        return StreamingResponse(self.stream(script, body, chat), media_type="text/event-stream")

    async def stream(self, script: Script, body: dict, chat: bool):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        whole = False
        try:
            async for data in self.events(script, body, chat):
                yield f"data: {data}\n\n"
            whole = True
        finally:
            self.running -= 1
            self.left += not whole

    async def events(self, script: Script, body: dict, chat: bool):
        def event(text: str = "", reason=None, role=None):
            delta = {"role": role} if role else {}
            part = {"delta": delta | {"content": text}} if chat else {"text": text}
            return json.dumps({"choices": [part | {"index": 0, "finish_reason": reason}]})

        if chat:
            yield event(role="assistant")
        await asyncio.sleep(script.first)
        sent, total = 0, body["max_tokens"] // (2 if script.fault in ("short", "eos") else 1)
        while sent < total:
            if sent:
                await asyncio.sleep(script.gap)
            new = min(script.chunk if sent else 1, total - sent)
            self.count(new, first=not sent)
            sent += new
            yield event("a\u2028b " * new)  # not a line's end, though str.splitlines says so
            if script.fault == "hang":
                await asyncio.sleep(60)
            if script.fault == "drop":
                raise ConnectionError
            if script.fault == "error event":
                yield json.dumps({"error": {"message": "out of pages", "code": 500}})
            if script.fault == "not JSON":
                yield "{oops"
            if script.fault == "cut" and sent > total / 2:
                return
        reason = {"abort": "abort", "no reason": None, "eos": "stop"}.get(script.fault, "length")
        yield event(reason=reason)
        if script.fault != "no usage":
            usage = {"prompt_tokens": 7, "completion_tokens": sent}
            yield json.dumps({"choices": [], "usage": usage})
        yield "[DONE]"

    def count(self, new: int, *, first: bool):
        self.tokens.labels("toy").inc(new)
        if not first:
            for name, value in zip(self.counters, (1, 4, new - 1), strict=True):
                self.counters[name].labels("toy").inc(value)
            for position in range(new - 1):
                self.by_depth.labels("toy", str(position)).inc()


def error(status: int, message: str, headers=None):
    return JSONResponse({"error": {"message": message}}, status, headers)


def body_fault(content: bytes, chat: bool) -> str:
    """What is wrong with a body; empty: nothing."""
    try:
        body = json.loads(content)
    except ValueError:
        return "JSON"
    if not isinstance(body, dict):
        return "object"
    if unknown := set(body) - KNOWN_FIELDS:
        return f"unknown fields {unknown}"
    if body["model"] != "toy":
        return "model"
    question = body.get("messages" if chat else "prompt")
    if not isinstance(question, list if chat else str) or len(json.dumps(question)) > 50_000:
        return "question"
    if not isinstance(body["max_tokens"], int) or body["max_tokens"] < 1:
        return "max_tokens"
    if not all(math.isfinite(body.get(name, 0)) for name in ("temperature", "top_p")):
        return "not finite"
    return ""


@pytest.fixture(scope="module")
def running_server():
    with Server() as server:
        yield server


@pytest.fixture
def server(running_server):
    deadline = time.monotonic() + 10
    while running_server.running and time.monotonic() < deadline:
        time.sleep(0.01)
    running_server.reset()
    return running_server


@pytest.fixture
def settings(server, tmp_path):
    """Settings for the scripted server with two prompts."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n\n{"turns": ["two", "three"]}\n')
    return LoadSettings(server.url, num_requests=4, concurrency=4, prompts=prompts, timeout=20)


def load(settings: LoadSettings, **changes) -> LoadResult:
    return asyncio.run(run_load(dataclasses.replace(settings, **changes)))


def waits(records: list[Record]) -> list[float]:
    """Times to first token of requests that all got one."""
    seconds = [record.time_to_first_token for record in records]
    assert None not in seconds
    return [second or 0.0 for second in seconds]


def count(result: LoadResult, **expected: int):
    """Asserts that all requests ended as named (- in the name is _), and no other way."""
    nonzero = {name.replace("-", "_"): n for name, n in result.counts.items() if n}
    assert nonzero == expected, result.errors


# ---- figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", PATHS)
def test_latencies_are_those_of_the_server(server, settings, endpoint):
    server.script = Script(first=0.15, gap=0.03, chunk=3)
    result = load(settings, endpoint=endpoint, max_tokens=(16, 16), concurrency=1)
    count(result, completed=4)
    assert result.problems == []
    latencies = result.latencies
    # A busy machine adds: the least of four, one after another, is nearly what was slept. Between
    # two events it may also take away, where the first was seen late.
    assert 0.15 <= min(latencies["time to first token"]) < 0.22
    assert 0.008 <= min(latencies["time per output token"]) < 0.02  # 5 * 0.03 s for 15 tokens
    assert 0.3 <= min(latencies["end to end"]) < 0.45
    assert 0.025 <= np.median(latencies["gap between chunks"]) < 0.05
    assert [len(seconds) for seconds in latencies.values()] == [4, 4, 20, 4]
    assert sum(record.tokens for record in result.records) == 4 * 16
    assert result.throughput["output tokens/s"] == pytest.approx(64 / result.seconds)
    assert {record.prompt_tokens for record in result.records} == {7}


def test_acceptance_is_counted_over_the_run_alone(server, settings):
    server.script = Script(chunk=3)
    result = load(settings, max_tokens=(9, 9), warmup=3)  # chunks of 1, 3, 3, 2
    figures = result.server
    assert figures is not None
    assert figures.generation_tokens == 4 * 9
    assert figures.acceptance_length == pytest.approx(8 / 3)
    assert figures.acceptance_rate == pytest.approx(5 / 12)
    assert figures.acceptance_by_depth == pytest.approx([1, 2 / 3])
    assert figures.counters["vllm:generation_tokens_total"] == 4 * 9
    assert len(result.records) == 4 and len(server.bodies) == 7


def test_a_server_without_metrics_is_no_problem(server, settings):
    server.script = Script(metrics=False)
    result = load(settings)
    assert result.server is None and result.problems == []


def test_leaks_compilations_and_stuck_requests_are_problems(server, settings, monkeypatch):
    monkeypatch.setattr(serve_load, "_IDLE_SECONDS", 0.2)
    server.script = Script(leaked_pages=3, compilations=2, stuck=1)
    assert load(settings).problems == [
        "requests still run or wait on the server",
        "3 pages leaked",
        "2 compilations since the server was warm",
    ]


def test_summary_of_known_values():
    assert summarise(range(101)) == {
        "count": 101, "mean": 50, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100,
    }  # fmt: skip
    assert summarise([]) == {"count": 0}


def test_timeline_spreads_tokens_over_their_stream():
    records = [
        Record(0, 0.0, "completed", first=2.0, last=6.0, end=6.0, tokens=40),
        Record(1, 5.0, "error", end=10.0),
    ]
    running, rate = timeline(records, seconds=10.0, bins=10)
    assert running.tolist() == [1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    np.testing.assert_allclose(rate, [0, 0, 10, 10, 10, 10, 0, 0, 0, 0], atol=1e-9)


@given(st.lists(st.floats(0, 1), max_size=60), st.integers(1, 80))
def test_reservoir_keeps_all_that_fit(values, capacity):
    reservoir = Reservoir(capacity)
    for value in values:
        reservoir.add(value)
    assert reservoir.count == len(values)
    assert len(reservoir.values) == min(len(values), capacity)
    if len(values) <= capacity:
        assert reservoir.values.tolist() == values
    assert set(reservoir.values) <= set(values)


def test_reservoir_is_fair():
    reservoir = Reservoir(2_000)
    for value in range(20_000):
        reservoir.add(value)
    # Eight standard errors of the mean of a uniform law.
    assert np.mean(reservoir.values) == pytest.approx(10_000, abs=8 * 20_000 / 12**0.5 / 2_000**0.5)


# ---- the load ----------------------------------------------------------------------------------


def test_closed_loop_keeps_so_many_running(server, settings):
    server.script = Script(gap=0.02)
    count(load(settings, num_requests=12, concurrency=3, max_tokens=(6, 6)), completed=12)
    assert server.most_running == 3


def test_open_loop_counts_the_wait_for_a_connection(server, settings):
    server.script = Script(first=0.1)
    result = load(settings, num_requests=8, concurrency=1, request_rate=100.0, max_tokens=(1, 1))
    records = sorted(result.records, key=lambda record: record.index)
    asked = plans(dataclasses.replace(settings, num_requests=8, request_rate=100.0), [{}])
    assert [record.begin for record in records] == [plan.due for plan in asked]
    # Seven others of 0.1 s go before the last, which was due after some 0.08 s.
    assert waits(records[-1:])[0] > 0.5


def test_arrivals_are_poisson():
    settings = LoadSettings("", num_requests=4000, request_rate=20.0)
    gaps = np.diff([plan.due or 0.0 for plan in plans(settings, [{}])])
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(0.05, rel=0.08)
    assert gaps.std() == pytest.approx(0.05, rel=0.08)


def test_shares_and_lengths_are_as_asked():
    settings = LoadSettings("", num_requests=4000, max_tokens=(8, 128), cancel=0.2, malformed=0.05)
    asked = list(plans(settings, [{"prompt": "one"}]))
    malformed = [plan for plan in asked if plan.malformation]
    cancelled = [plan for plan in asked if plan.cancel_after is not None]
    lengths = {plan.body["max_tokens"] for plan in asked}
    assert len(malformed) == pytest.approx(200, abs=60)
    assert len(cancelled) == pytest.approx(760, abs=120)
    assert {plan.malformation for plan in malformed} == set(MALFORMATIONS)
    assert not [plan for plan in malformed if plan.cancel_after is not None]
    assert (min(lengths), max(lengths)) == (8, 128)


@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1))
def test_a_request_depends_on_seed_and_number_alone(seed, cancel, malformed):
    few = LoadSettings("", num_requests=5, max_tokens=(1, 99), seed=seed)
    many = dataclasses.replace(few, num_requests=9, cancel=cancel, malformed=malformed)
    questions = [{"prompt": "one"}, {"prompt": "two"}]
    bodies = [[plan.body for plan in plans(s, questions)] for s in (few, many)]
    assert bodies[0] == bodies[1][:5]
    assert list(plans(many, questions)) == list(plans(many, questions))


def test_another_seed_is_another_load():
    loads = [
        list(plans(LoadSettings("", max_tokens=(1, 99), request_rate=1.0, seed=seed), [{}]))
        for seed in (0, 1)
    ]
    lengths = [[plan.body["max_tokens"] for plan in asked] for asked in loads]
    assert lengths[0] != lengths[1]
    assert {plan.due for plan in loads[0]}.isdisjoint(plan.due for plan in loads[1])


def test_bodies_carry_what_was_asked(server, settings):
    # The server refuses fields that it does not know.
    load(settings, temperature=0.5, ignore_eos=True, extra={"top_p": 0.9}, concurrency=1)
    first, second, *_ = map(json.loads, server.bodies)
    assert first == {
        "model": "toy",
        "messages": [{"role": "user", "content": "one"}],
        "max_tokens": 64,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "top_p": 0.9,
    }
    assert second["messages"][0]["content"] == "two"


def test_cancelled_streams_are_closed(server, settings):
    server.script = Script(gap=0.02)
    result = load(settings, num_requests=10, cancel=1.0, max_tokens=(20, 40))
    count(result, cancelled=10)
    assert result.problems == []
    assert server.left == 10  # the server has noticed each before it was called idle
    assert all(record.tokens <= 10 for record in result.records)


# ---- what goes wrong ---------------------------------------------------------------------------

FAULTS = {
    "400": "400: told to",
    "500": "500: told to",
    "page": "Expected response with content type",
    "cut": "the stream ended without [DONE]",
    "drop": "peer closed connection",
    "error event": "out of pages",
    "not JSON": "not an event of a completion: {oops",
    "short": "finish_reason length after 5 of 10 tokens",
    "eos": "finish_reason stop in spite of ignore_eos",
    "abort": "finish_reason abort",
    "no reason": "no finish_reason",
    "no usage": "no usage",
    "hang": "no end within 0.5 s",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_misbehaviour_is_an_error(server, settings, fault):
    server.script = Script(fault=fault)
    timeout = 0.5 if fault == "hang" else 20
    result = load(settings, max_tokens=(10, 10), ignore_eos=True, timeout=timeout)
    count(result, error=4)
    (detail,) = result.errors
    assert FAULTS[fault] in detail
    assert result.problems == ["4 of 4 requests ended in an error"]


def test_a_server_that_goes_away_is_an_error(settings):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    result = load(settings, url=f"http://127.0.0.1:{port}", model="toy")
    count(result, error=4)
    assert list(result.errors)[0].startswith("no connection")


def test_refusals_are_counted(server, settings):
    server.script = Script(refusals=3)
    result = load(settings)
    count(result, completed=1, refused=3)
    assert result.problems == []
    assert {r.detail for r in result.records if r.status == "refused"} == {"429: the queue is full"}
    server.script = Script(fault="503")
    count(load(settings), refused=4)


def test_retries_wait_as_long_as_they_are_told(server, settings):
    server.script = Script(refusals=3)
    result = load(settings, retry=True)
    count(result, completed=4)
    retried = [record for record in result.records if record.retries]
    assert [record.retries for record in retried] == [1, 1, 1]
    assert min(waits(retried)) >= 0.3
    assert min(waits(result.records)) < 0.3


def test_retries_end_with_the_time_out(server, settings):
    server.script = Script(refusals=1000)
    result = load(settings, retry=True, timeout=0.5)
    count(result, refused=4)
    assert all(record.retries == 1 for record in result.records)


@pytest.mark.parametrize("endpoint", PATHS)
@pytest.mark.parametrize("strict", [True, False])
def test_malformed_requests_must_be_refused(server, settings, endpoint, strict):
    server.script = Script(strict=strict)
    body = next(plans(settings, read_questions(dataclasses.replace(settings, endpoint=endpoint))))
    body = body.body | {"model": "toy"}

    async def send_all():
        async with httpx2.AsyncClient(base_url=server.url, timeout=None) as http:
            client = LoadClient(http, PATHS[endpoint], timeout=20, retry=False)
            sound = await client.send(Plan(0, body))
            return sound.status, {
                kind: await client.send(Plan(0, body, malformation=kind)) for kind in MALFORMATIONS
            }

    sound, records = asyncio.run(send_all())
    if strict:
        assert sound == "completed"
        assert {record.status for record in records.values()} == {"malformed-refused"}
    else:
        for kind, record in records.items():
            assert (record.status, record.detail) == ("error", f"accepted with 200: {kind}")


def test_malformed_requests_that_break_the_server_are_errors(server, settings):
    server.script = Script(fault="500")
    count(load(settings, malformed=1.0), error=4)


def test_the_key_is_sent(server, settings):
    server.script = Script(key="secret")
    count(load(settings), error=4)
    count(load(settings, api_key="secret"), completed=4)


def test_a_mixed_load_accounts_for_every_request(server, settings):
    server.script = Script(gap=0.001, chunk=2, refusals=5)
    seen = []
    mixed = dataclasses.replace(
        settings, num_requests=150, concurrency=16, max_tokens=(8, 40), cancel=0.2, malformed=0.1
    )
    result = asyncio.run(run_load(mixed, seen.append))
    counts = result.counts
    assert result.problems == [] and counts["error"] == 0
    assert counts["refused"] == 5
    assert counts["cancelled"] > 10 and counts["malformed-refused"] > 5
    assert sum(counts.values()) == 150 and seen == result.records
    assert sorted(record.index for record in result.records) == list(range(150))
    assert all(record.begin <= record.end <= result.seconds for record in result.records)


# ---- settings, prompts, program ----------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_requests": 0}, {"concurrency": 0}, {"request_rate": 0.0}, {"endpoint": "chats"},
        {"max_tokens": (0, 4)}, {"max_tokens": (5, 4)}, {"cancel": 1.1}, {"malformed": -0.1},
        {"timeout": 0.0}, {"warmup": -1}, {"extra": {"stream": False}},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_settings_name_the_field(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} must .*, got ") as raised:
        LoadSettings("", **wrong)
    assert str(raised.value).endswith(str(value))


def test_prompts_of_each_form(tmp_path):
    path = tmp_path / "prompts.jsonl"
    dialogue = [{"role": "user", "content": "a\u2028b"}]
    rows = [{"prompt": "one"}, {"turns": ["two", "three"]}, {"messages": dialogue}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    chat = read_questions(LoadSettings("", prompts=path))
    assert [question["messages"][-1]["content"] for question in chat] == ["one", "two", "a\u2028b"]
    with pytest.raises(ValueError, match=r"prompts.jsonl:3: expected JSON with prompt"):
        read_questions(LoadSettings("", prompts=path, endpoint="completions"))
    path.write_text('{"prompt": "one"}\n{"turns": ["two"]}')
    text = read_questions(LoadSettings("", prompts=path, endpoint="completions"))
    assert text == [{"prompt": "one"}, {"prompt": "two"}]


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"turns": []}', '{"prompt": 7}', "{}"])
def test_prompts_that_cannot_be_read_name_the_line(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "one"}}\n{line}\n')
    with pytest.raises(ValueError, match="prompts.jsonl:2"):
        read_questions(LoadSettings("", prompts=path))
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_questions(LoadSettings("", prompts=path))


def test_page_is_whole_and_escaped(server, settings):
    server.script = Script(gap=0.001)
    result = load(settings)
    hostile = Record(9, 0.0, "error", "<script>alert(1)</script>")
    page = html_page(dataclasses.replace(result, records=[*result.records, hostile]))
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "src=" not in page and "href=" not in page
    plots = [ElementTree.fromstring(part + "</svg>") for part in svgs(page)]
    assert [plot[0].text for plot in plots] == [
        "time to first token: requests by milliseconds, up to the 99th percentile",
        "time per output token: requests by milliseconds, up to the 99th percentile",
        "end to end: requests by milliseconds, up to the 99th percentile",
        "requests running, over the run",
        "output tokens/s, over the run",
    ]


def svgs(page: str) -> list[str]:
    return ["<svg" + part.split("</svg>")[0] for part in page.split("<svg")[1:]]


def test_page_of_a_run_without_any_answer(server, settings):
    server.script = Script(fault="500")
    assert len(svgs(html_page(load(settings)))) == 2


def program(settings: LoadSettings, *arguments: str):
    command = [sys.executable, "-m", "benchmarks.serve_load", "--url", settings.url]
    command += ["--prompts", str(settings.prompts), "--num-requests", "6", *arguments]
    environment = os.environ | {"COLUMNS": "100"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_program_reports_and_writes(server, settings, tmp_path):
    server.script = Script(chunk=3, gap=0.01, key="secret")
    out, html = tmp_path / "new" / "load.json", tmp_path / "load.html"
    done = program(
        settings, "--max-tokens", "8:16", "--api-key", "secret", "--out", str(out),
        "--html", str(html), "--extra", '{"user": "me"}', "--request-rate", "200",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("time to first token", "p99", "output tokens/s", "acceptance length", "leaked"):
        assert words in done.stdout
    assert "6/6" in done.stderr
    data = json.loads(out.read_text())
    assert data["requests"]["completed"] == 6 and data["problems"] == []
    assert data["settings"]["max_tokens"] == [8, 16] and data["settings"]["model"] == "toy"
    assert data["latency_seconds"]["time to first token"]["count"] == 6
    assert data["server"]["leaked_pages"] == 0 and data["client_machine"]["cores"] >= 1
    assert "secret" not in out.read_text() + html.read_text() + done.stdout


def test_program_fails_with_the_server(server, settings):
    server.script = Script(fault="500")
    done = program(settings)
    assert done.returncode == 1
    assert "PROBLEM: 6 of 6 requests ended in an error" in done.stdout
    assert "500: told to" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "8:"], ""),
        (["--max-tokens", "many"], "--max-tokens is a number or least:most, got many"),
        (["--extra", "[1]"], "--extra is a JSON object, got [1]"),
        (["--endpoint", "chats"], "endpoint must be one of"),
        (["--url", "http://127.0.0.1:1"], "is the server up"),
    ],
)
def test_program_says_in_a_line_what_is_wrong(arguments, message, settings, capsys):
    arguments = ["--prompts", str(settings.prompts), *arguments]
    with pytest.raises(SystemExit) as stop:
        run_program(serve_load.main, "benchmarks.serve_load", arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
