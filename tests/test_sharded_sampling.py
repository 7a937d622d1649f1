"""A vocabulary that is cut over eight devices: the tokens of one device, and no gathered logits.

Texts are compared as they are. Devices add partial sums in another order, so a text might differ
where two tokens nearly tie; those of these seeds do not.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compiled import collectives
from jax_eagle import Draft, SamplingParams, Target, generate
from jax_eagle.config import DraftConfig, LlamaConfig
from jax_eagle.draft import _propose
from jax_eagle.eagle import init_draft_params
from jax_eagle.generate import decode
from jax_eagle.llama import init_params
from jax_eagle.logprobs import Logprobs
from jax_eagle.prefill import start
from jax_eagle.sampling import Purpose, Sampling, draw, gumbel, processed_scores
from jax_eagle.sharding import ONE_DEVICE, Backend, make_mesh
from tests.conftest import random_params
from tests.devices import on_eight_devices

V, U = 2048, 1024
CONFIG = LlamaConfig(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=8, num_kv_heads=8,
    head_dim=8, max_position=128,
)  # fmt: skip
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [40, 50], [600, 700, 800]]
WARM = {"temperature": 0.9, "seed": 7}
SAMPLING = [
    SamplingParams(repetition_penalty=1.3, min_tokens=3),
    SamplingParams(**WARM, top_k=300, top_p=0.8),
    SamplingParams(**WARM, min_p=0.02, frequency_penalty=0.7, logit_bias=((5, 4.0), (1999, 4.0))),
    SamplingParams(**WARM, presence_penalty=0.5, bad_words=((1700,), (900, 901)),
                   allowed_token_ids=tuple(range(0, V, 3))),
]  # fmt: skip
CASES = {
    "dynamic": ("dynamic:depth=2,width=2,nodes=4", "greedy"),
    "static, sampled": ("paths:[[0],[1],[0,0]]", "sampled"),
}
LAWS = [
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=0.7, top_k=40),
    SamplingParams(temperature=1.3, top_p=0.9, seed=3),
    SamplingParams(temperature=1.3, top_k=900, top_p=0.7, min_p=0.01, seed=4),
]


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(__file__)


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_give_the_text_of_one(found, case):
    one, eight = found["texts"][case]
    assert len({token for row in one for token in row}) > 15  # or there would be little to compare
    assert eight == one


@pytest.mark.parametrize("case", CASES)
def test_no_logits_are_gathered(found, case):
    """Where draft tokens are drawn, their law moves to the devices of the target's tokens."""
    law = len(PROMPTS) * U * 4
    largest = max(found["gathered"][case])
    assert largest == law if "sampled" in case else 0 < largest < U


def test_the_controls_stay_where_they_are(found):
    """Or the second call of a program would be another program."""
    assert found["controls"] == ["[None, 'tensor']"] * 3


@pytest.mark.parametrize("what", ["noise", "token", "kept", "children", "top_tokens"])
def test_eight_devices_find_the_tokens_of_one(found, what):
    """Ties included: of equals the lowest token comes first."""
    one, eight = found["functions"][what]
    assert eight == one


def test_log_probabilities_are_those_of_one_device(found):
    one, eight = found["functions"]["log_probs"]
    np.testing.assert_allclose(eight, one, rtol=1e-5)


# ---- on eight devices --------------------------------------------------------------------------


def models() -> tuple[Target, Draft]:
    config = DraftConfig.for_target(CONFIG, draft_vocab_size=U)
    ids = np.sort(np.random.default_rng(0).permutation(V)[:U]).astype(np.int32)
    draft = Draft(random_params(init_draft_params, config, 1), jnp.asarray(ids), config)
    return Target(random_params(init_params, CONFIG, 0), CONFIG), draft


def run(target: Target, draft: Draft, tree: str, drafting: str) -> list[list[int]]:
    options = {"max_new_tokens": 8, "sampling": SAMPLING, "stop_token_ids": [3]}
    return generate(target, draft, PROMPTS, tree=tree, drafting=drafting, **options).tokens


def round_of(target: Target, draft: Draft, tree: str, drafting: str):
    """The program that `run` has run."""
    plan, state = start(
        target, draft, PROMPTS, max_new_tokens=8, sampling=SAMPLING, tree=tree, drafting=drafting,
        stop_token_ids=[3],
    )  # fmt: skip
    head = draft.bind_head(target)
    return decode.lower(target, draft, head, plan, state, np.int32(2**30)).compile()


@functools.partial(jax.jit, static_argnames="backend")
def functions(backend: Backend, logits_BMV, sampling: Sampling):
    """What a round makes of logits."""
    B, M, _ = logits_BMV.shape
    logits_BMV = backend.by_vocab(logits_BMV)
    position_BM = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32)[None], (B, M))
    scores_BMV = processed_scores(logits_BMV, sampling, backend=backend)
    noise_BMV = gumbel(sampling.seed, position_BM, Purpose.TARGET, V)
    children, _, _ = _propose(logits_BMV, 3, position_BM[:, 0], None, 0, backend)
    logprobs = Logprobs.empty(B, M, backend=backend).replace(wanted=jnp.ones(B, bool))
    logprobs = logprobs.of(logits_BMV, position_BM, children[:, :, 2])
    return {
        "noise": backend.by_vocab(noise_BMV),
        "token": draw(logits_BMV, sampling, position_BM, backend=backend),
        "kept": scores_BMV > -jnp.inf,
        "children": children,
        "top_tokens": logprobs.top_tokens,
        "log_probs": (logprobs.top, logprobs.chosen),
    }


def main() -> None:
    (target, draft), mesh = models(), make_mesh(8)
    spread, spread_draft = target.spread(mesh), draft.spread(mesh)
    assert spread_draft.bind_head(spread).kernel.addressable_shards[0].data.shape == (32, U // 8)
    texts, gathered, controls = {}, {}, []
    for name, case in CASES.items():
        texts[name] = run(target, draft, *case), run(spread, spread_draft, *case)
        program = round_of(spread, spread_draft, *case)
        found = collectives(program.as_text())
        gathered[name] = [c.size for c in found if c.kind != "all-reduce"]
        tables = program.output_shardings.controls
        controls = [str([*x.spec]) for x in (tables.bias, tables.counts, tables.in_prompt)]
    rng = np.random.default_rng(1)
    # Eighths: sums of them round, but equal logits tie.
    logits = np.round(rng.standard_normal((len(LAWS), 4, V)) * 16).astype(np.float32) / 8
    sampling = Sampling.stack(LAWS)
    one, eight = (
        jax.tree.map(np.asarray, functions(backend, logits, sampling))
        for backend in (ONE_DEVICE, Backend(mesh=mesh))
    )
    pairs = {name: [one[name], eight[name]] for name in one}
    for name in ("noise", "kept"):  # too large to print
        pairs[name] = [True, bool((one[name] == eight[name]).all())]
    pairs["log_probs"] = [np.concatenate([x.ravel() for x in y]) for y in pairs["log_probs"]]
    found = {"texts": texts, "gathered": gathered, "controls": controls, "functions": pairs}
    print(json.dumps(found, default=lambda x: x.tolist()))


if __name__ == "__main__":
    main()
