"""`generate` as a program: streaming, stop tokens, limits, errors, chunks, and what is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jax_eagle import SamplingParams, generate, generate_stream, prefill

pytestmark = pytest.mark.usefixtures("quick_compiler", "small_pages")

# Most tests have three prompts that need three pages with their answers: programs are shared.
OPTIONS = {"max_new_tokens": 12, "stop_token_ids": []}
TREES = ["chain:3", "paths:[[0],[1],[0,0]]"]


@pytest.fixture(scope="module")
def target(make_target):
    return make_target()


@pytest.fixture(scope="module")
def draft(make_draft):
    return make_draft()


@pytest.mark.parametrize("tree", TREES)
def test_the_stream_gives_the_same_tokens_round_by_round(target, draft, tree):
    prompts = [[1, 2, 3], [4] * 9, [0]]
    whole = generate(target, draft, prompts, tree=tree, **OPTIONS)
    events = list(generate_stream(target, draft, prompts, tree=tree, **OPTIONS))
    for b in range(3):
        assert sum((event.new_tokens[b] for event in events), []) == whole.tokens[b]
        # The first event is prefill's; a round gives its accepted tokens and the bonus.
        gains = [len(event.new_tokens[b]) for event in events[1:] if event.new_tokens[b]]
        accepted = [event.num_accepted[b] for event in events[1:] if event.new_tokens[b]]
        assert len(gains) == whole.rounds[b]
        assert gains[:-1] == [n + 1 for n in accepted[:-1]]
        assert [len(event.ranks[b]) for event in events[1 : len(gains) + 1]] == accepted
    assert events[-1].finish_reasons == whole.finish_reasons == ["length"] * 3
    gained = sum(len(tokens) - 1 for tokens in whole.tokens)
    assert whole.acceptance_length == gained / sum(whole.rounds) > 1


@pytest.mark.parametrize("tree", TREES[1:])
def test_stop_tokens_and_limits_cut_exactly(target, draft, tree):
    prompts = [[2, 4], [4] * 9, [0]]
    free = generate(target, None, prompts, **OPTIONS).tokens
    stop = free[0][4]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    options = {"tree": tree, "max_new_tokens": 12}
    result = generate(target, draft, prompts, stop_token_ids=[stop], **options)
    assert result.tokens == cut
    assert result.finish_reasons == ["stop" if stop in row else "length" for row in free]
    own = target.replace(config=dataclasses.replace(target.config, stop_token_ids=(stop,)))
    assert generate(own, draft, prompts, **options).tokens == cut
    for limit in (9, 11):
        result = generate(
            target, draft, prompts, max_new_tokens=limit, stop_token_ids=[], tree=tree
        )
        assert result.tokens == [row[:limit] for row in free]
        assert result.finish_reasons == ["length"] * 3


def test_the_end_of_the_context_is_a_limit(target, draft):
    context = target.config.max_position
    prompts = [[1] * (context - 3), [3] * (context - 1), [2]]
    result = generate(target, draft, prompts, tree="chain:3", **OPTIONS)
    assert [len(tokens) for tokens in result.tokens] == [3, 1, 12]
    assert result.finish_reasons == ["length"] * 3


def test_chunks_of_prefill_do_not_change_the_text(target, draft, monkeypatch):
    prompts = [[1, 2, 3, 4, 5, 0, 1, 2, 3], [5, 4], [3] * 7]
    whole = generate(target, draft, prompts, tree="chain:3", **OPTIONS)
    monkeypatch.setattr(prefill, "_PREFILL_CHUNK", 4)
    pieces = generate(target, draft, prompts, tree="chain:3", **OPTIONS)
    assert pieces.tokens == whole.tokens and pieces.rounds == whole.rounds


@pytest.mark.parametrize("tree", [None, *TREES[:1]])
def test_nan_logits_end_with_an_error(target, draft, tree):
    broken = jax.tree.map(lambda x: x, target.params)
    broken["norm"] = {"scale": broken["norm"]["scale"] * jnp.nan}
    head = None if tree is None else draft
    result = generate(
        target.replace(params=broken), head, [[1], [2, 3], [4] * 9], tree=tree or "auto", **OPTIONS
    )
    assert result.finish_reasons == ["error"] * 3 and result.tokens == [[], [], []]


# ---- compilation -------------------------------------------------------------------------------

_compiled: list[str] = []


def _count(event: str, duration: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_count)


def test_nothing_is_compiled_for_another_length_or_other_parameters(target, draft, make_target):
    """Prompts, limits, seeds, temperatures and parameters change; batch bucket and tree stay."""
    draft, options = draft.replace(params=dict(draft.params)), {"tree": "chain:3"}
    before = len(_compiled)
    jax.jit(lambda x: x + 41)(jnp.zeros(3))
    assert len(_compiled) > before, "the counter counts"

    generate(target, draft, [[1, 2, 3], [4, 5, 0], [5]], max_new_tokens=12, **options)
    before = len(_compiled)
    for prompts, limit in (([[1] * 5, [2], [5]], 9), ([[3] * 8, [0, 1], [2, 2]], 11)):
        sampling = [SamplingParams(temperature=0.7, top_k=3, seed=limit), *[SamplingParams()] * 2]
        generate(target, draft, prompts, max_new_tokens=limit, sampling=sampling, **options)
    fresh = target.replace(params=make_target(5).params)
    generate(fresh, draft, [[2, 2], [3], [1] * 4], max_new_tokens=12, **options)
    assert len(_compiled) == before


# ---- bad input ---------------------------------------------------------------------------------

BAD = {
    "bare text": ({"prompts": "hello"}, "expected a list"),
    "no prompts": ({"prompts": []}, "no prompts"),
    "empty prompt": ({"prompts": [[1], []]}, "prompt 1 is empty"),
    "too long": ({"prompts": [[1] * 20]}, "prompt 0 has 20 tokens, the context holds 20"),
    "foreign token": ({"prompts": [[6]]}, "outside 0..5"),
    "negative token": ({"prompts": [[-1]]}, "outside 0..5"),
    "text without tokenizer": ({"prompts": ["hello"]}, "no tokenizer"),
    "limit": ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    "tree": ({"tree": "bush:3"}, "unknown tree 'bush:3'"),
    "endless tree": ({"tree": "chain:100000"}, "too large"),
    "wide tree": ({"tree": "static:16"}, "wider than the draft vocabulary"),
    "drafting": ({"drafting": "bold"}, "drafting is 'bold'"),
    "sync": ({"draft_sync": "never"}, "draft_sync is 'never'"),
    "dropped nodes": (
        {"tree": "dynamic:depth=2,width=2,nodes=5", "drafting": "sampled"}, "nodes=7",
    ),
    "sampling count": ({"sampling": [SamplingParams()] * 2}, "2 sampling parameters for 1"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_bad_input_says_what_is_wrong(target, draft, changes, message):
    arguments = {"prompts": [[1]], "tree": "chain:3"} | changes
    with pytest.raises(ValueError, match=message):
        generate(target, draft, arguments.pop("prompts"), **arguments)
