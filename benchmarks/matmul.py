"""Times products with quantised weights as a decoder meets them: many layers, none of them in a
cache, rows routed at random where there are experts."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import arrange, grouped_matmul, rows_per_tile
from pallas_kernels.grouped_matmul.shapes import SHAPES, MatmulShape, abstract_inputs

from .timing import Machine, Row, per_iteration

_STRIDE = 37
"""Experts between those of one call and of the next, beside a whole layer."""


def measure_products(
    machine: Machine,
    name: str,
    shape: MatmulShape,
    scheme: str,
    *,
    rows: tuple[int, ...],
    **options: Any,
) -> Iterator[Row]:
    """One row for each number of tokens.

    Args:
      scheme: of `shapes.SCHEMES`.
      options: as `seconds_and_bytes` takes them.
    """
    for tokens in rows:
        seconds, read = seconds_and_bytes(shape, tokens=tokens, scheme=scheme, **options)
        floor = machine.floor(read, 2 * tokens * shape.inputs * shape.outputs)
        note = f"{read / seconds / 1e9:.0f} GB/s"
        yield Row(f"product ({scheme}), {name}, {tokens} rows", seconds, floor, note)


def seconds_and_bytes(
    shape: MatmulShape, *, tokens: int, scheme: str, calls: int = 64, gigabytes: float = 0.5,
    **options: Any,
) -> tuple[float, int]:  # fmt: skip
    """(seconds of a call, bytes of weights and scales that it has to read).

    Args:
      gigabytes: of weights in all layers together, several times any cache.
      options: of `grouped_matmul`.
    """
    E = shape.groups
    like = abstract_inputs(shape, tokens=tokens, scheme=scheme)
    tile_group = np.zeros(1, np.int32)
    if E > 1:
        group_T1 = np.random.default_rng(0).integers(0, E, (tokens, 1)).astype(np.int32)
        tile_group = np.asarray(arrange(group_T1, E, rows_per_tile(tokens, E)).tile_group)
    stored = [x for x in (like["w"], like["scale"]) if x is not None]
    layer_bytes = sum(x.size * x.dtype.itemsize for x in stored)
    read = layer_bytes * len(set(tile_group[tile_group >= 0].tolist())) // E
    layers = max(1, int(-(-gigabytes * 2**30 // layer_bytes)))

    def fill(like: Any, value: float) -> Any:
        return jnp.full((layers * E, *like.shape[1:]), value, like.dtype)

    assert like["w"] is not None and like["x_RD"] is not None
    w = fill(like["w"], 1)
    scale = None if like["scale"] is None else fill(like["scale"], 1e-4)

    def layer(carry, w, scale, tile_group):
        x_RD, i = carry
        # Other weights in every call: those of the last one may be in a cache.
        moved = (tile_group + i * (E + _STRIDE)) % (layers * E)
        here = jnp.where(tile_group < 0, -1, moved)
        y_RF = grouped_matmul(x_RD, w, here, scale=scale, **options)
        return x_RD + jnp.float32(1e-30).astype(x_RD.dtype) * y_RF[:, :1], i + 1

    carry = jnp.ones(like["x_RD"].shape, like["x_RD"].dtype), jnp.int32(0)
    return per_iteration(layer, carry, calls, w, scale, tile_group)[0], read


EIGHT_BITS = tuple(
    (name, shape, scheme)
    for scheme in ("fp8", "int8")
    for name, shape in SHAPES.items()
    if name.startswith("llama-4-maverick")
    or (name.startswith("llama-3.1-8b") and not name.endswith("/8"))
)
"""What has to read its weights as fast as the memory gives them: (name, shape, scheme)."""
