"""Published folders with weights in float8_e4m3fn, as compressed-tensors (llm-compressor), FBGEMM
(Meta), ModelOpt (NVIDIA) and others write them.

Beside a weight lies its scale, one number for all of it or one for each output channel:

    MODULE.weight_scale              [], [1], [out] or [out, 1]
    experts.NAME_proj_weight_scale   [], [1], [E, out], [E, 1, out] or [E, out, 1]     ModelOpt
    experts.NAME_proj_scale          the same                                          FBGEMM

Experts may also lie one by one (`experts`), each with scales of its own. Scales of inputs are not
needed, because inputs stay as they are; those of keys and values are not read. What is stored so is
told by the tensors, but the method that config.json names has to be a known one: others mean
something else by the same names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import LlamaConfig
from ..quantization import Quantization, scale_path
from .experts import split_experts
from .mapping import CheckpointError, Entry, Tensor

METHODS = ("compressed-tensors", "fbgemm_fp8", "modelopt", "fp8")
"""What config.json may say under "quant_method"."""
_SCALES = ("_scale", "_scale_ub")


@dataclass(frozen=True)
class Published:
    """What a folder stores in fp8."""

    quantization: Quantization
    entries: list[Entry]
    """Of the scales."""
    tensors: dict[str, Tensor]
    """The scales, one for each output channel, by the names of `entries`."""
    weights: list[str]
    """The tensors of the folder that are in fp8."""
    scales: list[str]
    """The tensors of the folder that are scales, read or not."""


def find(
    config: LlamaConfig,
    entries: list[Entry],
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    folder: Path,
) -> Published | None:
    """What a Hugging Face folder stores in fp8; None: nothing. No values are read.

    Args:
      entries: of the model, under the names of the folder.
      fields: config.json.

    Raises:
      CheckpointError: another layout, or layers of which only a part is stored so.
    """
    if config.quantization is not None:  # our own form: whole weights, to be quantised
        return None
    said = fields.get("quantization_config") or {}
    scales: dict[Entry, Entry] = {}
    strange: list[str] = []
    complete = True
    for entry in entries:
        parts = split_experts([entry], tensors)
        found = [part for part in parts if part.name in tensors]
        complete = complete and len(found) == len(parts)
        forms = {(_is_fp8(part, tensors), _scale_name(part, tensors) is not None) for part in found}
        if forms == {(True, True)}:
            scales[entry] = _scale_entry(entry)
        elif forms - {(False, False)}:
            strange.append(found[0].name)
    if strange or (said and (said.get("quant_method") not in METHODS or not scales)):
        called = [said.get("quant_method", "no quantization_config"), said.get("format")]
        what = strange[:3] or [f"{len(scales)} tensors in float8_e4m3fn"]
        raise CheckpointError(
            f"{folder}: weights in a layout that is not known "
            f"({', '.join(filter(None, called))}; {', '.join(what)}): expected float8_e4m3fn "
            f"with weight_scale beside it, by {', '.join(METHODS)}"
        )
    if not scales or not complete:  # the check of all tensors says what is missing
        return None
    return Published(
        quantization=_quantization(entries, scales, folder),
        entries=list(scales.values()),
        tensors={scale.name: _scales(entry, tensors) for entry, scale in scales.items()},
        weights=[part.name for part in split_experts(scales, tensors)],
        scales=[name for name in tensors if name.endswith(_SCALES)],
    )


def _is_fp8(part: Entry, tensors: Mapping[str, Tensor]) -> bool:
    return tensors[part.name].dtype == "float8_e4m3fn"


def _scale_name(part: Entry, tensors: Mapping[str, Tensor]) -> str | None:
    """The tensor with the scales of a weight; None: there is none."""
    endings = ("_weight_scale", "_scale") if part.stack_shape else (".weight_scale",)
    return next((name for end in endings if (name := part.module + end) in tensors), None)


def _scale_entry(entry: Entry) -> Entry:
    """The parameter with the scales of a kernel, under a name of our own."""
    stack, first = (entry.shape[:1], 2) if entry.stack_shape else ((), entry.num_inputs)
    outputs = entry.shape[first:]
    return Entry(
        f"{entry.name}: scales",
        scale_path(entry.path),
        (*stack, 1, *outputs),
        interleaved=entry.interleaved,
        stack_shape=(*stack, _num_outputs(entry)),
    )


def _num_outputs(entry: Entry) -> int:
    return entry.file_shape[-1 if entry.stack_shape else 0]


def _scales(entry: Entry, tensors: Mapping[str, Tensor]) -> Tensor:
    """One scale for each output channel of a kernel, [out], or of each expert, [E, out]."""
    parts = split_experts([entry], tensors)
    vectors = [_one_by_one(part, tensors) for part in parts]
    shape = _scale_entry(entry).stack_shape

    def read() -> np.ndarray:
        # The parts of an expert (gate, up) come one behind the other, and so do the experts.
        return np.reshape(np.concatenate([np.ravel(vector.read()) for vector in vectors]), shape)

    return Tensor(vectors[0].file, shape, read)


def _one_by_one(part: Entry, tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor of scales as one for each output channel."""
    name = _scale_name(part, tensors)
    assert name is not None
    found, num_outputs, stack = tensors[name], _num_outputs(part), part.stack_shape[:1]
    one_each = {(*stack, num_outputs), (*stack, num_outputs, 1), (*stack, 1, num_outputs)}
    if tuple(found.shape) not in {(), (1,)} | (
        one_each if stack else one_each - {(1, num_outputs)}
    ):
        raise CheckpointError(
            f"{found.file}: tensor {name} has shape {list(found.shape)}, expected one scale for "
            f"all of the weight or for each of {num_outputs} output channels"
        )
    shape = (*stack, num_outputs)

    def read() -> np.ndarray:
        values = np.asarray(found.read(), np.float32)
        return np.broadcast_to(values.ravel(), shape) if values.size == 1 else values.reshape(shape)

    return Tensor(found.file, shape, read)


def _quantization(
    entries: list[Entry], stored: Mapping[Entry, Entry], folder: Path
) -> Quantization:
    """Which groups are stored so, and which layers are not at all."""
    flags: dict[str, dict[str, set[bool]]] = {}
    for entry in entries:
        if (group := _group(entry)) is not None:
            layers = flags.setdefault(group, {})
            layers.setdefault(entry.path[0], set()).add(entry in stored)
        elif entry in stored:
            raise CheckpointError(f"{folder}: tensor {entry.name} is in fp8, expected it whole")
    groups = {group: layers for group, layers in flags.items() if {True} in layers.values()}
    touched = {at for layers in groups.values() for at, found in layers.items() if True in found}
    skipped = {at for layers in groups.values() for at in layers} - touched
    for group, layers in flags.items():
        mixed = [at for at, found in layers.items() if at in touched and found != {group in groups}]
        if mixed:
            raise CheckpointError(
                f"{folder}: {group} of {mixed[0]} is not stored as that of other layers: expected "
                "fp8 in all layers or, in some layers, nowhere"
            )
    schemes: dict[str, Any] = dict.fromkeys(groups, "fp8")
    return Quantization(
        **schemes,
        skipped_layers=tuple(sorted(int(at.removeprefix("layers_")) for at in skipped)),
    )


def _group(entry: Entry) -> str | None:
    """The field of `Quantization` that a parameter belongs to; None: to no field."""
    if entry.path[-1] in ("gate_up", "down"):
        return "experts"
    if entry.path[-1] != "kernel":
        return None
    kinds = {"lm_head": "head", "attention": "attention", "mlp": "mlp", "shared": "mlp"}
    return next((kinds[name] for name in entry.path if name in kinds), None)
