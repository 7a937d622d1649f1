"""Which tensor of a checkpoint is which parameter, and every check of a file against a config.

An `Entry` ties a Hugging Face tensor name to a path in the parameter tree. Files store linear maps
as [out, in], we store kernels as [in..., out...]: so a "kernel" is transposed and then takes its
parameter shape, anything else is only reshaped. Files of Llama 4 rotate pairs (2i, 2i+1) of a head,
we always rotate (i, i + H/2): so queries and keys are reordered within each head, which no dot
product and no norm over a head can tell. Both directions follow from the entry alone, hence
loading, saving and the name translation of GGUF share this one table.

Kernels of experts are stacked, [E, in, out] in files as well: they are only reshaped. (Some files
hold each expert by itself; see `experts`.)
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from ..config import ConfigError, DraftConfig, LlamaConfig, MoE
from ..placement import Placement
from ..quantization import scale_path

if TYPE_CHECKING:  # models import the tokenizer, and that imports this module
    from ..quantize import Form


_WHOLE = ("float16", "bfloat16", "float32", "float64")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; one line: the file, the tensor, what is wrong."""


def one_line(error: Exception) -> str:
    """The first line of what another library says, for messages of our own."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, not read yet; `shape` is that of the file."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: str = "float32"
    """Of what `read` returns, as far as a reader has to know it before."""


@dataclass(frozen=True)
class Entry:
    """One parameter: its Hugging Face name, its path and its shape in the parameter tree."""

    module: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    num_inputs: int = 0
    """Leading axes of a kernel that are contracted; 0: not a kernel."""
    interleaved: bool = False
    """The file has rotary pairs side by side in each head."""
    stack_shape: tuple[int, ...] = ()
    """Of the kernels of all experts in the file; such a tensor has the module's name."""

    @property
    def name(self) -> str:
        """The tensor name in a Hugging Face file."""
        if self.stack_shape:
            return self.module
        return f"{self.module}.{'bias' if self.path[-1] == 'bias' else 'weight'}"

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape in a Hugging Face file."""
        if self.stack_shape:
            return self.stack_shape
        if self.num_inputs:
            inputs, outputs = self.shape[: self.num_inputs], self.shape[self.num_inputs :]
            return math.prod(outputs), math.prod(inputs)
        return (math.prod(self.shape),) if self.path[-1] == "bias" else self.shape

    def to_param(self, array: np.ndarray) -> np.ndarray:
        """From the layout of the file to that of the parameter tree."""
        array = np.reshape(array.T if self.num_inputs else array, self.shape)
        return _swap_pairs(array, -1, 2) if self.interleaved else array

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_param`."""
        if self.interleaved:
            array = _swap_pairs(array, 2, -1)
        if not self.num_inputs:
            return np.reshape(array, self.file_shape)
        return np.ascontiguousarray(np.reshape(array, self.file_shape[::-1]).T)


def _swap_pairs(array: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The last axis as a matrix of this shape, transposed: (-1, 2) parts pairs, (2, -1) joins."""
    matrix = np.reshape(array, (*array.shape[:-1], rows, columns))
    return np.reshape(np.swapaxes(matrix, -1, -2), array.shape)


def linear(
    module: str,
    path: tuple[str, ...],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    bias: bool,
    *,
    interleaved: bool = False,
) -> list[Entry]:
    """The entries of a linear map: kernel [in..., out...] and, if it has one, bias [out...]."""
    kernel = Entry(module, (*path, "kernel"), inputs + outputs, len(inputs), interleaved)
    return [kernel, Entry(module, (*path, "bias"), outputs, 0, interleaved)] if bias else [kernel]


def layer_entries(
    config: LlamaConfig, index: int, prefix: str, *, attention_norm: bool = True
) -> list[Entry]:
    """The entries of one decoder layer; `prefix` is what the file puts before "layers."."""
    c = config
    D, F, N, K, H = c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim
    module, path = f"{prefix}layers.{index}", (f"layers_{index}",)
    entries = []
    if attention_norm:
        entries.append(Entry(f"{module}.input_layernorm", (*path, "attention_norm", "scale"), (D,)))
    entries.append(Entry(f"{module}.post_attention_layernorm", (*path, "mlp_norm", "scale"), (D,)))
    for name, inputs, outputs in (
        ("q", (D,), (N, H)), ("k", (D,), (K, H)), ("v", (D,), (K, H)), ("o", (N, H), (D,)),
    ):  # fmt: skip
        at = f"{module}.self_attn.{name}_proj"
        entries += linear(
            at, (*path, "attention", name), inputs, outputs, c.attention_bias,
            interleaved=c.llama4 is not None and name in "qk",
        )  # fmt: skip
    mlp = f"{module}.{'mlp' if c.llama4 is None else 'feed_forward'}"
    if c.moe is not None and c.uses_experts(index):
        return entries + _moe_entries(c, c.moe, mlp, (*path, "moe"))
    return entries + _swiglu_entries(c, mlp, (*path, "mlp"), F)


def _swiglu_entries(
    config: LlamaConfig, module: str, path: tuple[str, ...], width: int
) -> list[Entry]:
    D, F = (config.hidden_size,), (width,)
    entries = []
    for name, inputs, outputs in (("gate", D, F), ("up", D, F), ("down", F, D)):
        at = f"{module}.{name}_proj"
        entries += linear(at, (*path, name), inputs, outputs, config.mlp_bias)
    return entries


def _moe_entries(config: LlamaConfig, moe: MoE, module: str, path: tuple[str, ...]) -> list[Entry]:
    D, E, F = config.hidden_size, moe.num_experts, moe.intermediate_size
    experts, shared = f"{module}.experts", f"{module}.shared_expert"
    return [
        *linear(f"{module}.router", (*path, "router"), (D,), (E,), bias=False),
        Entry(
            f"{experts}.gate_up_proj", (*path, "gate_up"), (E, D, 2, F), stack_shape=(E, D, 2 * F)
        ),
        Entry(f"{experts}.down_proj", (*path, "down"), (E, F, D), stack_shape=(E, F, D)),
        *_swiglu_entries(config, shared, (*path, "shared"), F),
    ]


def target_entries(config: LlamaConfig) -> list[Entry]:
    """Every parameter of a Llama, under its Hugging Face name."""
    D, V = config.hidden_size, config.vocab_size
    entries = [Entry("model.embed_tokens", ("embed", "embedding"), (V, D))]
    for i in range(config.num_layers):
        entries += layer_entries(config, i, "model.")
    entries.append(Entry("model.norm", ("norm", "scale"), (D,)))
    if not config.tie_embeddings:
        entries += linear("lm_head", ("lm_head",), (D,), (V,), bias=False)
    return entries


def draft_entries(config: DraftConfig) -> list[Entry]:
    """Every parameter of a draft, under the names that EAGLE and EAGLE-3 files use."""
    c, layer = config, config.layer
    D, V = layer.hidden_size, layer.vocab_size
    num_inputs = c.feature_width if c.is_eagle3 else D + c.feature_width
    entries = linear("fc", ("fc",), (num_inputs,), (D,), c.fc_bias)
    if c.feature_norm == "joint":
        entries.append(Entry("input_norm", ("feature_norm", "scale"), (c.feature_width,)))
    elif c.feature_norm == "each":
        shape = (c.feature_width // len(c.taps),)
        for i in range(len(c.taps)):
            entries.append(Entry(f"fc_norm.{i}", (f"feature_norms_{i}", "scale"), shape))
    if c.is_eagle3:
        entries += _first_eagle3_layer(layer)
    else:
        entries += layer_entries(layer, 0, "", attention_norm=c.input_norm)
    for i in range(1, layer.num_layers):
        entries += layer_entries(layer, i, "")
    if c.is_eagle3 or c.output_norm:
        entries.append(Entry("norm", ("norm", "scale"), (D,)))
    if c.own_embedding:
        entries.append(Entry("embed_tokens", ("embed", "embedding"), (V, D)))
    if c.own_head:
        entries += linear("lm_head", ("lm_head",), (D,), (c.draft_vocab_size or V,), bias=False)
    return entries


def _first_eagle3_layer(config: LlamaConfig) -> list[Entry]:
    """The layer whose queries, keys and values read (normed embedding, normed state)."""
    D, module = config.hidden_size, "midlayer"
    entries = [Entry(f"{module}.hidden_norm", ("layers_0", "hidden_norm", "scale"), (D,))]
    for entry in layer_entries(config, 0, ""):
        shape = entry.shape
        if entry.num_inputs and entry.path[-2] in ("q", "k", "v"):
            shape = (2 * D, *shape[1:])
        name = module + entry.module.removeprefix("layers.0")
        entries.append(replace(entry, module=name, shape=shape))
    return entries


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    source: Path,
    *,
    ignored: Collection[str] = (),
    narrow: Collection[str] = (),
) -> None:
    """Raises CheckpointError unless `tensors` has the expected names and shapes, and no others.

    Old files carry rotary_emb.inv_freq, which may be left over like the names in `ignored`. Numbers
    are floats of 16 bits or more: integers and smaller floats mean something else without scales.
    Only tensors that are `narrow` may hold those.
    """
    if missing := [name for name in expected if name not in tensors]:
        raise CheckpointError(f"{source}: {_named('tensor', missing)} missing")
    spare = tuple(ignored)
    extra = [
        name
        for name in tensors
        if name not in expected and name not in spare and not name.endswith("rotary_emb.inv_freq")
    ]
    if extra:
        where = tensors[extra[0]].file
        raise CheckpointError(f"{where}: {_named('tensor', extra)} not expected by the config")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, "
                f"expected {list(shape)} from the config"
            )
        if tensor.dtype not in _WHOLE and name not in narrow:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} is in {tensor.dtype}, a layout that is not known: "
                f"expected one of {', '.join(_WHOLE)}, or float8_e4m3fn with scales"
            )


def file_shapes(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a Hugging Face file."""
    return {entry.name: entry.file_shape for entry in entries}


def to_params(
    entries: Iterable[Entry],
    tensors: Mapping[str, Tensor],
    *,
    dtype: str,
    placement: Placement,
    forms: "Mapping[tuple[str, ...], Form] | None" = None,
) -> dict[str, Any]:
    """The parameter tree in `dtype`, read from `tensors` (checked, by Hugging Face name).

    One tensor at a time goes to the devices of the placement. Kernels that have a form (see
    `quantize.stored_forms`) are stored so, unless the file has them so: as float8_e4m3fn, with an
    entry for their scales.
    """
    forms = forms or {}
    scales = {scale_path(path) for path in forms}
    leaves: dict[tuple[str, ...], Any] = {}
    for entry in entries:
        path, array = entry.path, entry.to_param(tensors[entry.name].read())
        if path in scales:
            leaves[path] = placement.read(path, array, "float32")
        elif path in forms and array.dtype == jnp.float8_e4m3fn:
            leaves[path] = placement.read(path, array, "float8_e4m3fn")
        else:
            leaf = placement.read(path, array, dtype)
            leaves |= forms[path].store(path, leaf, placement) if path in forms else {path: leaf}
    return nested(leaves)


def nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The tree of nested dicts that has these leaves at these paths."""
    tree: dict[str, Any] = {}
    for (*parents, last), leaf in leaves.items():
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def to_tensors(entries: Iterable[Entry], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a file, by Hugging Face name; the inverse of `to_params`.

    Raises:
      ConfigError: a kernel that is stored in fewer bits.
    """
    tensors = {}
    for entry in entries:
        leaf: Any = params
        for key in entry.path:
            leaf = leaf[key]
        if leaf.dtype.itemsize == 1:
            raise ConfigError(
                f"{'/'.join(entry.path)} is stored as {leaf.dtype.name}, for which these files "
                "have no place: save a quantised model as an Orbax folder (--format orbax)"
            )
        tensors[entry.name] = entry.to_file(np.asarray(leaf))
    return tensors


def _named(noun: str, names: list[str]) -> str:
    """'tensor a is' or 'tensors a, b, c and 4 more are'."""
    if len(names) == 1:
        return f"{noun} {names[0]} is"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{noun}s {', '.join(names[:3])}{more} are"
