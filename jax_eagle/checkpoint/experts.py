"""Files of Llama 4 that hold each expert by itself, as three linear maps.

Published checkpoints stack the experts of a layer into two tensors, which is what an `Entry` says.
Files that went through another program may hold experts.3.gate_proj.weight and so on instead.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping

import numpy as np

from .mapping import Entry, Tensor

_PARTS = {"gate_up": ("gate", "up"), "down": ("down",)}


def split_experts(entries: Iterable[Entry], tensors: Mapping[str, Tensor]) -> list[Entry]:
    """`entries` as a file has them: parts in place of a stack where it holds parts."""
    found = []
    for entry in entries:
        parts = list(itertools.chain(*_parts(entry)))
        is_split = entry.name not in tensors and any(part.name in tensors for part in parts)
        found += parts if is_split else [entry]
    return found


def fuse_experts(entries: Iterable[Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` (checked) with the stacks of `entries` that the file holds in parts."""
    fused = dict(tensors)
    for entry in entries:
        if entry.name not in tensors:
            read = functools.partial(_read_stack, entry, tensors)
            file = tensors[_parts(entry)[0][0].name].file
            fused[entry.name] = Tensor(file, entry.file_shape, read)
    return fused


def _parts(entry: Entry) -> list[tuple[Entry, ...]]:
    """What a stack is made of, expert by expert; nothing if the entry is no stack."""
    if not entry.stack_shape:
        return []
    module, (E, D, *_, F) = entry.module.rsplit(".", 1)[0], entry.shape
    names = _PARTS[entry.path[-1]]
    return [
        tuple(Entry(f"{module}.{e}.{name}_proj", ("kernel",), (D, F), 1) for name in names)
        for e in range(E)
    ]


def _read_stack(entry: Entry, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """In the layout of files that have the stack."""
    experts = (
        np.concatenate([part.to_param(tensors[part.name].read()) for part in parts], axis=1)
        for parts in _parts(entry)
    )
    return np.stack(list(experts))
