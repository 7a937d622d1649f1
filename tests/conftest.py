"""Settings of the whole suite (strict JAX, one CPU device, kept programs) and its tiny models."""

import dataclasses
import math
import os
from pathlib import Path

# Read by JAX when it is imported, and inherited by the programs that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jax-eagle" / "xla-tests")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from flax import linen as nn  # noqa: E402
from jax._src import compiler  # noqa: E402  # options for one module: nothing public sets them

from jax_eagle import packing, prefill  # noqa: E402
from jax_eagle.attention import View  # noqa: E402
from jax_eagle.cache import commit  # noqa: E402
from jax_eagle.config import DraftConfig, LlamaConfig  # noqa: E402
from jax_eagle.draft import Draft  # noqa: E402
from jax_eagle.eagle import init_draft_params  # noqa: E402
from jax_eagle.llama import Llama, Target, init_params  # noqa: E402
from pallas_kernels.compat import order_after  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# No deadline: the first example of a test compiles.
hypothesis.settings.register_profile(
    "jax-eagle", deadline=None, max_examples=25, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("jax-eagle")

_MAX_MAPPINGS = 30_000
"""Of memory, in a process; the kernel allows 65,530, and XLA dies without a word beyond them."""


_LONGEST = (
    "lossless", "trainer", "distributed", "server_clients", "quantize", "controls", "hostile",
    "step", "inplace", "mesh",
)  # fmt: skip
"""Files that go first: one of them begun last would leave the other test processes idle."""


def pytest_configure(config):
    """Files are handed out as they are ordered below, not those with most tests first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The longest files first, all else as it was."""
    rank = {f"test_{name}": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drops compiled programs, each of them a few mappings, when there are too many."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MAX_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def blocks_serve():
    """Weights in blocks are used on every machine, whatever it would measure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "few_rows_pay", lambda: True)
        yield


QUICK_OPTIONS = (
    {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
)  # fmt: skip
"""Of programs that run a few times only: XLA's older emitters compile in half of the time. JAX 0.11
has them no more."""
QUICK_XLA_FLAGS = " ".join(f"--{name}={value}".lower() for name, value in QUICK_OPTIONS.items())
"""The same for a process of its own."""


@pytest.fixture(scope="module")
def quick_compiler():
    """For modules whose programs run a few times only: to optimise them would take longer.

    The same holds for those of the processes that a module starts. Programs that this process has
    compiled for modules before stay as they are: `jax.clear_caches()` where bits are compared.
    """
    assert jax.devices()  # XLA has read its flags: those below are for other processes alone
    flags = os.environ.get("XLA_FLAGS", "")
    options = compiler.get_compile_options

    def quick_options(*args, env_options_overrides=None, **kwargs):
        overrides = QUICK_OPTIONS | (env_options_overrides or {})
        return options(*args, env_options_overrides=overrides, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", quick_options)
        patch.setenv("XLA_FLAGS", f"{QUICK_XLA_FLAGS} {flags}".strip())  # " " would be a file
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


# ---- tiny models -------------------------------------------------------------------------------
#
# A vocabulary of six tokens: random drafts are right often enough for every accept and reject
# pattern, and three tokens have 216 outcomes, few enough to enumerate.

TOY = LlamaConfig(
    vocab_size=6, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, max_position=20,
)  # fmt: skip


def random_params(init, config, seed: int):
    """Parameters of `init(config, key)`, drawn by numpy: nothing is compiled."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape_of):
        shape, name = shape_of.shape, [key.key for key in path]
        noise = rng.standard_normal(shape)
        if name[-1] == "scale":  # norm weights: around 1, so that leaving one out shows
            value = 1 + 0.25 * noise
        elif name[-1] == "embedding":
            value = noise
        else:
            fan_in = math.prod(shape[:2]) if name[-2] == "o" else shape[0]
            value = noise * 1.5 / fan_in**0.5
        return jnp.asarray(value, shape_of.dtype)

    shapes = jax.eval_shape(lambda: nn.unbox(init(config, jax.random.key(0))))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.fixture(scope="session")
def make_target():
    """make_target(seed, **config) -> a random Target: six tokens, two layers, grouped queries."""

    def make(seed: int = 1, **changes) -> Target:
        config = dataclasses.replace(TOY, **changes)
        return Target(random_params(init_params, config, seed), config)

    return make


@pytest.fixture(scope="session")
def make_draft():
    """make_draft(seed, vocab, layers, **config) -> a random Draft; `vocab`: the tokens it knows."""

    def make(
        seed: int = 7, vocab: tuple[int, ...] | None = None, layers: int = 1, **changes
    ) -> Draft:
        config = DraftConfig.for_target(
            dataclasses.replace(TOY, **changes),
            num_layers=layers,
            draft_vocab_size=vocab and len(vocab),
        )
        ids = None if vocab is None else jnp.asarray(vocab, jnp.int32)
        return Draft(random_params(init_draft_params, config, seed), ids, config)

    return make


class OracleDraft(Draft):
    """The target as its own draft, through the same expansion, pages and trees.

    Its pairs need no feature, so slot 0 is a pair like any other. `params` is a factor on the
    output: 1 proposes what the target would choose, -1 what it likes least.
    """

    def __call__(self, target, tokens_BM, features_BMF, view):
        model = Llama(target.config)
        view = view.replace(first=None)
        x_BMD, _, new_kv = model.apply({"params": target.params}, tokens_BM, view)
        return self.params * x_BMD, new_kv

    def extend(self, target, cache, sync):
        row_1A = jnp.arange(sync.tokens.shape[1], dtype=jnp.int32)[None]
        row_BA = jnp.broadcast_to(row_1A, sync.tokens.shape)
        view = View(position=cache.length[:, None] + row_BA, cache=cache)
        x_BAD, new_kv = self(target, sync.tokens, sync.features, view)
        return commit(cache, new_kv, row_BA, order_after(x_BAD, sync.count)), x_BAD


@pytest.fixture(scope="session")
def make_oracle():
    """make_oracle(factor) -> the target as its own draft (1), or one that is always wrong (-1)."""
    config = DraftConfig(layer=TOY, feature_width=TOY.hidden_size)
    return lambda factor=1.0: OracleDraft(jnp.float32(factor), None, config)


@pytest.fixture
def small_pages(monkeypatch):
    """Pages of 8 tokens, so that short sequences cross their borders."""
    monkeypatch.setattr(prefill, "PAGE_SIZE", 8)


@pytest.fixture(scope="session")
def ragged_prompts():
    """ragged_prompts(count, seed) -> prompts of 1 to 8 tokens; the first has 8."""

    def make(count: int, seed: int = 0) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        lengths = [8, *rng.integers(1, 9, count - 1)]
        return [rng.integers(0, TOY.vocab_size, n).tolist() for n in lengths]

    return make


# ---- reference functions -----------------------------------------------------------------------


def _processed_law(logits_V, *, temperature, top_k=0, top_p=1.0, min_p=0.0):
    logits_V = np.asarray(logits_V, np.float64)
    if temperature == 0:
        return np.eye(len(logits_V))[np.argmax(logits_V)]
    scores_V = logits_V / temperature

    def probs():
        weights_V = np.exp(scores_V - scores_V.max())
        return weights_V / weights_V.sum()

    if top_k > 0:
        scores_V[scores_V < np.sort(scores_V)[::-1][min(top_k, len(scores_V)) - 1]] = -np.inf
    if top_p < 1:
        descending_V = np.sort(probs())[::-1]
        last = np.searchsorted(np.cumsum(descending_V), top_p)  # the first that reaches top_p
        scores_V[probs() < descending_V[min(last, len(scores_V) - 1)]] = -np.inf
    scores_V[probs() < min_p * probs().max()] = -np.inf
    return probs()


@pytest.fixture(scope="session")
def processed_law():
    """processed_law(logits, temperature=, top_k=, top_p=, min_p=): the law, slowly, in float64.

    In the order of Hugging Face's logits warpers; tokens that tie with the last one kept stay.
    """
    return _processed_law
