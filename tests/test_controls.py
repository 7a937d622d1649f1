"""The exact law under every sampler control, through the engine: at every node of a tree.

The target's law of three tokens behind a prompt is enumerated (216 outcomes) from its logits, in
float64, token by token as a plain decoder would apply the controls; the engine samples it, chains,
bushy trees and plain decoding mixed in one batch.
"""

import functools
import itertools

import numpy as np
import pytest
from scipy import stats

from jax_eagle import GenerateResult, SamplingParams, generate
from serve.dispatch import PLAIN
from tests.engines import BUSHY, CONTEXT, PAGE, VOCAB, Run, make_engine, request, run

pytestmark = pytest.mark.usefixtures("quick_compiler")

PROMPT = [1, 4, 0, 2, 5, 3, 3, 1, 0]
DEPTH, SAMPLES, MIXED = 3, 600, 200
STOP = (2,)
CONTROLS = {
    "plain": {},
    "temperature": {"temperature": 1.4},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.2},
    "negative": {"frequency_penalty": -1.0, "presence_penalty": -0.5},
    "repetition": {"repetition_penalty": 1.8},
    "bias": {"logit_bias": ((0, 2.0), (3, -1.5))},
    "allowed": {"allowed_token_ids": (0, 1, 4)},
    "bad words": {"bad_words": ((1,), (0, 4), (4, 0, 4), (5, 5))},
    "min_tokens": {"min_tokens": 2},
    "all": {
        "temperature": 0.9, "top_p": 0.95, "min_p": 0.02, "presence_penalty": 0.4,
        "frequency_penalty": 0.3, "repetition_penalty": 1.2, "logit_bias": ((2, 1.0),),
        "bad_words": ((4, 4),), "min_tokens": 1,
    },
}  # fmt: skip
SLOW = ("temperature", "top_p", "min_p", "presence", "frequency")
"""Their law is sampled with `pytest -m slow`: "all" and "negative" have them too."""
QUICK = tuple(name for name in CONTROLS if name not in SLOW)
TREES = [BUSHY, "chain:2", PLAIN, None]


@pytest.fixture(scope="module")
def models(make_target, make_draft):
    return make_target(max_position=CONTEXT), make_draft(max_position=CONTEXT)


@pytest.fixture(scope="module")
def engine(models):
    return make_engine(*models)


def controls(*left_out: str):
    """Parametrises over the controls but those left out."""
    names = [name for name in CONTROLS if name not in left_out]
    marks = {name: pytest.mark.slow if name in SLOW else () for name in names}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks[n]) for n in names])


def params(name: str, seed: int = 0) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, **CONTROLS[name]})


def shaped(logits, own: SamplingParams, output: list[int]) -> np.ndarray:
    """The logits of one step of plain decoding, by the plain meaning of each control."""
    logits = np.array(logits, np.float64)
    if own.allowed_token_ids is not None:
        logits[[i for i in range(VOCAB) if i not in own.allowed_token_ids]] = -np.inf
    for *before, last in own.bad_words:
        if not before or output[-len(before) :] == before:
            logits[last] = -np.inf
    if len(output) < own.min_tokens:
        logits[list(STOP)] = -np.inf
    for token, bias in own.logit_bias:
        logits[token] += bias
    for token in range(VOCAB):
        times = output.count(token)
        if times or token in PROMPT:
            factor = own.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        logits[token] -= times * own.frequency_penalty + (times > 0) * own.presence_penalty
    return logits


@pytest.fixture(scope="module")
def exact_laws(models, processed_law):
    """Probability of each outcome by name; a text that stops early ends with STOP."""
    prefixes = [p for n in range(DEPTH) for p in itertools.product(range(VOCAB), repeat=n)]
    padded = [[*PROMPT, *p, *[0] * (DEPTH - len(p))] for p in prefixes]
    logits = np.asarray(models[0].logits(padded))
    last = {p: row[len(PROMPT) + len(p) - 1] for p, row in zip(prefixes, logits, strict=True)}

    def law(own: SamplingParams) -> dict[tuple[int, ...], float]:
        filters = {n: getattr(own, n) for n in ("temperature", "top_k", "top_p", "min_p")}
        outcomes, ends = {(): 1.0}, {}
        for _ in range(DEPTH):
            longer = {}
            for prefix, mass in outcomes.items():
                probs = processed_law(shaped(last[prefix], own, list(prefix)), **filters)
                for token, prob in enumerate(probs):
                    place = ends if token in STOP else longer
                    place[*prefix, token] = mass * prob
            outcomes = longer
        return ends | outcomes

    return {name: law(params(name)) for name in CONTROLS}


@pytest.fixture(scope="module")
def samples(engine):
    """samples(name) -> texts of a control, each with a seed of its own.

    Controls are mixed in one engine, and at first trees as well; later they take turns.
    """
    texts = functools.cache(functools.partial(sampled_texts, engine))
    return lambda name: texts(QUICK if name in QUICK else SLOW)[name]


def sampled_texts(engine, names: tuple[str, ...]) -> dict[str, list]:
    it, asked = Run(engine), []
    for seed, name in itertools.product(range(SAMPLES), names):
        own = params(name, seed=1009 * seed + [*CONTROLS].index(name) % 7)
        turn = seed if seed < MIXED else (seed - MIXED) * len(TREES) // (SAMPLES - MIXED)
        each = request(
            PROMPT, DEPTH, sampling=own, stop_token_ids=STOP, tree=TREES[turn % len(TREES)]
        )
        asked.append((name, each))
    for begin in range(0, len(asked), 512):  # a queue that is not too long to be sorted each step
        it.add(*(each for _, each in asked[begin : begin + 512]))
        it.finish()
    texts = {name: [] for name in names}
    for name, each in asked:
        texts[name].append((each.tree, tuple(it.tokens(each))))
    return texts


def pvalue(counts: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square; outcomes expected less than five times are one cell."""
    rare = expected < 5
    cells = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
    cells = [x[cells[1] > 0] for x in cells]
    return float(stats.chisquare(cells[0], cells[1] * counts.sum() / cells[1].sum()).pvalue)


@controls()
def test_law_through_the_engine(exact_laws, samples, name):
    law, texts = exact_laws[name], [text for _, text in samples(name)]
    counts = {outcome: texts.count(outcome) for outcome in law}
    assert sum(counts.values()) == len(texts) == SAMPLES, "an outcome that cannot be"
    impossible = [text for text in texts if law[text] == 0]
    assert not impossible
    observed, expected = np.array(list(counts.values())), SAMPLES * np.array(list(law.values()))
    p = pvalue(observed, expected)
    print(f"{name:12} {np.count_nonzero(expected)} outcomes, p = {p:.3f}")
    assert p > 1e-4


@controls("plain")
def test_each_control_changes_the_law(exact_laws, samples, name):
    """The texts of one control do not fit the law without it: the test above tells them apart."""
    law, texts = exact_laws["plain"], [text for _, text in samples(name)]
    observed = np.array([texts.count(outcome) for outcome in law])
    expected = SAMPLES * np.array(list(law.values()))
    assert observed.sum() < SAMPLES or pvalue(observed, expected) < 1e-4


def generated(target, draft, seed: int) -> GenerateResult:
    """Twelve tokens under each control, so that penalties add up and words lie across pages."""
    own = [params(name, seed) for name in CONTROLS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax_eagle.prefill.PAGE_SIZE", PAGE)
        return generate(
            target, draft, [PROMPT] * len(own), max_new_tokens=12, sampling=own,
            stop_token_ids=STOP, tree="static:3",
        )  # fmt: skip


@pytest.fixture(scope="module")
def plain(models):
    """Texts of plain decoding by control, for each of six seeds."""
    return [
        dict(zip(CONTROLS, generated(models[0], None, s).tokens, strict=True)) for s in range(6)
    ]


@pytest.mark.parametrize("name", CONTROLS)
def test_a_seed_gives_the_same_text_with_any_tree_and_in_generate(engine, plain, name):
    for tree in TREES:
        asked = [
            request(PROMPT, 12, sampling=params(name, seed), stop_token_ids=STOP, tree=tree)
            for seed in range(len(plain))
        ]
        it = run(engine, *asked)
        assert [it.tokens(each) for each in asked] == [texts[name] for texts in plain]


def test_controls_in_generate_give_the_text_of_plain_decoding(models, plain):
    drafted = generated(*models, seed=0)
    assert drafted.tokens == [*plain[0].values()] and drafted.acceptance_length > 1


def test_tokens_that_do_not_exist_are_refused(models):
    with pytest.raises(ValueError, match=r"allowed_token_ids names token 9, outside 0\.\.5"):
        generate(models[0], None, [[1]], sampling=SamplingParams(allowed_token_ids=(9,)))
