"""The engine behind an event loop: streams, limits, aborts, drain, and an engine that dies."""

import asyncio
import contextlib
import functools
import threading
import time
import types
from collections.abc import AsyncIterator

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from benchmarks.equal_text import compare
from jax_eagle import SamplingParams, generate
from jax_eagle.tokenizer import Tokenizer, _fast_tokenizer
from serve.dispatch import PLAIN
from serve.engine import Engine
from serve.request import Delta, Draining, QueueFull, Request
from serve.service import Service, Stream
from tests.engines import BUSHY, CONTEXT, PAGE, SLOTS, VOCAB, make_engine, request

pytestmark = pytest.mark.usefixtures("quick_compiler")


def six_letters() -> Tokenizer:
    """One letter a token."""
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate("abcdef")}, merges=[]))
    backend.decoder = decoders.Fuse()
    return Tokenizer(_fast_tokenizer()(tokenizer_object=backend))


@pytest.fixture(scope="module")
def target(make_target):
    return make_target(max_position=CONTEXT).replace(tokenizer=six_letters())


@pytest.fixture(scope="module")
def warm_engine(target, make_draft):
    return make_engine(target, make_draft(max_position=CONTEXT))


@pytest.fixture
def engine(warm_engine, monkeypatch):
    """The same engine for all tests; each leaves it idle, with all its pages."""
    monkeypatch.setattr(warm_engine, "warm_up", lambda: iter([("decode", 0.5)]))  # it is warm
    yield warm_engine
    assert not warm_engine.busy
    assert warm_engine.pool.num_held == 0 and warm_engine.status.leaked_pages == 0


@pytest.fixture
def two(engine, target, make_draft, monkeypatch):
    """Two replicas."""
    other = make_engine(target, make_draft(max_position=CONTEXT))
    monkeypatch.setattr(other, "warm_up", lambda: iter([]))
    return [engine, other]


class Gate:
    """Lets the engine take its steps one by one, so that what happens between them is known."""

    def __init__(self, engine: Engine, monkeypatch):
        self._step, self._open = engine.step, False
        self._error: Exception | None = None
        self._arrived, self._permits = threading.Semaphore(0), threading.Semaphore(0)
        monkeypatch.setattr(engine, "step", self._wait)

    def _wait(self) -> None:
        if not self._open:
            self._arrived.release()
            assert self._permits.acquire(timeout=30)
        if self._error is not None:
            raise self._error
        self._step()

    async def arrival(self) -> None:
        """Returns when the engine stands before a step, all earlier commands carried out."""
        assert await asyncio.to_thread(self._arrived.acquire, timeout=30)

    async def step(self) -> None:
        """The engine stands before a step; returns when it stands before the next one."""
        self._permits.release()
        await self.arrival()

    def open(self) -> None:
        """No more waiting."""
        self._open = True
        self._permits.release()

    def fail(self, error: Exception) -> None:
        """The next step raises."""
        self._error = error
        self.open()


@pytest.fixture
def gate(engine, monkeypatch):
    return Gate(engine, monkeypatch)


@contextlib.asynccontextmanager
async def serving(*engines: Engine, **limits) -> AsyncIterator[Service]:
    service = Service(engines, six_letters(), **limits)
    await service.start()
    try:
        yield service
    finally:
        await service.drain(0)


def in_loop(test):
    """A test that is a coroutine, in a loop of its own; it may take a minute."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


async def read(stream: Stream) -> list[Delta]:
    """All deltas; only the last one has a reason."""
    deltas = [delta async for delta in stream]
    assert [delta.finish_reason is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    return deltas


async def read_all(streams: list[Stream]) -> list[list[Delta]]:
    return await asyncio.gather(*(read(stream) for stream in streams))


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def long_request(length: int = 10) -> Request:
    """It takes many steps."""
    return request([1] * length, CONTEXT - length, tree=PLAIN)


# ---- start -------------------------------------------------------------------------------------


@in_loop
async def test_requests_are_taken_when_it_is_warm(engine):
    heard = []
    service = Service(
        [engine], six_letters(), on_program=lambda name, seconds: heard.append((name, seconds))
    )
    assert not service.ready
    with pytest.raises(Draining):
        service.submit([request([1])])
    await service.start()
    assert service.ready and heard == [("decode", 0.5)]
    (stream,) = service.submit([request([1], 3)])
    assert len(tokens_of(await read(stream))) == 3
    await service.drain(30)
    assert not service.ready


@in_loop
async def test_what_keeps_it_from_starting_is_raised(engine, monkeypatch):
    def warm_up():
        yield "decode", 0.5
        raise MemoryError("no room for the program")

    monkeypatch.setattr(engine, "warm_up", warm_up)
    service = Service([engine], six_letters())
    with pytest.raises(MemoryError, match="no room for the program"):
        await service.start()
    assert not service.ready


# ---- streams -----------------------------------------------------------------------------------


def mixed_requests(count: int) -> list[Request]:
    rng = np.random.default_rng(4)
    return [
        request(
            rng.integers(0, VOCAB, rng.integers(1, 25)).tolist(),
            int(rng.integers(1, 30)),
            sampling=SamplingParams(temperature=[0.0, 0.9][i % 2], seed=i),
            tree=[None, None, PLAIN, BUSHY][i % 4],
        )
        for i in range(count)
    ]


@in_loop
async def test_many_streams_give_the_texts_of_generate(engine, target, monkeypatch):
    requests = mixed_requests(48)
    sampling, prompts = [r.sampling for r in requests], [r.prompt for r in requests]
    monkeypatch.setattr("jax_eagle.prefill.PAGE_SIZE", PAGE)
    plain = generate(
        target, None, prompts, max_new_tokens=CONTEXT, sampling=sampling, stop_token_ids=[]
    )
    expected = [ids[: r.max_tokens] for ids, r in zip(plain.tokens, requests, strict=True)]
    async with serving(engine) as service:

        async def client(each: Request) -> list[Delta]:
            await asyncio.sleep(each.sampling.seed * 0.002)
            return await read(*service.submit([each]))

        answers = await asyncio.gather(*(client(each) for each in requests))
    given = [tokens_of(deltas) for deltas in answers]
    comparison = compare(target, prompts, expected, given, sampling=sampling)
    assert comparison.equal, str(comparison)
    for each, ids, deltas in zip(requests, given, answers, strict=True):
        assert "".join(delta.text for delta in deltas) == six_letters().decode(ids)
        assert deltas[-1].finish_reason == "length"
        stats = deltas[-1].stats
        assert stats and (stats.prompt_tokens, stats.new_tokens) == (len(each.prompt), len(ids))


@in_loop
async def test_deltas_come_while_the_request_runs(engine, gate):
    async with serving(engine) as service:
        (stream,) = service.submit([long_request()])
        await gate.arrival()
        for _ in range(3):
            await gate.step()
        first = await anext(stream)
        assert len(first.token_ids) == 1 and engine.pool.num_held > 0
        gate.open()
        rest = await read(stream)
        assert len(rest) > 20 and 1 + len(tokens_of(rest)) == stream.request.max_tokens
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


@in_loop
async def test_prefixes_are_shared_until_they_are_forgotten(engine):
    async with serving(engine) as service:

        async def cached() -> int:
            (stream,) = service.submit([request([3] * 20, 2)])
            stats = (await read(stream))[-1].stats
            assert stats is not None
            return stats.cached_tokens

        service.forget_prefixes()
        assert [await cached(), await cached()] == [0, 16]
        service.forget_prefixes()
        assert await cached() == 0


# ---- aborts ------------------------------------------------------------------------------------


@in_loop
async def test_closing_a_stream_frees_its_pages_before_the_next_step(engine, gate):
    async with serving(engine) as service:
        closed, other = service.submit([long_request(), request([2] * 9, 30)])
        await gate.arrival()
        for _ in range(6):
            await gate.step()
        assert len(engine.scheduler.held) == 2
        await closed.aclose()
        await gate.step()  # the one it stood before; then the command is carried out
        (pages,) = engine.scheduler.held
        assert engine.pool.num_held == len(pages)
        with pytest.raises(StopAsyncIteration):
            await anext(closed)
        gate.open()
        assert len(tokens_of(await read(other))) == 30
        await other.aclose()  # at the end it is nothing


@pytest.mark.parametrize("closes", [True, False])
@in_loop
async def test_a_request_can_be_ended_before_the_engine_has_seen_it(engine, gate, closes):
    async with serving(engine) as service:
        (running,) = service.submit([long_request()])
        await gate.arrival()
        looked_up = engine.status.prefix_queries
        (ended,) = service.submit([request([2] * 20, 30)])
        if closes:
            await ended.aclose()
        else:
            service.abort(ended.request.id)
        gate.open()
        assert len(tokens_of(await read(running))) == running.request.max_tokens
        if not closes:
            (last,) = await read(ended)
            assert last.finish_reason == "abort" and last.stats and not last.stats.new_tokens
        assert engine.status.prefix_queries == looked_up + len(running.request.prompt)


@in_loop
async def test_an_aborted_request_keeps_what_it_has_got(engine, gate):
    async with serving(engine) as service:
        (stream,) = service.submit([long_request()])
        await gate.arrival()
        for _ in range(8):
            await gate.step()
        service.abort(stream.request.id)
        service.abort("nobody")
        gate.open()
        deltas = await read(stream)
        last = deltas[-1]
        assert last.finish_reason == "abort" and last.stats is not None
        assert 0 < len(tokens_of(deltas)) == last.stats.new_tokens < stream.request.max_tokens


# ---- limits ------------------------------------------------------------------------------------


@in_loop
async def test_sequences_that_queue_are_limited(engine, gate):
    async with serving(engine, max_queued_requests=3) as service:
        streams = service.submit([long_request(), long_request()])
        with pytest.raises(QueueFull) as refusal:  # all of them or none
            service.submit([request([1]), request([1])])
        assert refusal.value.retry_after == 1.0
        streams += service.submit([request([1])])
        with pytest.raises(QueueFull):
            service.submit([request([1])])
        gate.open()
        await read_all(streams)
        await read_all(service.submit([request([1], 2) for _ in range(3)]))


@in_loop
async def test_prompt_tokens_without_a_first_token_are_limited(engine, gate):
    async with serving(engine, max_queued_tokens=12) as service:
        (first,) = service.submit([long_request(10)])
        with pytest.raises(QueueFull):
            service.submit([request([1] * 3)])
        (second,) = service.submit([request([1] * 2)])
        await gate.arrival()
        for _ in range(3):
            await gate.step()
        await anext(first)
        assert (await anext(second)).finish_reason is None
        (third,) = service.submit([request([1] * 12, 2)])
        gate.open()
        await read_all([first, second, third])


@in_loop
async def test_to_come_back_takes_as_long_as_a_request(engine, gate, monkeypatch):
    """In the mean; a second of the engine's clock is a millisecond."""
    clock = types.SimpleNamespace(
        monotonic=lambda: 1000 * time.monotonic(), perf_counter=time.perf_counter
    )
    monkeypatch.setattr("serve.engine.time", clock)
    async with serving(engine, max_queued_requests=1) as service:
        gate.open()
        (last,) = (await read(*service.submit([long_request()])))[-1:]
        (running,) = service.submit([long_request()])
        with pytest.raises(QueueFull) as refusal:
            service.submit([request([1])])
        stats = last.stats
        assert stats is not None
        seconds = stats.queue_seconds + stats.prefill_seconds + stats.decode_seconds
        assert refusal.value.retry_after == pytest.approx(0.9 * 1 + 0.1 * seconds) and seconds > 1
        await running.aclose()


@pytest.mark.parametrize(
    "requests, message",
    [
        ([request([1]) for _ in range(4)], "4 of at most 3"),
        ([request([1] * 15), request([1] * 6)], "21 of at most 20"),
        ([request([1] * 21)], "21 of at most 20"),
        ([request([1]), request([1] * 9, CONTEXT)], "64 in all"),
        ([request([1]), request([VOCAB])], "token 6 is outside"),
    ],
)
@in_loop
async def test_what_can_never_be_taken_is_refused_whole(engine, requests, message):
    async with serving(engine, max_queued_requests=3, max_queued_tokens=20) as service:
        with pytest.raises(ValueError, match=message):
            service.submit(requests)
        streams = service.submit([request([1], 2), request([2] * 9, 2), request([3] * 10, 2)])
        with pytest.raises(ValueError, match=message):  # not `QueueFull`: to wait is no use
            service.submit(requests)
        await read_all(streams)


# ---- drain -------------------------------------------------------------------------------------


def engine_threads() -> int:
    return sum(thread.name == "engine" for thread in threading.enumerate())


@in_loop
async def test_drain_waits_for_all_that_run_and_wait(engine, gate):
    async with serving(engine) as service:
        streams = service.submit([request([1] * 9, 20) for _ in range(SLOTS + 2)])
        await gate.arrival()
        drain = asyncio.create_task(service.drain(50))
        await asyncio.sleep(0)
        assert not service.ready and not drain.done() and engine_threads() == 1
        with pytest.raises(Draining):
            service.submit([request([1])])
        gate.open()
        await drain
        assert engine_threads() == 0
        for deltas in await read_all(streams):
            assert len(tokens_of(deltas)) == 20 and deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("second_signal", [True, False])
@in_loop
async def test_drain_ends_those_that_run_and_wait_when_time_is_over(engine, gate, second_signal):
    async with serving(engine) as service:
        streams = service.submit([long_request() for _ in range(SLOTS + 3)])
        await gate.arrival()
        while engine.status.running < SLOTS:
            await gate.step()
        await gate.step()
        drain = asyncio.create_task(service.drain(50 if second_signal else 0.01))
        await asyncio.sleep(0.1)
        if second_signal:
            drain.cancel()
            await asyncio.wait([drain])
            drain = asyncio.create_task(service.drain(0))
            await asyncio.sleep(0.1)
        gate.open()
        await drain
        assert engine_threads() == 0 and engine.pool.num_held == 0
        answers = await read_all(streams)
        assert {deltas[-1].finish_reason for deltas in answers} == {"abort"}
        assert sum(not tokens_of(deltas) for deltas in answers) >= 3
        assert sum(len(tokens_of(deltas)) > 0 for deltas in answers) > 3


@in_loop
async def test_drain_of_an_idle_service_ends_at_once(engine):
    async with serving(engine) as service:
        await service.drain(50)
        await service.drain(50)  # a second time is nothing
        assert engine_threads() == 0


# ---- replicas ----------------------------------------------------------------------------------


@in_loop
async def test_requests_go_to_the_replica_with_the_fewest_sequences(two):
    before = [engine.status.generation_tokens for engine in two]
    async with serving(*two) as service:
        same = [request([3, 1], 9, sampling=SamplingParams(0.9, seed=5)) for _ in range(3)]
        jobs = [[same[0], request([1], 9)], [same[1]], [same[2]], [request([2], 9)]]
        streams = [service.submit(job) for job in jobs]
        assert [[s.engine for s in job] for job in streams] == [[0, 0], [1], [1], [0]]
        given = [await read_all(job) for job in streams]
        texts = [tokens_of(job[0]) for job in given]
        assert texts[0] == texts[1] == texts[2]
        ended = service.submit([long_request()])
        assert ended[0].engine == 0  # all is quiet again
        service.abort(ended[0].request.id)
        assert (await read(*ended))[-1].finish_reason == "abort"
    gained = [e.status.generation_tokens - n for e, n in zip(two, before, strict=True)]
    assert gained[1] == 18 and 27 <= gained[0] <= 27 + len(ended[0].request.prompt) + CONTEXT
    assert [status.running for status in service.statuses()] == [0, 0]


@in_loop
async def test_one_replica_that_fails_fails_all(two, monkeypatch, caplog):
    def step():
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(two[1], "step", step)
    async with serving(*two) as service:
        streams = [*service.submit([long_request()]), *service.submit([long_request()])]
        for deltas in await read_all(streams):
            assert deltas[-1].finish_reason == "error"
        assert service.failed.is_set() and not service.ready
    assert "the device is lost" in caplog.text
    two[0].abort(streams[0].request.id)
    while two[0].busy:
        two[0].step()


# ---- an engine that dies -----------------------------------------------------------------------


@pytest.mark.parametrize("draining", [True, False])
@in_loop
async def test_a_failing_engine_ends_every_stream(engine, gate, monkeypatch, caplog, draining):
    async with serving(engine) as service:
        streams = service.submit([long_request() for _ in range(SLOTS + 1)])
        await gate.arrival()
        for _ in range(4):
            await gate.step()
        streams += service.submit([long_request()])  # still in the inbox
        drain = [asyncio.create_task(service.drain(50))] if draining else []
        await asyncio.sleep(0)
        gate.fail(RuntimeError("the device is lost"))
        await service.failed.wait()
        assert not service.ready
        for deltas in await read_all(streams):
            assert deltas[-1] == Delta("", (), finish_reason="error")
        with pytest.raises(Draining):
            service.submit([request([1])])
        await asyncio.gather(*drain)
    assert "the device is lost" in caplog.text
    monkeypatch.undo()
    for stream in streams:
        engine.abort(stream.request.id)
    while engine.busy:
        engine.step()
