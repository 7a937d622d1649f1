"""The grouped product against float64, and the arrangement of choices in tiles.

Every test of values runs the reference and, in interpret mode, the GPU kernel.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.aot import lower_for_cuda
from pallas_kernels.grouped_matmul import (
    arrange,
    dequantize,
    grouped_matmul,
    pack_int4,
    rows_per_tile,
    unpack_int4,
)
from pallas_kernels.grouped_matmul.arrangement import (
    _FEW_CHOICES,
    _rank_by_comparing,
    _rank_by_sorting,
    num_tiles,
)
from pallas_kernels.grouped_matmul.config import MAX_ROWS, tile_config
from pallas_kernels.grouped_matmul.shapes import (
    INT4_GROUP,
    SCHEMES,
    SHAPES,
    TOKENS,
    abstract_inputs,
)
from pallas_kernels.grouped_matmul.triton import grouped_matmul_triton

pytestmark = pytest.mark.usefixtures("quick_compiler")

# groups, tiles, rows a tile, inputs, outputs
LAYERS = {
    "experts": (4, 5, 4, 128, 48),
    "one row": (3, 2, 1, 384, 80),  # outputs that fill no block; inputs that are split
    "linear": (1, 1, 37, 192, 64),  # any number of rows in one tile
    "odd": (2, 2, 5, 200, 72),  # inputs and outputs that fill no block
}
# dtype of the weights, inputs that share a scale (None: one scale a channel)
WEIGHTS = {
    "plain": (None, None),
    "fp8": (jnp.float8_e4m3fn, None),
    "int8": (jnp.int8, None),
    "int8 grouped": (jnp.int8, 64),
    "int4": (jnp.uint8, 64),
    "int4 by channel": (jnp.uint8, None),
}

jitted = jax.jit(grouped_matmul, static_argnames=("out_dtype", "implementation", "interpret"))
few = pytest.mark.parametrize("weights", ["plain", "fp8", "int8", "int4"])


@pytest.fixture(scope="module", params=["reference", "triton"])
def multiply(request):
    """Calls one implementation on a case."""

    def call(case, **options):
        on_cpu = jax.default_backend() == "cpu"
        options |= {"implementation": request.param, "interpret": on_cpu}
        return jitted(case["x"], case["w"], case["group"], scale=case["scale"], **options)

    return call


def make_case(layer, weights, seed: int, groups=None, dtype=jnp.float32) -> dict:
    """Random arguments, and as `exact` what the stored weights stand for, in float64."""
    E, X, rows, D, F = LAYERS.get(layer, layer)
    weights, inputs = WEIGHTS[weights]
    inputs = inputs or D
    rng = np.random.default_rng(seed)
    groups = rng.integers(-1, E, X) if groups is None else groups
    scale = rng.uniform(0.5, 2, (E, D // inputs, F)).astype(np.float32)
    case = {"x": jnp.asarray(rng.standard_normal((X * rows, D)), dtype)}
    case["group"] = np.asarray(groups, np.int32)
    if weights in (jnp.int8, jnp.uint8):
        top = 127 if weights == jnp.int8 else 7
        values = rng.integers(-top - 1, top + 1, (E, D, F)).astype(np.int8)
        stored = values if weights == jnp.int8 else pack_int4(jnp.asarray(values), inputs)
    else:
        values = rng.standard_normal((E, D, F))
        stored = values = jnp.asarray(values, weights or dtype)
    case |= {"w": jnp.asarray(stored), "scale": None if weights is None else jnp.asarray(scale)}
    exact = np.asarray(values, np.float64)
    if weights is not None:
        exact = exact * np.repeat(scale.astype(np.float64), inputs, axis=1)
    return case | {"exact": exact}


def expected(case) -> np.ndarray:
    x = np.asarray(case["x"], np.float64)
    tiles = x.reshape(len(case["group"]), -1, x.shape[1])
    out = [
        np.zeros((len(tile), case["exact"].shape[2])) if e < 0 else tile @ case["exact"][e]
        for tile, e in zip(tiles, case["group"], strict=True)
    ]
    return np.concatenate(out)


def assert_close(out, case, bound: float = 1e-5) -> None:
    right = expected(case)
    out = np.asarray(out, np.float64)
    assert out.shape == right.shape
    assert np.linalg.norm(out - right) <= bound * np.linalg.norm(right)


@pytest.mark.parametrize(
    "layer, weights",
    [
        *(("experts", weights) for weights in WEIGHTS),
        ("one row", "fp8"),
        ("one row", "int4"),
        ("linear", "plain"),
        ("linear", "int4 by channel"),
        ("odd", "int8"),
    ],
)
@settings(max_examples=10)
@given(data=st.data())
def test_equals_float64(multiply, layer, weights, data):
    E, X = LAYERS[layer][:2]
    groups = data.draw(st.lists(st.integers(-1, E - 1), min_size=X, max_size=X))  # -1: unused
    case = make_case(layer, weights, data.draw(st.integers(0, 2**32 - 1)), groups)
    assert_close(multiply(case), case)


@few
def test_bfloat16(multiply, weights):
    """Weights and sums lose nothing: the result is rounded once, at the end."""
    case = make_case("experts", weights, 1, [3, 0, -1, 2, 1], jnp.bfloat16)
    assert_close(multiply(case, out_dtype=jnp.float32), case, 1e-5)


def test_the_result_has_the_dtype_of_the_rows(multiply):
    case = make_case("experts", "int8", 1, [3, 0, -1, 2, 1], jnp.bfloat16)
    out = multiply(case)
    assert out.dtype == jnp.bfloat16
    assert_close(out, case, 1e-2)


@few
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_not_hit_changes_no_bit(multiply, weights, seed):
    """NaN in weights of groups that no tile names, in their scales and in rows of padding."""
    case = make_case("experts", weights, seed, [2, -1, 2, 0, -1])
    rows = LAYERS["experts"][2]
    idle = np.repeat(case["group"] < 0, rows)
    unread = idle.copy()
    unread[::rows] = True  # padding within used tiles
    bad = dict(case, x=jnp.where(unread[:, None], jnp.nan, case["x"]))
    hit = np.isin(np.arange(4), case["group"])[:, None, None]
    for name in ("w", "scale"):
        if case[name] is not None and jnp.issubdtype(case[name].dtype, jnp.floating):
            bad[name] = jnp.where(hit, case[name], jnp.asarray(jnp.nan, case[name].dtype))
    out, right = np.asarray(multiply(bad)), np.asarray(multiply(case))
    np.testing.assert_array_equal(out[~unread], right[~unread])
    assert (out[idle] == 0).all()


@pytest.mark.parametrize("layer, weights", [("experts", "int4"), ("linear", "int8")])
def test_gradient_of_the_rows(layer, weights):
    shape = LAYERS[layer]
    case = make_case(layer, weights, 3, [0, -1, 0, 0, -1][: shape[1]])
    toward = np.random.default_rng(4).standard_normal((shape[1] * shape[2], shape[4]))

    def loss(x):
        y = grouped_matmul(
            x, case["w"], case["group"], scale=case["scale"], implementation="reference"
        )
        return jnp.sum(y * jnp.asarray(toward, jnp.float32))

    used = np.repeat(case["group"] >= 0, shape[2])[:, None]
    right = np.where(used, toward @ case["exact"][0].T, 0)
    given = np.asarray(jax.jit(jax.grad(loss))(case["x"]), np.float64)
    assert np.linalg.norm(given - right) <= 1e-5 * np.linalg.norm(right)


def test_one_tile_of_weights_at_a_time():
    """The reference widens no more than one group, forward and backward."""
    E, X, rows, D, F = 64, 32, 2, 128, 128
    case = make_case((E, X, rows, D, F), "int8", 5)

    def loss(x, w, scale):
        y = grouped_matmul(x, w, case["group"], scale=scale, implementation="reference")
        return jnp.sum(y**2)

    compiled = jax.jit(jax.grad(loss)).lower(case["x"], case["w"], case["scale"]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 4 * D * F


# ---- int4 --------------------------------------------------------------------------------------


@given(
    group=st.sampled_from([2, 64]),
    shape=st.sampled_from([(64, 3), (2, 128, 1)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_int4_keeps_every_value(group, shape, seed):
    values = np.random.default_rng(seed).integers(-8, 8, shape).astype(np.int8)
    packed = jax.jit(pack_int4, static_argnums=1)(values, group)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (*shape[:-2], shape[-2] // 2, shape[-1])
    np.testing.assert_array_equal(jax.jit(unpack_int4, static_argnums=1)(packed, group), values)


def test_the_layout_of_int4():
    """Checkpoints keep it: the low half of byte j is input j, the high one j + G/2, plus 8."""
    values = jnp.asarray([[-8], [1], [7], [0], [2], [3], [4], [5]], jnp.int8)
    low_high = [(-8, 7), (1, 0), (2, 4), (3, 5)]
    stored = [[(low + 8) + 16 * (high + 8)] for low, high in low_high]
    np.testing.assert_array_equal(pack_int4(values, 4), np.uint8(stored))


@pytest.mark.parametrize("group", [0, 3, 24])
def test_groups_that_do_not_divide_raise(group):
    with pytest.raises(ValueError, match=f"{group} inputs"):
        pack_int4(jnp.zeros((64, 2), jnp.int8), group)


def test_dequantised_weights_are_what_the_product_uses():
    case = make_case("experts", "int4", 6)
    np.testing.assert_allclose(dequantize(case["w"], case["scale"]), case["exact"], rtol=1e-6)


# ---- arrangement -------------------------------------------------------------------------------

ROUTINGS = [(1, 1, 4), (5, 1, 4), (7, 3, 4), (3, 6, 1), (2, 40, 8), (6, 4, 16)]
"""(tokens, groups, rows a tile), with one to three choices a token."""

arranged = jax.jit(arrange, static_argnums=(1, 2))


@pytest.mark.parametrize("tokens, groups, rows", ROUTINGS)
@pytest.mark.parametrize("choices", [1, 3])
@given(data=st.data())
def test_each_choice_has_a_row_in_a_tile_of_its_group(tokens, groups, rows, choices, data):
    group = st.integers(-1, groups - 1) | st.just(0)  # -1: left out; often the same group
    flat = data.draw(st.lists(group, min_size=tokens * choices, max_size=tokens * choices))
    group_TK = np.array(flat, np.int32).reshape(tokens, choices)
    tiles = arranged(group_TK, groups, rows)
    choice, tile_group, place = map(np.asarray, tiles)
    R = len(choice)
    assert R == len(tile_group) * rows
    kept = np.flatnonzero(group_TK.ravel() >= 0)
    np.testing.assert_array_equal(np.sort(choice[choice >= 0]), kept)  # each exactly once
    np.testing.assert_array_equal(choice[place.ravel()[kept]], kept)  # and it knows where
    assert (place.ravel()[group_TK.ravel() < 0] == R).all()
    used = choice >= 0
    row_group = np.repeat(tile_group, rows)
    np.testing.assert_array_equal(row_group[used], group_TK.ravel()[choice[used]])

    needed = -(-np.bincount(group_TK.ravel()[kept], minlength=groups) // rows)
    in_use = tile_group >= 0
    np.testing.assert_array_equal(  # sorted, no tile more than needed, unused ones last
        tile_group, [*np.repeat(np.arange(groups), needed), *[-1] * int((~in_use).sum())]
    )
    np.testing.assert_array_equal(tiles.token_of_row, np.maximum(choice, 0) // choices)


@given(st.lists(st.integers(-1, 3), min_size=24, max_size=24))
def test_choices_rank_alike_when_sorted_and_when_compared(group):
    group_n = jnp.array(group, jnp.int32)
    expected = [group[:i].count(g) for i, g in enumerate(group)]
    np.testing.assert_array_equal(_rank_by_comparing(group_n), expected)
    np.testing.assert_array_equal(_rank_by_sorting(group_n), expected)


def test_a_long_prompt_is_arranged():
    group_T1 = np.random.default_rng(0).integers(-1, 6, (_FEW_CHOICES + 500, 1)).astype(np.int32)
    tiles = arranged(group_T1, 6, 16)
    kept = np.flatnonzero(group_T1.ravel() >= 0)
    np.testing.assert_array_equal(tiles.choice_of_row[tiles.row_of_choice.ravel()[kept]], kept)
    row_group = np.repeat(tiles.tile_group, 16)
    np.testing.assert_array_equal(
        row_group[tiles.row_of_choice.ravel()[kept]], group_T1.ravel()[kept]
    )


@given(
    choices=st.integers(1, 300), groups=st.integers(1, 140), rows=st.sampled_from([1, 3, 16, 64])
)
def test_the_number_of_tiles_is_the_least_that_always_suffices(choices, groups, rows):
    hit = min(choices, groups)
    worst = [1] * (hit - 1) + [choices - hit + 1]
    assert num_tiles(choices, groups, rows) == sum(-(-n // rows) for n in worst)
    parts = np.random.default_rng(choices).multinomial(choices, np.full(groups, 1 / groups))
    assert sum(-(-n // rows) for n in parts) <= num_tiles(choices, groups, rows)


def test_a_layer_of_experts_through_tiles(multiply):
    """As a MoE layer uses it: gather, multiply, take back; idle tokens get zeros."""
    rng = np.random.default_rng(7)
    T, K, E, D, F = 9, 2, 4, 128, 48
    x_TD = rng.standard_normal((T, D)).astype(np.float32)
    w_EDF = rng.standard_normal((E, D, F)).astype(np.float32)
    group_TK = rng.integers(0, E, (T, K)).astype(np.int32)
    group_TK[4] = -1
    tiles = arranged(group_TK, E, 4)
    case = {"x": x_TD[tiles.token_of_row], "w": w_EDF, "group": tiles.tile_group, "scale": None}
    y_TKF = multiply(case).at[tiles.row_of_choice].get(mode="fill", fill_value=0)
    right = np.einsum("td,tkdf->tkf", x_TD, w_EDF[group_TK]) * (group_TK >= 0)[..., None]
    np.testing.assert_allclose(y_TKF, right, rtol=0, atol=1e-4)


# ---- sizes -------------------------------------------------------------------------------------


@given(choices=st.integers(1, 5000), groups=st.integers(1, 128))
def test_rows_of_a_tile(choices, groups):
    rows = rows_per_tile(choices, groups)
    assert rows == min(choices, 16) or (rows in (16, 32, 64, 128) and rows * groups <= choices)


@pytest.mark.parametrize("name", SHAPES)
def test_tiles_of_real_shapes(name):
    """Programs for every multiprocessor, if partial sums stay small; steps of one scale."""
    for tokens, scheme in itertools.product(TOKENS, SCHEMES):
        like = abstract_inputs(SHAPES[name], tokens=tokens, scheme=scheme)
        X, (_, stored, F) = like["tile_group_X"].shape[0], like["w"].shape
        rows, dtype = like["x_RD"].shape[0] // X, like["w"].dtype
        group = INT4_GROUP // 2 if scheme == "int4" else None
        config = tile_config(
            rows=rows, tiles=X, stored=stored, outputs=F, group=group, exact=False, dtype=dtype
        )
        blocks = X * -(-rows // config.block_q) * -(-F // config.block_f)
        assert config.block_q <= MAX_ROWS and (group is None or group % config.block_k == 0)
        assert config.splits <= -(-stored // config.block_k)
        assert tokens > 1 or blocks * config.splits >= 224, config
        partial = config.splits * min(rows, config.block_q) * 4
        assert config.splits == 1 or partial <= stored * dtype.itemsize // 2


# ---- lowering ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_lowers_for_a_gpu(tokens, scheme):
    kernel = functools.partial(grouped_matmul, implementation="triton")
    like = abstract_inputs(SHAPES["llama-4-maverick down/8"], tokens=tokens, scheme=scheme)
    assert "grouped_matmul" in lower_for_cuda(kernel, **like)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_odd_shapes_lower_for_a_gpu(weights, dtype):
    case = make_case((3, 2, 1, 384, 80), weights, 11, dtype=dtype)
    kernel = functools.partial(
        grouped_matmul, tile_group_X=case["group"], scale=case["scale"], implementation="triton"
    )
    assert "grouped_matmul" in lower_for_cuda(kernel, x_RD=case["x"], w=case["w"])


# ---- what is refused ---------------------------------------------------------------------------


def call(weights="int8", **changes):
    case = make_case("experts", weights, 8)
    case |= {name: change(case[name]) for name, change in changes.items()}
    return grouped_matmul(case["x"], case["w"], case["group"], scale=case["scale"])


BROKEN = {
    "inputs that differ": dict(x=lambda x: x[:, :64]),
    "tiles of no one size": dict(x=lambda x: x[:-1]),
    "no tile": dict(group=lambda group: group[:0]),
    "weights of int32": dict(w=lambda w: w.astype(jnp.int32)),
    "rows of float16": dict(x=lambda x: x.astype(jnp.float16)),
    "packed weights of half the inputs": dict(w=lambda w: w.astype(jnp.uint8)),
    "scales of other groups": dict(scale=lambda scale: scale[:1]),
    "scales of other outputs": dict(scale=lambda scale: scale[..., :1]),
    "scales that do not divide": dict(scale=lambda scale: jnp.repeat(scale, 3, axis=1)),
    "scales in bfloat16": dict(scale=lambda scale: scale.astype(jnp.bfloat16)),
    "scales of plain weights": dict(weights="plain", scale=lambda _: jnp.ones((4, 1, 48))),
    "int4 without scales": dict(weights="int4", scale=lambda _: None),
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN)
def test_what_does_not_fit_raises(changes):
    with pytest.raises(ValueError, match="expected|do not fit|do not form|need|only"):
        call(**changes)


def test_unknown_implementations_raise():
    case = make_case("linear", "plain", 9)
    product = functools.partial(grouped_matmul, case["x"], case["w"], case["group"])
    with pytest.raises(ValueError, match="'nothing'.*reference"):
        product(implementation="nothing")
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="interpret"):
            product(implementation="triton")


def test_a_named_kernel_that_cannot_run_raises():
    like = abstract_inputs(SHAPES["llama-3.1-8b qkv"], tokens=1, scheme="int8")
    product = functools.partial(grouped_matmul, implementation="triton", interpret=True)
    odd = like | {"scale": jax.ShapeDtypeStruct((1, 512, 6144), jnp.float32)}
    with pytest.raises(ValueError, match="groups of 8"):
        jax.eval_shape(product, **odd)
    large = like | {
        "w": jax.ShapeDtypeStruct((96, 4096, 6144), jnp.int8),
        "scale": jax.ShapeDtypeStruct((96, 1, 6144), jnp.float32),
    }
    with pytest.raises(ValueError, match="between 2 and 4 GiB"):
        jax.eval_shape(product, **large)


def test_splits_add_up():
    """Parts that do not share the steps evenly leave nothing behind, and nothing twice."""
    case = make_case((2, 2, 3, 320, 64), "int8 grouped", 10, [1, 0])
    config = tile_config(
        rows=3, tiles=2, stored=320, outputs=64, group=64, exact=True, dtype=jnp.int8
    )
    config = dataclasses.replace(config, splits=7)  # of ten steps: two each, and two have none
    product = functools.partial(
        grouped_matmul_triton, out_dtype=jnp.dtype(jnp.float32), interpret=True, config=config
    )
    assert_close(jax.jit(product)(case["x"], case["w"], case["group"], case["scale"]), case)
