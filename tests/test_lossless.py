"""Speculation changes neither the text nor its law: `generate` against plain decoding and against
the law that follows from the target's own logits, for every kind of tree and of draft."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks.equal_text import compare
from jax_eagle import Draft, SamplingParams, generate, generate_stream
from jax_eagle.config import KV_DTYPES, Llama4Attention, MoE
from jax_eagle.quantize import quantize

pytestmark = pytest.mark.usefixtures("small_pages")

B, NEW = 512, 12  # one batch size and one length for all: a case is compiled once
VOCAB = 6
# Bonus tokens behind a leaf that is no deepest node are among those that the law is tested on.
STATIC = "paths:[[0],[1],[2],[0,0],[0,1],[1,0],[0,0,0],[1,0,0]]"
FEW_TOKENS = (0, 2, 3, 5)  # what the draft of the static tree knows


@dataclasses.dataclass(frozen=True)
class Case:
    """One decode program."""

    tree: str
    drafting: str = "greedy"
    draft_sync: str = "all"
    vocab: tuple[int, ...] | None = None
    layers: int = 1
    """Of the draft."""

    @property
    def options(self) -> dict:
        return {"tree": self.tree, "drafting": self.drafting, "draft_sync": self.draft_sync}


DYNAMIC = {
    "greedy": "dynamic:depth=3,width=2,nodes=6",
    "sampled": "dynamic:depth=3,width=2,nodes=11",
}
CASES = {
    "chain-greedy-all": Case("chain:3"),
    # And those behind a path that is accepted whole.
    "one-sampled-last": Case("chain:1", "sampled", "last"),
    "static-greedy-last": Case(STATIC, "greedy", "last", vocab=FEW_TOKENS, layers=2),
    "static-sampled-all": Case(STATIC, "sampled", vocab=FEW_TOKENS),
    "dynamic-greedy-all": Case(DYNAMIC["greedy"]),
    "dynamic-sampled-last": Case(DYNAMIC["sampled"], "sampled", "last"),
}
"""Every pair of tree, drafting and sync; the other combinations run with `pytest -m slow`."""
MORE_CASES = {
    "chain-greedy-last": Case("chain:3", "greedy", "last"),
    "chain-sampled-all": Case("chain:3", "sampled"),
    "chain-sampled-last": Case("chain:3", "sampled", "last"),
    "short-sampled-all": Case("paths:[[0],[1],[0,0]]", "sampled"),
    "static-greedy-all": Case(STATIC, vocab=FEW_TOKENS),
    "static-sampled-last": Case(STATIC, "sampled", "last", vocab=FEW_TOKENS),
    "dynamic-greedy-last": Case(DYNAMIC["greedy"], "greedy", "last"),
    "dynamic-sampled-all": Case(DYNAMIC["sampled"], "sampled"),
}


def cases(names):
    """Parametrises over all cases; those not named are slow."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=name, marks=() if name in names else pytest.mark.slow)
            for name, case in (CASES | MORE_CASES).items()
        ],
    )


all_cases = cases(CASES)
few_cases = cases(
    ["chain-greedy-all", "static-greedy-last", "static-sampled-all", "dynamic-sampled-last"]
)

MIXED = [
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.0, top_k=3),
    SamplingParams(temperature=1.2, top_p=0.8, min_p=0.1),
]


LLAMA4 = {
    "llama4": Llama4Attention(nope_layers=(1,), chunk=4, floor_scale=4),
    "moe": MoE(num_experts=4, experts_per_token=1, layers=(1,), intermediate_size=32),
}


@pytest.fixture(
    scope="module",
    params=["llama3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama4", "quantised"))],
)
def target(make_target, request):
    """Llama 3; Llama 4 with experts, chunks and a NoPE layer; the same in fewer bits."""
    if request.param == "llama3":
        return make_target()
    kv_dtype = None if request.param == "llama4" else KV_DTYPES["fp8"]
    target = make_target(4, **LLAMA4, kv_dtype=kv_dtype)  # 4: neither too sure nor indifferent
    if kv_dtype is None:
        return target
    return quantize(target, "experts=int4,mlp=fp8,attention=int8,head=fp8,group_size=32")


@pytest.fixture(scope="module")
def prompts(ragged_prompts):
    return ragged_prompts(B)


@pytest.fixture(scope="module")
def mixed():
    """Rows of four kinds, each with a seed of its own."""
    return [dataclasses.replace(MIXED[i % 4], seed=7919 * i) for i in range(B)]


@pytest.fixture(scope="module")
def plain(target, prompts, mixed):
    """Plain decoding: "greedy" rows and "mixed" ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax_eagle.prefill.PAGE_SIZE", 8)
        both = {"greedy": SamplingParams(), "mixed": mixed}
        return {name: run(target, None, prompts, sampling=s) for name, s in both.items()}


def run(target, draft, prompts, **options):
    return generate(
        target, draft, prompts, max_new_tokens=NEW, stop_token_ids=[], **options
    )  # fmt: skip


def stream(target, draft, prompts, **options):
    return generate_stream(
        target, draft, prompts, max_new_tokens=NEW, stop_token_ids=[], **options
    )  # fmt: skip


def joined(events) -> list[list[int]]:
    """What the rounds gave each row."""
    rows = zip(*(event.new_tokens for event in events), strict=True)
    return [[*itertools.chain(*row)] for row in rows]


def assert_equal_text(target, prompts, expected, actual, sampling=None):
    comparison = compare(target, prompts, expected, actual, sampling=sampling)
    assert comparison.equal, str(comparison)


# ---- the same text -----------------------------------------------------------------------------


def broken_draft(make_draft, kind: str, case: Case) -> Draft:
    """Drafts whose proposals are worth nothing, or not even numbers."""
    draft = make_draft(7, case.vocab, case.layers)
    change = {"nan": lambda x: x * jnp.nan, "zero": jnp.zeros_like, "huge": lambda x: x * 1e30}
    return draft.replace(params=jax.tree.map(change[kind], draft.params))


@few_cases
def test_greedy_text_is_that_of_plain_decoding(target, make_draft, prompts, plain, case):
    result = run(target, make_draft(7, case.vocab, case.layers), prompts, **case.options)
    assert_equal_text(target, prompts, plain["greedy"].tokens, result.tokens)
    assert result.finish_reasons == ["length"] * B
    assert result.acceptance_length > 1.1  # it would prove little if nothing was ever accepted
    assert plain["greedy"].acceptance_length == 1.0


@few_cases
@pytest.mark.parametrize("kind", ["nan", "zero", "huge"])
def test_broken_drafts_change_nothing(target, make_draft, prompts, plain, case, kind):
    result = run(target, broken_draft(make_draft, kind, case), prompts, **case.options)
    assert_equal_text(target, prompts, plain["greedy"].tokens, result.tokens)


@few_cases
def test_seeded_text_is_that_of_plain_decoding(target, make_draft, prompts, plain, mixed, case):
    """With greedy drafting for every row, with sampled drafting for those at temperature 0."""
    result = run(
        target, make_draft(3, case.vocab, case.layers), prompts, sampling=mixed, **case.options
    )
    rows = [b for b in range(B) if case.drafting == "greedy" or mixed[b].temperature == 0]
    assert_equal_text(
        target,
        [prompts[b] for b in rows],
        [plain["mixed"].tokens[b] for b in rows],
        [result.tokens[b] for b in rows],
        [mixed[b] for b in rows],
    )


@pytest.mark.parametrize("name", ["static-sampled-all", "dynamic-sampled-last"])
def test_sampled_drafting_repeats_and_does_not_depend_on_the_row(
    target, make_draft, prompts, mixed, name
):
    case, order = CASES[name], np.random.default_rng(0).permutation(B)
    draft = make_draft(7, case.vocab, case.layers)
    first = run(target, draft, prompts, sampling=mixed, **case.options).tokens
    shuffled = run(
        target, draft, [prompts[i] for i in order], sampling=[mixed[i] for i in order],
        **case.options,
    )  # fmt: skip
    assert shuffled.tokens == [first[i] for i in order]
    # The laws below are sampled round by round.
    assert joined(stream(target, draft, prompts, sampling=mixed, **case.options)) == first


@pytest.mark.slow  # in the engine's tests batches are of other sizes than `generate`'s, too
@pytest.mark.parametrize("rows", [[0], [0, 5, 6]], ids=["1", "3"])
def test_text_does_not_depend_on_the_batch(target, make_draft, prompts, plain, mixed, rows):
    """Row 0 is in all of them: its prompt is the longest, which fixes the number of pages."""
    own = [mixed[b] for b in rows]
    texts = [prompts[b] for b in rows]
    result = run(target, make_draft(), texts, sampling=own, tree="chain:3")
    assert_equal_text(target, texts, [plain["mixed"].tokens[b] for b in rows], result.tokens, own)


# ---- adversaries -------------------------------------------------------------------------------

ORACLE_CASES = {
    "chain-sampled-last": MORE_CASES["chain-sampled-last"],
    "static-greedy-last": CASES["static-greedy-last"],
}
oracle_cases = pytest.mark.parametrize(
    "name", ["chain-sampled-last", pytest.param("static-greedy-last", marks=pytest.mark.slow)]
)


@oracle_cases
def test_an_oracle_is_accepted_to_the_last_node(target, make_oracle, prompts, plain, mixed, name):
    """Every round but the one that the limit cuts gains depth + 1."""
    case, sampled = ORACLE_CASES[name], ORACLE_CASES[name].drafting == "sampled"
    own = mixed if sampled else SamplingParams()
    events = list(stream(target, make_oracle(1.0), prompts, sampling=own, **case.options))
    gained = np.array([[len(new) for new in event.new_tokens] for event in events])
    assert (gained == [[n] * B for n in (1, 4, 4, 3)]).all()
    tokens = joined(events)
    rows = [b for b in range(B) if not sampled or mixed[b].temperature == 0]
    expected = plain["mixed" if sampled else "greedy"].tokens
    assert [tokens[b] for b in rows] == [expected[b] for b in rows]


@oracle_cases
def test_a_draft_that_is_always_wrong_only_costs_time(target, make_oracle, prompts, plain, name):
    result = run(target, make_oracle(-1.0), prompts, **ORACLE_CASES[name].options)
    assert result.rounds == [NEW - 1] * B
    assert_equal_text(target, prompts, plain["greedy"].tokens, result.tokens)


# ---- the same law ------------------------------------------------------------------------------

PROMPT = [1, 4, 0, 2, 5, 3, 3, 1, 0, 4, 2, 2, 5, 1, 0, 3]  # the context ends four tokens later
LAWS = {
    "plain": {"temperature": 1.0},
    "top-k": {"temperature": 0.8, "top_k": 3},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
    "all": {"temperature": 1.1, "top_k": 5, "top_p": 0.95, "min_p": 0.12},
}
CALLS = 64


@pytest.fixture(scope="module")
def exact_laws(target, processed_law):
    """Probability of every three tokens behind PROMPT, by name: [V, V, V]."""
    pairs = list(itertools.product(range(VOCAB), repeat=2))
    logits = np.asarray(target.logits([PROMPT + list(pair) for pair in pairs]))[:, -3:]

    def law(options):
        steps = np.array([[processed_law(x, **options) for x in row] for row in logits])
        first, second, third = np.moveaxis(steps.reshape(VOCAB, VOCAB, 3, VOCAB), 2, 0)
        one = first[0, 0]
        two = one[:, None] * second[:, 0]
        return two[:, :, None] * third

    return {name: law(options) for name, options in LAWS.items()}


def sample(target, draft, **options) -> dict[str, np.ndarray]:
    """Counts of the first three tokens, by law; every draw has its own seed."""
    counts = {name: np.zeros((VOCAB,) * 3, int) for name in LAWS}
    names = [name for name in LAWS for _ in range(B // len(LAWS))]
    for call in range(CALLS):
        sampling = [SamplingParams(seed=call * B + b, **LAWS[name]) for b, name in enumerate(names)]
        # Prefill gives a token, and each of two rounds at least one.
        events = stream(target, draft, [PROMPT] * B, sampling=sampling, **options)
        texts = joined(itertools.islice(events, 3))
        for name, tokens in zip(names, texts, strict=True):
            counts[name][tuple(tokens[:3])] += 1
    return counts


@dataclasses.dataclass(frozen=True)
class Fit:
    """How well counts fit a law."""

    impossible: int
    """Outcomes of probability zero."""
    pvalue: float
    """Chi-square over the outcomes; those expected less than five times are one."""
    total_variation: float
    variation_bound: float
    """Exceeded by one sample in 10^4 at most."""

    @classmethod
    def of(cls, counts, law) -> "Fit":
        n, counts, law = counts.sum(), counts.ravel(), law.ravel()
        rare = n * law < 5
        cells = [np.append(x[~rare], x[rare].sum()) for x in (counts, n * law)]
        cells = [x[cells[1] > 0] for x in cells]
        # A count's mean deviation is at most its standard deviation; one draw moves the total
        # variation by at most 1 / n, which bounds how far it strays from its mean (McDiarmid).
        mean = np.sqrt(law * (1 - law) / n).sum() / 2
        return cls(
            impossible=int(counts[law == 0].sum()),
            pvalue=float(stats.chisquare(cells[0], cells[1] * n / cells[1].sum()).pvalue),
            total_variation=float(np.abs(counts / n - law).sum() / 2),
            variation_bound=float(mean + np.sqrt(np.log(1e4) / (2 * n))),
        )

    @property
    def good(self) -> bool:
        close = self.total_variation < self.variation_bound
        return self.impossible == 0 and self.pvalue > 1e-4 and close


def assert_law(counts, exact_laws):
    fits = {name: Fit.of(counts[name], law) for name, law in exact_laws.items()}
    for name, fit in fits.items():
        print(f"{name:6} {fit}")
    assert all(fit.good for fit in fits.values()), fits


@all_cases
def test_law_of_three_tokens(target, make_draft, exact_laws, case):
    draft = make_draft(7, case.vocab, case.layers)
    # Confident in its own tokens: many rejections, and mass outside the target's processed law.
    draft = draft.replace(
        params={**draft.params, "norm": {"scale": 2 * draft.params["norm"]["scale"]}}
    )
    assert_law(sample(target, draft, **case.options), exact_laws)


@pytest.fixture(scope="module")
def plain_counts(target):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax_eagle.prefill.PAGE_SIZE", 8)
        return sample(target, None)


def test_law_of_plain_decoding(plain_counts, exact_laws):
    assert_law(plain_counts, exact_laws)


def test_law_against_a_draft_that_wants_the_opposite(target, make_oracle, exact_laws):
    options = ORACLE_CASES["chain-sampled-last"].options
    assert_law(sample(target, make_oracle(-1.0), **options), exact_laws)


class CarelessDraft(Draft):
    """Proposes its favourite, but hands on its law as if the favourite had been drawn from it."""

    def expand(self, target, head, shape, cache, sync, sampling):
        _, honest = super().expand(target, head, shape, cache, sync, sampling)
        cache, proposal = super().expand(target, head, shape, cache, sync, None)
        return cache, proposal.replace(law=honest.law)


def test_the_law_test_notices_a_wrong_verification(target, make_draft, exact_laws):
    honest = make_draft(7)
    careless = CarelessDraft(honest.params, None, honest.config)
    counts = sample(target, careless, tree="chain:1", drafting="sampled")
    for name, law in exact_laws.items():
        fit = Fit.of(counts[name], law)
        assert fit.pvalue < 1e-6 and not fit.good, (name, fit)


def test_the_law_test_notices_a_wrong_law(plain_counts, exact_laws):
    """Plain decoding against the law of a temperature that is a tenth higher."""
    law = exact_laws["plain"] ** (1 / 1.1)
    assert not Fit.of(plain_counts["plain"], law / law.sum()).good
