"""The kernels against float64, on whatever runs them here."""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from pallas_kernels.grouped_matmul import dequantize, grouped_matmul
from pallas_kernels.grouped_matmul.shapes import SCHEMES, MatmulShape
from pallas_kernels.grouped_matmul.shapes import abstract_inputs as abstract_weights
from pallas_kernels.tree_attention.inputs import Inputs
from pallas_kernels.tree_attention.shapes import SHAPES, abstract_inputs
from pallas_kernels.tree_attention.triton import tree_attention_triton

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float8_e4m3fn": 1e-2}
"""Relative norm of the difference, by the dtype of the pages."""


_PRODUCTS = (MatmulShape(5, 512, 192), MatmulShape(1, 1024, 320), MatmulShape(1, 4096, 6144))


class Case(NamedTuple):
    """One form of the kernels."""

    shape: str
    kv_dtype: str
    nodes: int
    form: str
    """tree | window | causal"""
    splits: int | None
    """Parts of the prefix; None: as many as the kernels would choose."""


def cases() -> list[Case]:
    """All shapes and dtypes of pages, each in the forms that take different paths."""
    forms = [(16, "tree", 1), (16, "tree", 4), (64, "tree", None), (1, "window", None),
             (16, "window", 1), (80, "causal", None)]  # fmt: skip
    shapes = {like: name for name, like in SHAPES.items()}  # models of the same heads once
    return [Case(s, dtype, *form) for s in shapes.values() for dtype in BOUNDS for form in forms]


def check_kernels(console: Console, *, interpret: bool, few: bool) -> list[str]:
    """Runs all cases and prints the worst of each dtype; returns those beyond their bound."""
    chosen = cases()[-1:] if few else cases()
    with ThreadPoolExecutor(8) as pool:  # compilation is most of the time
        errors = list(pool.map(functools.partial(relative_error, interpret=interpret), chosen))
    wrong = []
    worst: dict[str, float] = {}
    for case, error in zip(chosen, errors, strict=True):
        worst[case.kv_dtype] = max(worst.get(case.kv_dtype, 0.0), error)
        if not error < BOUNDS[case.kv_dtype]:
            wrong.append(f"{case}: relative error {error:.1e}")
            console.print(f"WRONG {wrong[-1]}", highlight=False)
    figures = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    console.print(
        f"{len(chosen)} forms of the kernels against float64, worst relative norm: {figures}",
        highlight=False,
    )
    return wrong


def check_products(console: Console, *, interpret: bool, few: bool) -> list[str]:
    """The same of products with weights of all schemes: one map, and experts."""
    shapes = _PRODUCTS[:1] if few else _PRODUCTS
    tokens = (4,) if few else (1, 16, 80)
    wrong, worst = [], {}
    for scheme, shape, count in itertools.product(SCHEMES, shapes, tokens):
        error = product_error(shape, scheme, count, interpret=interpret)
        worst[scheme] = max(worst.get(scheme, 0.0), error)
        if not error < BOUNDS["bfloat16"]:
            wrong.append(f"product ({scheme}), {shape}, {count} rows: relative error {error:.1e}")
            console.print(f"WRONG {wrong[-1]}", highlight=False)
    figures = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    console.print(f"products against float64, worst relative norm: {figures}", highlight=False)
    return wrong


def product_error(shape: MatmulShape, scheme: str, tokens: int, *, interpret: bool) -> float:
    """Of random weights, with an unused tile where there are experts."""
    like = abstract_weights(shape, tokens=tokens, scheme=scheme)
    rng = np.random.default_rng(tokens)
    w_like, x_like = like["w"], like["x_RD"]
    if w_like.dtype == jnp.uint8:
        w = jnp.asarray(rng.integers(0, 256, w_like.shape), jnp.uint8)
    else:  # every exponent of fp8
        w = jnp.asarray(100 * rng.standard_normal(w_like.shape) ** 3, jnp.float32)
        w = jnp.clip(w, -120, 120).astype(w_like.dtype)
    scale = like["scale"]
    if scale is not None:
        scale = jnp.asarray(rng.uniform(0.01, 0.02, scale.shape), jnp.float32)
    x_RD = jnp.asarray(rng.standard_normal(x_like.shape), x_like.dtype)
    (X,) = like["tile_group_X"].shape
    group_X = np.sort(rng.integers(0, shape.groups, X)).astype(np.int32)
    if X > 1:
        group_X[-1] = -1
    run = functools.partial(grouped_matmul, implementation="triton", interpret=interpret)
    out_RF = np.asarray(jax.jit(run)(x_RD, w, group_X, scale=scale), np.float64)
    weights = np.asarray(dequantize(w, scale), np.float64)
    tiles = np.asarray(x_RD, np.float64).reshape(X, -1, shape.inputs)
    expected = np.stack(
        [rows @ weights[e] * (e >= 0) for rows, e in zip(tiles, group_X, strict=True)]
    )
    expected = expected.reshape(out_RF.shape)
    return float(np.linalg.norm(out_RF - expected) / np.linalg.norm(expected))


def relative_error(case: Case, *, interpret: bool) -> float:
    """Of random data whose unread slots hold NaN."""
    context, batch, nodes, form = 640, 3, case.nodes, case.form
    shape, kv_dtype = SHAPES[case.shape], case.kv_dtype
    dtype = jnp.float32 if kv_dtype == "float32" else jnp.bfloat16
    like = abstract_inputs(
        shape, batch=batch, nodes=nodes, context=context, dtype=dtype, kv_dtype=kv_dtype,
        causal=form == "causal",
    )  # fmt: skip
    rng = np.random.default_rng(nodes + batch)
    data = {
        name: jnp.asarray(rng.standard_normal(x.shape), x.dtype)
        for name, x in like.items()
        if name[0] in "qkv" and "scale" not in name
    }
    R, C = like["page_table_BR"].shape[1], like["k_pages_PKCH"].shape[2]
    table = 1 + rng.permutation(batch * R).reshape(batch, R).astype(np.int32)
    length = rng.integers(0, context + 1, batch).astype(np.int32)
    length[:2] = 0, context
    seen = np.zeros((like["k_pages_PKCH"].shape[0], C), bool)
    for row, n in zip(table, length, strict=True):
        position = np.arange(n)
        seen[row[position // C], position % C] = True
    for name in ("k_pages_PKCH", "v_pages_PKCH"):
        data[name] = jnp.where(seen[:, None, :, None], data[name], jnp.asarray(jnp.nan, kv_dtype))
    data |= {"page_table_BR": jnp.asarray(table), "length_B": jnp.asarray(length)}
    mask = rng.random((batch, nodes, nodes)) < 0.5
    mask |= np.eye(nodes, dtype=bool)
    data["tree_mask_BMX"] = None if form == "causal" else jnp.asarray(mask)
    if "k_scale" in like:
        K = shape.num_kv_heads
        data |= {"k_scale": jnp.linspace(0.5, 2, K), "v_scale": jnp.linspace(2, 0.5, K)}
    if form == "window":
        data["first_BM"] = jnp.asarray(rng.integers(0, context, (batch, nodes)), jnp.int32)
    attend = functools.partial(
        tree_attention_triton, scale=shape.head_dim**-0.5, splits=case.splits, interpret=interpret
    )
    out = np.asarray(jax.jit(attend)(Inputs(**data)), np.float64)
    expected = _exact(data, np.tri(nodes, dtype=bool) if form == "causal" else mask)
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def _exact(case: dict, mask: np.ndarray) -> np.ndarray:
    """Softmax over prefix and tree in float64, sequence by sequence."""
    q = np.asarray(case["q_BMNH"], np.float64)
    B, M, N, H = q.shape
    K = case["k_tree_BXKH"].shape[2]
    table, length = np.asarray(case["page_table_BR"]), np.asarray(case["length_B"])
    out = np.empty_like(q)
    for b in range(B):
        n = length[b]
        keys, values = (_rows(case, x, table[b], n, b) for x in "kv")  # [K, n + M, H]
        first = np.asarray(case["first_BM"][b])[:, None] if "first_BM" in case else 0
        prefix = np.broadcast_to(np.arange(n)[None] >= first, (M, n))
        own = mask if mask.ndim == 2 else mask[b]
        visible = np.concatenate([prefix, own], axis=1)
        queries = q[b].reshape(M, K, N // K, H)
        scores = np.einsum("mkgh,ksh->kmgs", queries, keys) / np.sqrt(H)
        scores = np.where(visible[None, :, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[b] = np.einsum("kmgs,ksh->mkgh", weights, values).reshape(M, N, H)
    return out


def _rows(case: dict, x: str, pages: np.ndarray, n: int, b: int) -> np.ndarray:
    K = case["k_tree_BXKH"].shape[2]
    prefix = np.asarray(case[f"{x}_pages_PKCH"][pages], np.float64)  # [R, K, C, H]
    prefix = np.moveaxis(prefix, 1, 0).reshape(K, -1, prefix.shape[-1])[:, :n]
    scale = np.asarray(case.get(f"{x}_scale", np.ones(K)), np.float64)
    tree = np.moveaxis(np.asarray(case[f"{x}_tree_BXKH"][b], np.float64), 1, 0)
    return np.concatenate([prefix * scale[:, None, None], tree], axis=1)
