"""What a compiled program does with memory and links, read from its text."""

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Iterable
from typing import Any

import jax.numpy as jnp

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][a-z-]*)\(", re.MULTILINE)
_FUSED = re.compile(r"^%fused\S* .*?^}$", re.MULTILINE | re.DOTALL)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_PASSED_ON = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices, as it stands in the text: in a loop it runs more than once."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    """Of the arrays that go in and come out."""
    size: int
    """Bytes of the largest of them."""


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program."""
    found = []
    for _, types, opcode in _INSTRUCTION.findall(text):
        kind = opcode.removesuffix("-start")
        if kind in _KINDS:
            arrays = list(_arrays(types))
            size = max(_BYTES[dtype] * math.prod(shape) for dtype, shape in arrays)
            found.append(Collective(kind, tuple(shape for _, shape in arrays), size))
    return found


def remade(
    text: str, arrays: Iterable[Any], *, rows: Collection[int] = (), least: int = 2**20
) -> list[str]:
    """Instructions that write as many whole weights as one of `arrays` has on a device.

    Or as two or three of them have together: XLA joins weights that multiply the same rows. That is
    a copy of weights or of a cache, or weights that were widened. Scatters in place are left out.

    Args:
      rows: numbers of rows that the program multiplies; what has an axis of that length is taken
        for activations, which may be as large.
      least: arrays of fewer weights are not looked for.
    """
    single = {size for x in arrays if (size := _num_weights(x)) >= least}
    together = itertools.chain(
        *(itertools.combinations_with_replacement(single, n) for n in (2, 3))
    )
    sizes = single | set(map(sum, together))
    found = []
    for name, types, opcode in _INSTRUCTION.findall(_FUSED.sub("", text)):  # fused: not in memory
        if opcode in _PASSED_ON or (opcode == "fusion" and "scatter" in name):
            continue
        for dtype, shape in _arrays(types):
            whole = dtype in ("bf16", "f32") and math.prod(shape) in sizes
            if whole and not set(shape) & set(rows):
                found.append(f"{name}: {types}")
    return found


def on_device(x: Any) -> tuple[int, ...]:
    """The shape of one device's part of an array, real or abstract."""
    return x.sharding.shard_shape(x.shape)


def _num_weights(x: Any) -> int:
    return math.prod(on_device(x)) * (2 if x.dtype == jnp.uint8 else 1)  # int4: two a byte


def _arrays(types: str) -> Iterable[tuple[str, tuple[int, ...]]]:
    for dtype, dims in _ARRAY.findall(types):
        yield dtype, tuple(int(n) for n in dims.split(",") if n)
