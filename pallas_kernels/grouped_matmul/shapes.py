"""Weight shapes of real models: what tests and benchmarks share."""

import dataclasses

import jax
import jax.numpy as jnp

from .arrangement import num_tiles
from .config import rows_per_tile


@dataclasses.dataclass(frozen=True)
class MatmulShape:
    """Weights of one linear map, or of the experts of one layer."""

    groups: int
    inputs: int
    outputs: int


def _models() -> dict[str, MatmulShape]:
    """Dense models whole and as one of eight ranks has them; of experts, one rank's share."""
    shapes = {}
    for name, width, qkv, ffn in (
        ("llama-3.1-8b", 4096, 6144, 14336),
        ("llama-3.3-70b", 8192, 10240, 28672),
    ):
        for part, ranks in (("", 1), ("/8", 8)):
            shapes |= {
                f"{name} qkv{part}": MatmulShape(1, width, qkv // ranks),
                f"{name} gate_up{part}": MatmulShape(1, width, 2 * ffn // ranks),
                f"{name} down{part}": MatmulShape(1, ffn // ranks, width),
            }
    for name, experts in (("llama-4-scout", 16), ("llama-4-maverick", 128)):
        shapes |= {
            f"{name} gate_up/8": MatmulShape(experts, 5120, 2 * 8192 // 8),
            f"{name} down/8": MatmulShape(experts, 8192 // 8, 5120),
        }
    return shapes


SHAPES = _models()

TOKENS = (1, 16, 64, 2048)
"""Plain decoding, a tree or a small batch, a batch, a chunk of a prompt."""

SCHEMES = {
    "bf16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int8": jnp.int8, "int4": jnp.uint8,
}  # fmt: skip
INT4_GROUP = 128


def abstract_inputs(
    shape: MatmulShape, *, tokens: int, scheme: str
) -> dict[str, jax.ShapeDtypeStruct | None]:
    """Arguments of `grouped_matmul` by name, without data, for one choice a token."""
    E, D, F = shape.groups, shape.inputs, shape.outputs
    X, rows = 1, tokens
    if E > 1:
        rows = rows_per_tile(tokens, E)
        X = num_tiles(tokens, E, rows)
    packed = scheme == "int4"
    scales = D // INT4_GROUP if packed else 1
    return {
        "x_RD": jax.ShapeDtypeStruct((X * rows, D), jnp.bfloat16),
        "w": jax.ShapeDtypeStruct((E, D // (1 + packed), F), SCHEMES[scheme]),
        "tile_group_X": jax.ShapeDtypeStruct((X,), jnp.int32),
        "scale":
            None if scheme == "bf16" else jax.ShapeDtypeStruct((E, scales, F), jnp.float32),
    }  # fmt: skip
