"""Tree attention against a dense softmax over prefix and tree, in float64.

Every test runs the reference and, in interpret mode, the GPU kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.tree_attention import tree_attention
from pallas_kernels.tree_attention.shapes import SHAPES as MODEL_SHAPES
from pallas_kernels.tree_attention.shapes import abstract_inputs

pytestmark = pytest.mark.usefixtures("quick_compiler")

# B, M, X, N, K, H, C, R
SHAPES = {
    "gqa": (2, 5, 5, 4, 2, 16, 4, 3),
    "rectangular": (2, 3, 7, 6, 2, 16, 4, 2),  # a group of three: rows of padding in the tile
    "root": (3, 1, 1, 2, 2, 16, 8, 2),
    "blocks": (2, 3, 3, 4, 2, 16, 16, 9),  # blocks of several pages; a prefix that is split
    "tiles": (2, 9, 40, 8, 2, 16, 64, 3),  # several tiles of rows and words of mask; split too
}
LAYERS, LAYER = 2, 1

jitted = jax.jit(tree_attention, static_argnames=("scale", "implementation", "interpret"))


def make_case(shape, seed: int, lengths=None) -> dict:
    """Random arguments by name; page ids carry the offset of the second layer."""
    B, M, X, N, K, H, C, R = shape
    rng = np.random.default_rng(seed)
    pages = 1 + B * R
    table = 1 + rng.permutation(B * R).reshape(B, R)
    lengths = rng.integers(0, R * C + 1, B) if lengths is None else np.array(lengths)
    for b, length in enumerate(lengths):
        table[b, -(-length // C) :] = 0  # not reserved

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    pool = (LAYERS * pages, K, C, H)
    mask = rng.random((B, M, X)) < 0.5
    mask[:, np.arange(M), np.arange(M) + X - M] = True
    return {
        "q": 2 * normal(B, M, N, H), "k_tree": normal(B, X, K, H), "v_tree": normal(B, X, K, H),
        "k_pages": normal(*pool), "v_pages": normal(*pool),
        "table": (table + LAYER * pages).astype(np.int32), "length": lengths.astype(np.int32),
        "mask": mask,
    }  # fmt: skip


def dense(case, first=None, scale=None, k_scale=1.0, v_scale=1.0) -> np.ndarray:
    """Softmax over all keys of prefix and tree, query by query."""
    q = case["q"].astype(np.float64)
    B, M, N, H = q.shape
    K = case["k_tree"].shape[2]
    out = np.zeros_like(q)
    for b in range(B):
        n = case["length"][b]

        def rows(pages, tree, factor, b=b, n=n):
            prefix = np.moveaxis(pages[case["table"][b]], 1, 2).reshape(-1, *tree.shape[2:])[:n]
            factor = np.reshape(factor, (-1, 1))
            return np.concatenate([prefix.astype(np.float64) * factor, tree[b].astype(np.float64)])

        keys = rows(case["k_pages"], case["k_tree"], k_scale)
        values = rows(case["v_pages"], case["v_tree"], v_scale)
        for m in range(M):
            seen = np.arange(n) >= (0 if first is None else first[b, m])
            seen = np.concatenate([seen, case["mask"][b, m]])
            for h in range(N):
                scores = keys[seen, h * K // N] @ q[b, m, h] * (scale or H**-0.5)
                if not len(scores):
                    continue  # a node that sees no key: zeros
                weights = np.exp(scores - scores.max())
                out[b, m, h] = weights / weights.sum() @ values[seen, h * K // N]
    return out


@pytest.fixture(scope="module", params=["reference", "triton"])
def attend(request):
    """Calls one implementation on a case."""

    def call(case, **options):
        on_cpu = jax.default_backend() == "cpu"
        return jitted(*case.values(), implementation=request.param, interpret=on_cpu, **options)

    return call


def relative_norm(out, expected) -> float:
    difference = np.asarray(out, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def assert_close(out, expected):
    np.testing.assert_allclose(np.asarray(out), expected, rtol=0, atol=4e-6)
    assert relative_norm(out, expected) < 1e-5


shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@shapes
@given(data=st.data())
def test_equals_dense_softmax(attend, shape, data):
    B, C, R = shape[0], shape[-2], shape[-1]
    edges = st.sampled_from([0, 1, C - 1, C, C + 1, R * C])  # empty, one page, across pages, full
    lengths = data.draw(st.lists(edges | st.integers(0, R * C), min_size=B, max_size=B))
    case = make_case(shape, data.draw(st.integers(0, 2**32 - 1)), lengths)
    assert_close(attend(case), dense(case))


@shapes
@given(data=st.data())
def test_first_hides_the_beginning_of_the_prefix(attend, shape, data):
    B, M, C, R = shape[0], shape[1], shape[-2], shape[-1]
    case = make_case(shape, data.draw(st.integers(0, 2**32 - 1)))
    rows = st.lists(st.integers(0, R * C + 2), min_size=B * M, max_size=B * M)
    first = np.array(data.draw(rows), np.int32).reshape(B, M)
    first[0, 0] = case["length"][0]  # at the length: sees none of the prefix
    assert_close(attend(case, first_BM=first), dense(case, first))


def test_first_behind_the_length_leaves_the_tree_alone(attend):
    case = make_case(SHAPES["gqa"], 3, [9, 12])
    nothing = np.full(case["q"].shape[:2], 12, np.int32)
    empty = case | {"length": np.zeros(2, np.int32)}
    assert_close(attend(case, first_BM=nothing), np.asarray(attend(empty)))


CHUNK = (1, 66, 70, 8, 2, 16, 64, 1)
"""More rows than a tile ever takes: a chunk of a prompt."""


@pytest.mark.parametrize("shape", [SHAPES["rectangular"], SHAPES["tiles"], CHUNK])
def test_no_mask_is_causal_with_the_queries_last(attend, shape):
    case = make_case(shape, 4)
    M, X = case["mask"].shape[1:]
    causal = np.tri(M, X, X - M, dtype=bool)
    case["mask"] = np.broadcast_to(causal, case["mask"].shape)
    assert_close(attend(case | {"mask": None}), dense(case))


LONG = (2, 150, 160, 4, 2, 8, 16, 1)
"""More nodes than the reference takes at once, and not a multiple of that."""


def test_long_texts_go_block_by_block():
    case = make_case(LONG, 8)
    assert_close(jitted(*case.values(), implementation="reference"), dense(case))


def test_gradients_of_a_long_text():
    """The reference is what training differentiates."""
    case = make_case((*LONG[:-1], 0), 9, [0, 0])
    q, k, v, *rest = map(jnp.asarray, case.values())
    mask = case["mask"][:, None]
    toward = np.random.default_rng(9).standard_normal(q.shape).astype(np.float32)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        scores = jnp.einsum("bmnh,bxnh->bnmx", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        return jnp.sum(toward * jnp.einsum("bnmx,bxnh->bmnh", weights, v))

    def blocks(q, k, v):
        return jnp.sum(toward * tree_attention(q, k, v, *rest, implementation="reference"))

    expected, given = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (plain, blocks))
    for one, other in zip(given, expected, strict=True):
        assert float(jnp.max(jnp.abs(other))) > 0.1
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def test_scale_replaces_the_default(attend):
    case = make_case(SHAPES["gqa"], 5)
    assert_close(attend(case, scale=0.1), dense(case, scale=0.1))


def test_sequences_without_pages(attend):
    shape = (*SHAPES["gqa"][:-1], 0)
    case = make_case(shape, 6, [0, 0])
    assert_close(attend(case), dense(case))


@shapes
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@given(seed=st.integers(0, 2**32 - 1))
def test_unread_slots_change_no_bit(attend, shape, poison, seed):
    case = make_case(shape, seed)
    C = shape[-2]
    unread = np.ones((case["k_pages"].shape[0], C), bool)  # trash, other layer, unreserved, behind
    for row, length in zip(case["table"], case["length"], strict=True):
        for position in range(length):
            unread[row[position // C], position % C] = False
    bad = {
        name: np.where(unread[:, None, :, None], np.float32(poison), case[name])
        for name in ("k_pages", "v_pages")
    }
    np.testing.assert_array_equal(np.asarray(attend(case | bad)), np.asarray(attend(case)))


def low_precision(case, **dtypes) -> dict:
    """The case in bfloat16, except where `dtypes` says otherwise."""
    return {
        name: jnp.asarray(x, dtypes.get(name, jnp.bfloat16)) if x.dtype == np.float32 else x
        for name, x in case.items()
    }


def exact(case) -> dict:
    """What the rounded arguments stand for, in float64."""
    return {k: np.asarray(v, np.float64) if k[0] in "qkv" else v for k, v in case.items()}


@pytest.mark.parametrize("name", ["root", "tiles"])
def test_bfloat16(attend, name):
    case = low_precision(make_case(SHAPES[name], 7))
    out = attend(case)
    assert out.dtype == jnp.bfloat16
    assert relative_norm(out, dense(exact(case))) < 1e-2


@pytest.mark.parametrize("per_head", [False, True])
def test_pages_of_eight_bits_are_scaled(attend, per_head):
    float8 = dict.fromkeys(("k_pages", "v_pages"), jnp.float8_e4m3fn)
    case = low_precision(make_case(SHAPES["tiles"], 8, [150, 192]), **float8)
    k_scale, v_scale = np.float32([0.5, 2.0]), np.float32([3.0, 0.25])
    if not per_head:
        k_scale, v_scale = k_scale[1], v_scale[1]
    out = attend(case, k_scale=k_scale, v_scale=v_scale)
    expected = dense(exact(case), k_scale=k_scale, v_scale=v_scale)
    assert relative_norm(out, expected) < 1e-2


@shapes
@given(seed=st.integers(0, 2**32 - 1))
def test_unused_nodes_change_no_bit(attend, shape, seed):
    """Nodes that nobody sees may hold NaN; they themselves see the prefix alone."""
    case = make_case(shape, seed)
    B, M, X = case["mask"].shape
    unused = np.random.default_rng(seed).random((B, X)) < 0.3
    case["mask"] = case["mask"] & ~unused[:, None, :] & ~unused[:, X - M :, None]
    assert_close(attend(case), dense(case))
    bad = {
        name: np.where(unused[:, :, None, None], np.float32(np.nan), case[name])
        for name in ("k_tree", "v_tree")
    }
    np.testing.assert_array_equal(np.asarray(attend(case | bad)), np.asarray(attend(case)))


def broken(**changes):
    """A case with some arguments replaced by functions of themselves."""
    case = make_case(SHAPES["gqa"], 0)
    return case | {name: change(case[name]) for name, change in changes.items()}


BROKEN = {
    "tree keys of another width": dict(k_tree=lambda x: x[..., :4]),
    "tree values of another batch": dict(v_tree=lambda x: x[:1]),
    "tree keys without values": dict(v_tree=lambda x: x[:, :3]),
    "heads that do not divide": dict(q=lambda x: x[:, :, :3]),
    "fewer keys than queries": dict(k_tree=lambda x: x[:, :3], v_tree=lambda x: x[:, :3]),
    "pools that differ": dict(k_pages=lambda x: x[:1]),
    "pools of another width": dict(k_pages=lambda x: x[..., :4], v_pages=lambda x: x[..., :4]),
    "table of another batch": dict(table=lambda x: x[:1]),
    "lengths of another batch": dict(length=lambda x: x[:1]),
    "mask of another tree": dict(mask=lambda x: x[:, :, :4]),
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN)
def test_shapes_that_do_not_fit_raise(changes):
    with pytest.raises(ValueError, match=r"\d"):
        tree_attention(*broken(**changes).values())


def test_first_of_another_shape_raises():
    case = make_case(SHAPES["gqa"], 0)
    with pytest.raises(ValueError, match="first"):
        tree_attention(*case.values(), first_BM=np.zeros((2, 1), np.int32))


def test_unknown_implementations_and_scales_raise():
    call = functools.partial(tree_attention, *make_case(SHAPES["gqa"], 0).values())
    with pytest.raises(ValueError, match="'nothing'.*reference"):
        call(implementation="nothing")
    with pytest.raises(ValueError, match="k_scale"):
        call(k_scale=jnp.ones(1))


def test_a_named_kernel_that_cannot_run_raises():
    case = make_case((1, 1, 1, 2, 2, 24, 4, 1), 0)
    with pytest.raises(ValueError, match="head dimension of 24"):
        tree_attention(*case.values(), implementation="triton", interpret=True)
    case = make_case(SHAPES["root"], 0)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="interpret"):
            tree_attention(*case.values(), implementation="triton")


def test_pools_beyond_the_reach_of_an_offset_are_refused():
    shape, float8 = MODEL_SHAPES["smollm2-135m"], jnp.float8_e4m3fn
    arguments = abstract_inputs(shape, batch=1, nodes=1, context=64, kv_dtype=float8)
    pool = jax.ShapeDtypeStruct((3 * 2**16, 3, 64, 64), float8)
    arguments |= {"k_pages_PKCH": pool, "v_pages_PKCH": pool}
    attend = functools.partial(tree_attention, implementation="triton", interpret=True)
    with pytest.raises(ValueError, match="between 2 and 4 GiB"):
        jax.eval_shape(attend, **arguments)
