"""The engine against `generate`: the same text in any mix of requests, and nothing lost."""

import jax
import numpy as np
import pytest

from benchmarks.equal_text import compare
from jax_eagle import SamplingParams, generate
from serve.dispatch import PLAIN
from serve.request import Request
from tests.engines import (
    BUSHY,
    CONTEXT,
    NUM_PAGES,
    PAGE,
    PROGRAMS,
    SLOTS,
    VOCAB,
    Run,
    make_engine,
    request,
    run,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def models(make_target, make_draft):
    return make_target(max_position=CONTEXT), make_draft(max_position=CONTEXT)


@pytest.fixture(scope="module")
def warm_engine(models):
    return make_engine(*models)


@pytest.fixture
def engine(warm_engine):
    """The same engine for all tests: each finds it idle and leaves it idle, with all its pages."""
    warm_engine.pool.forget()
    with jax.transfer_guard("disallow"):
        yield warm_engine
    assert not warm_engine.busy
    assert warm_engine.pool.num_held == 0 and warm_engine.status.leaked_pages == 0


@pytest.fixture(scope="module")
def expected(models):
    """expected(requests) -> plain decoding's tokens, one batch for all."""

    def tokens(requests):
        with jax.transfer_guard("allow"), pytest.MonkeyPatch.context() as patch:
            patch.setattr("jax_eagle.prefill.PAGE_SIZE", PAGE)
            result = generate(
                models[0], None, [r.prompt for r in requests], max_new_tokens=CONTEXT,
                sampling=[r.sampling for r in requests], stop_token_ids=[],
            )  # fmt: skip
        return [ids[: r.max_tokens] for ids, r in zip(result.tokens, requests, strict=True)]

    return tokens


def assert_equal_text(models, expected, it: Run, requests) -> None:
    with jax.transfer_guard("allow"):
        comparison = compare(
            models[0], [r.prompt for r in requests], expected(requests),
            [it.tokens(r) for r in requests], sampling=[r.sampling for r in requests],
        )  # fmt: skip
    assert comparison.equal, str(comparison)
    assert {it.last(r).finish_reason for r in requests} == {"length"}


def mixed_requests(count: int, seed: int) -> list[Request]:
    """Greedy and sampled, with trees of their own and without, some with a prefix in common."""
    rng = np.random.default_rng(seed)
    requests: list[Request] = []
    for i in range(count):
        prompt = rng.integers(0, VOCAB, rng.integers(1, 30)).tolist()
        if i % 3 == 2:
            prompt = [*requests[-1].prompt[:19], *prompt][:33]
        sampling = SamplingParams(temperature=[0.0, 0.8, 1.2][i % 3], top_p=0.9, seed=i)
        tree = [None, None, PLAIN, "chain:2", BUSHY][i % 5]
        requests.append(request(prompt, int(rng.integers(1, 30)), sampling=sampling, tree=tree))
    return requests


# ---- the same text -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_text_among_others_that_come_go_and_cancel(models, engine, expected, seed):
    requests, rng, it = mixed_requests(48, seed), np.random.default_rng(seed), Run(engine)
    waiting, cancelled = list(requests), set()
    while waiting or engine.busy:
        for _ in range(rng.integers(0, 4)):
            if waiting:
                it.add(waiting.pop(0))
        it.step()
        running = [r for r in requests if r.id in it.deltas and r.id not in cancelled]
        if running and rng.random() < 0.1:
            victim = running[rng.integers(len(running))]
            if not it.deltas[victim.id] or not it.deltas[victim.id][-1].finish_reason:
                engine.abort(victim.id)
                cancelled.add(victim.id)
    left = [r for r in requests if r.id not in cancelled]
    assert cancelled and engine.status.prefix_hits > 0
    assert_equal_text(models, expected, it, left)
    for r in requests:  # what a cancelled request got is the beginning of its text
        assert it.last(r).finish_reason == ("abort" if r.id in cancelled else "length")
        ids = it.tokens(r)
        assert ids == expected([r])[0][: len(ids)] or r.id not in cancelled


@pytest.mark.parametrize("free", [9, 14])
def test_text_with_too_few_pages(models, engine, expected, free):
    """Sequences lose their pages and go on later; the rest of the pool is taken hostage."""
    hostages = engine.pool.allocate(NUM_PAGES - free)
    requests, it = mixed_requests(20, 3), Run(engine)
    preempted = engine.status.preemptions
    it.add(*requests)
    it.finish(hostages)
    engine.pool.release(hostages)
    assert engine.status.preemptions > preempted
    assert any(it.last(r).stats.preemptions for r in requests)
    assert_equal_text(models, expected, it, requests)


def test_priority_decides_who_is_served_and_who_loses_pages(engine):
    hostages = engine.pool.allocate(NUM_PAGES - 8)
    late, soon = request([1] * 20, 30, priority=1), request([2] * 20, 30)
    it = Run(engine)
    it.add(late)
    for _ in range(5):
        it.step(hostages)
    it.add(soon)
    it.finish(hostages)
    engine.pool.release(hostages)
    assert it.last(late).stats.preemptions and not it.last(soon).stats.preemptions
    assert list(it.deltas) == [late.id, soon.id]
    assert it.last(soon).stats.new_tokens == it.last(late).stats.new_tokens == 30


def test_a_long_prompt_does_not_hold_up_a_short_one(engine):
    long, short = request([1] * 60, 2), request([2, 3], 2)
    it = Run(engine)
    it.add(long, short)
    for _ in range(3):
        it.step()
    assert it.tokens(short) and not it.tokens(long)
    it.finish()


# ---- the prefix cache --------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [BUSHY, "chain:2", PLAIN])
def test_no_page_is_lost_and_the_draft_is_as_good_behind_a_hit(engine, tree):
    """A follow-up finds every full page, and takes as many rounds as without them."""
    for length in range(3, 19):
        first = request([5, 1, 0, *range(length % 6)] + [3] * length, 25, tree=tree)
        answer = run(engine, first).tokens(first)
        prompt = [*first.prompt, *answer]
        again = request(prompt, 12, tree=BUSHY)
        it = run(engine, again)
        assert it.last(again).stats.cached_tokens == (len(prompt) - 1) // PAGE * PAGE
        engine.pool.forget()
        fresh = request(prompt, 12, tree=BUSHY)
        other = run(engine, fresh)
        assert other.last(fresh).stats.cached_tokens == 0
        assert other.tokens(fresh) == it.tokens(again)
        assert other.last(fresh).stats.rounds == it.last(again).stats.rounds
        engine.pool.forget()


def test_salts_keep_prefixes_apart(engine):
    first, other, same = (request([1] * 30, 4, cache_salt=salt) for salt in ("a", "b", "a"))
    assert [run(engine, r).last(r).stats.cached_tokens for r in (first, other, same)] == [0, 0, 24]


# ---- the dispatcher ----------------------------------------------------------------------------


def test_the_tree_follows_the_number_of_sequences(engine):
    def rounds():
        return dict(engine.status.rounds_by_tree)

    before = rounds()
    run(engine, request([1, 2], 20))
    alone = rounds()
    assert alone[BUSHY] > before.get(BUSHY, 0) and alone.get(PLAIN) == before.get(PLAIN)
    run(engine, *(request([i % VOCAB], 40) for i in range(16)))
    many = rounds()
    assert many[PLAIN] >= alone.get(PLAIN, 0) + 16 * 30
    # Behind a long stretch of plain rounds the draft is as good as if it had never paused.
    short = [request([i % VOCAB, 1], 4) for i in range(15)]
    long = request([4, 2], 60)
    it = run(engine, long, *short)
    assert it.last(long).stats.drafts > 0
    alone = run(engine, again := request([4, 2], 60))
    assert alone.tokens(again) == it.tokens(long)


def test_a_request_may_do_without_speculation(engine):
    off = request([1, 2, 3], 10, tree=PLAIN)
    stats = run(engine, off).last(off).stats
    assert (stats.rounds, stats.drafts, stats.draft_tokens) == (9, 0, 0)
    assert stats.acceptance_length == 1.0


# ---- ends --------------------------------------------------------------------------------------


def test_stop_tokens_limits_and_what_they_report(engine, expected):
    free = expected([request([2, 4], 30)])[0]
    stop = free[5]
    cut = free.index(stop) + 1
    for tree in PROGRAMS.trees:
        stopped = request([2, 4], 30, stop_token_ids=(stop,), tree=tree)
        it = run(engine, stopped)
        assert it.tokens(stopped) == free[:cut]
        assert (it.last(stopped).finish_reason, it.last(stopped).stop_reason) == ("stop", stop)
        for limit in (1, 2, 9):
            short = request([2, 4], limit, tree=tree)
            it = run(engine, short)
            assert it.tokens(short) == free[:limit] and it.last(short).finish_reason == "length"
            assert it.last(short).stats.new_tokens == limit


def test_a_cancelled_request_frees_its_pages_at_once(engine):
    it, victim = Run(engine), request([1] * 20, 40)
    it.add(victim)
    for _ in range(6):
        it.step()
    assert engine.pool.num_held > 0
    engine.abort(victim.id)
    assert engine.pool.num_held == 0 and it.last(victim).finish_reason == "abort"
    engine.abort(victim.id)  # a second time is nothing
    it.finish()


def test_a_request_that_takes_too_long_ends_with_what_it_has(engine):
    late, it = request([1, 2], 40, timeout=0.0), Run(engine)
    it.add(late)
    it.finish()
    assert it.last(late).finish_reason == "timeout" and it.last(late).stats.new_tokens < 40


BAD = {
    "empty": (request([]), "0 prompt tokens"),
    "no room": (request([1] * 60, 10), "64 in all"),
    "no tokens": (request([1], 0), "0 new ones"),
    "tree": (request([1], tree="chain:9"), "chain:9' is not compiled"),
    "foreign token": (request([VOCAB]), "token 6 is outside 0..5"),
    "foreign stop": (request([1], stop_token_ids=(-1,)), "token -1"),
    "stops": (request([1], stop_token_ids=(1,) * 40), "at most 32"),
    "bias": (request([1], sampling=SamplingParams(logit_bias=((9, 1.0),))), "logit_bias names"),
    "no law": (
        request([1], sampling=SamplingParams(allowed_token_ids=(1, 2), bad_words=((1,), (2,)))),
        "leaves no token",
    ),
}


@pytest.mark.parametrize("bad, message", BAD.values(), ids=BAD)
def test_what_can_never_run_is_refused(engine, bad, message):
    with pytest.raises(ValueError, match=message):
        engine.check(bad)


# ---- log-probabilities -------------------------------------------------------------------------


@pytest.mark.parametrize("tree", PROGRAMS.trees)
def test_logprobs_are_those_of_the_targets_logits(models, engine, tree):
    sampling = SamplingParams(temperature=0.9, seed=5, presence_penalty=1.0)
    asked = request([1, 3, 5], 14, tree=tree, logprobs=3, sampling=sampling)
    silent = request([1, 3, 4], 14)
    it = run(engine, asked, silent)
    tokens = it.tokens(asked)
    given = [entry for delta in it.deltas[asked.id] for entry in delta.logprobs]
    with jax.transfer_guard("allow"):
        logits = np.asarray(models[0].logits([[*asked.prompt, *tokens]]))[0, 2:-1]
    exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert len(given) == len(tokens) == 14
    for token, entry, row in zip(tokens, given, exact, strict=True):
        assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        assert [i for i, _ in entry.top] == np.argsort(-row)[:3].tolist()
        assert [x for _, x in entry.top] == pytest.approx(np.sort(row)[::-1][:3], abs=1e-4)
    assert all(delta.logprobs is None for delta in it.deltas[silent.id])


# ---- what the host leaves behind ---------------------------------------------------------------


def test_the_idle_slot_neither_runs_nor_slows_others_down(models):
    """Calls are padded with it: one with controls would have all of them shape their logits."""
    state = make_engine(*models)._device._slots.state
    assert int(state.finish[SLOTS]) != 0 and not np.asarray(state.controls.active).any()


def test_the_host_does_not_run_ahead_of_a_long_prompt(engine, monkeypatch):
    """At most two steps' chunks are under way, so a newcomer waits for no more than those."""
    under_way, most = [], 0
    prefill = engine._device.prefill

    def watched(chunk):
        under_way.append(prefill(chunk))
        return under_way[-1]

    monkeypatch.setattr(engine._device, "prefill", watched)
    it = Run(engine)
    it.add(request([1] * 60, 2))
    while engine.busy:
        it.step()
        most = max(most, len(engine._calls))
    assert len(under_way) == 4 and most <= 1


def test_choices_of_one_prompt_share_its_pages(engine):
    choices = [request([3] * 30, 4, sampling=SamplingParams(1.0, seed=i)) for i in range(4)]
    it = run(engine, *choices)
    assert [it.last(r).stats.cached_tokens for r in choices] == [0, 24, 24, 24]


def test_controls_survive_a_preemption(engine):
    """Penalties, minimum and bad words count what was given out before the pages were lost."""
    own = {
        "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3,
        "min_tokens": 9, "bad_words": ((1, 2), (3, 3, 3)), "logit_bias": ((5, 0.5),),
    }  # fmt: skip

    def ask():
        return [
            request(
                [i % VOCAB, 2, 4, 1] * 3, 18, logprobs=2, stop_token_ids=(2,),
                sampling=SamplingParams(temperature=0.9, seed=i, **own),
            )
            for i in range(10)
        ]  # fmt: skip

    calm, pressed = ask(), ask()
    undisturbed = run(engine, *calm)
    engine.pool.forget()
    hostages = engine.pool.allocate(NUM_PAGES - 9)
    it = Run(engine)
    it.add(*pressed)
    it.finish(hostages)
    engine.pool.release(hostages)
    assert sum(it.last(r).stats.preemptions for r in pressed) > 2
    for a, b in zip(calm, pressed, strict=True):
        assert it.tokens(b) == undisturbed.tokens(a)
        assert it.last(b).finish_reason == undisturbed.last(a).finish_reason
        for x, y in zip(
            (e for d in undisturbed.deltas[a.id] for e in d.logprobs),
            (e for d in it.deltas[b.id] for e in d.logprobs),
            strict=True,
        ):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
