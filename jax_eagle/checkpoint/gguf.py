"""GGUF files of architecture "llama": dequantised, with q/k rows back in half-split rotary order.

GGUF keeps Meta's interleaved rotary layout (pairs 2i, 2i+1), we use Hugging Face's (i, i + H/2).
Names are translated to Hugging Face's by the gguf library's own table, metadata to the fields of a
config.json, so everything behind that is the same code as for a Hugging Face folder.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..config import LlamaConfig
from ..llama import Target, target_placement
from ..quantization import Quantization
from ..quantize import quantized, target_forms
from ..sharding import Backend
from ..tokenizer import Tokenizer
from .mapping import (
    CheckpointError,
    Entry,
    Tensor,
    check_tensors,
    file_shapes,
    target_entries,
    to_params,
)


def load(
    path: Path,
    *,
    dtype: str,
    backend: Backend = Backend(),
    quantization: Quantization | str | None = None,
) -> Target:
    """Reads a GGUF file; values go tensor by tensor to the devices of the backend's mesh.

    Args:
      quantization: how to store weights; None: dequantised.

    Raises:
      CheckpointError: not a whole GGUF file, or tensors that do not fit its metadata.
      ConfigError: an architecture other than llama, a quantization that does not fit.
    """
    metadata, tensors = read_file(path)
    config = LlamaConfig.from_hf(hf_config(metadata, tensors, path), dtype=dtype)
    by_hf_name = _translate(config, tensors)
    entries = target_entries(config)
    check_tensors(file_shapes(entries), by_hf_name, path, ignored=["rope_freqs.weight"])
    config = quantized(config, quantization)
    placement, forms = target_placement(config, backend), target_forms(config)
    params = to_params(entries, by_hf_name, dtype=dtype, placement=placement, forms=forms)
    tokenizer = None
    if "tokenizer.ggml.tokens" in metadata:
        tokenizer = Tokenizer.from_gguf(metadata)
    config = placement.fitted(config)
    return Target(params=params, config=config, tokenizer=tokenizer, backend=backend)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata, and tensors by GGUF name with their shapes [out, in]; nothing is dequantised."""
    try:
        reader = _Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            t.name: Tensor(path, tuple(int(n) for n in reversed(t.shape)), _dequantize(t))
            for t in reader.tensors
        }
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise CheckpointError(f"{path}: truncated, or not a GGUF file ({error})") from None
    return metadata, tensors


class _Reader(gguf.GGUFReader):
    """Sees the mapped file as a plain array: slicing a memmap costs several times as much."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = mapped.view(np.ndarray)


def _dequantize(tensor: gguf.ReaderTensor) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        # float32 comes as a view; no parameter may stay tied to the mapped file.
        return values.copy() if np.may_share_memory(values, tensor.data) else values

    return read


def hf_config(metadata: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The config.json that says the same as the metadata."""
    arch = metadata.get("general.architecture")
    if arch != "llama" or metadata.get("llama.expert_count"):
        kind = "a mixture of experts" if arch == "llama" else f"architecture {arch!r}"
        raise CheckpointError(f"{path}: {kind} is not supported, expected a dense 'llama'")

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"llama.{key}", default)

    stop = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    fields = {
        "model_type": "llama",
        "vocab_size": get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())) or None),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length", get("rope.dimension_count")),
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon", 1e-5)),
        "max_position_embeddings": get("context_length"),
        "rope_parameters": _rope(metadata, tensors, path),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "eos_token_id": list(dict.fromkeys(i for i in stop if i is not None)),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _rope(metadata: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """RoPE fields. Llama 3 scaling is stored as a tensor of divisors, one a frequency."""
    theta = _decimal(metadata.get("llama.rope.freq_base", 10000.0))
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind != "none":
        raise CheckpointError(f"{path}: RoPE scaling {kind!r} is not supported")
    if "rope_freqs.weight" not in tensors:
        return {"rope_type": "default", "rope_theta": theta}
    divisors = tensors["rope_freqs.weight"].read().astype(np.float64)
    # The file holds the result alone: every Llama 3 release used these bounds, and the check
    # below refuses a file made with others.
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    turns = 8192 * theta ** (-np.arange(len(divisors)) / len(divisors)) / (2 * np.pi)
    smooth = np.clip((turns - 1.0) / 3.0, 0.0, 1.0)
    expected = 1 / ((1 - smooth) / rope["factor"] + smooth)
    if not np.allclose(divisors, expected, rtol=1e-4):
        raise CheckpointError(
            f"{path}: tensor rope_freqs.weight is not Llama 3 scaling with bounds 1, 4 and "
            "8192 positions"
        )
    return rope


def _decimal(value: float) -> float:
    """The shortest decimal that a float32 stands for: 9.99999975e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _translate(config: LlamaConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under Hugging Face names, q and k in half-split order."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    translated = dict(tensors)
    for entry in target_entries(config):
        name = table.get_name(entry.name, try_suffixes=(".weight", ".bias"))
        if name in tensors:
            translated[entry.name] = _unpermuted(entry, translated.pop(name), config)
    return translated


def _unpermuted(entry: Entry, tensor: Tensor, config: LlamaConfig) -> Tensor:
    match = re.search(r"\.self_attn\.([qk])_proj\.", entry.name)
    if match is None:
        return tensor
    heads = config.num_heads if match[1] == "q" else config.num_kv_heads
    read = functools.partial(_half_split, tensor.read, heads)
    return Tensor(tensor.file, tensor.shape, read)


def _half_split(read: Callable[[], np.ndarray], heads: int) -> np.ndarray:
    """Row 2i + b of each head moves to row b * H/2 + i."""
    rows = read()
    pairs = np.reshape(rows, (heads, -1, 2, *rows.shape[1:]))
    return np.reshape(np.swapaxes(pairs, 1, 2), rows.shape)
