"""Official EAGLE-1 and EAGLE-2 folders of Llama and of Llama 4: config fields and tensors.

Their config.json is that of a plain model of the same blocks; the rest is fixed by the format:

    Llama      no norm in front of the first layer, none behind the last; the target's head
    Llama 4    a norm in front of each layer and one behind the last; the target's head or an own

The Llama form has two readings. vLLM and the official code build FC without a bias unless they are
told otherwise, SGLang always builds one. "bias" in config.json is false all the same: both engines
take it for biases of the attention. A draft vocabulary has no place in either form: it is a choice
of the engine at run time, and SGLang reads it from a file of its own (`write_token_map`).

The embedding may be stored; it is the target's, so it is not read.

The official repository reads model.safetensors where there is no pytorch_model.bin. Its package on
PyPI (eagle-llm 1.2.1) is older: it opens pytorch_model.bin alone, so a state dict has to be saved
once more for it, demands the embedding, rotates with the base 10,000 whatever config.json says, and
knows no llama3 scaling.
"""

import os
import pickle
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ConfigError, DraftConfig, LlamaConfig
from ..draft import Draft
from ..llama import Target
from .mapping import CheckpointError, Tensor, draft_entries, to_tensors

Fields = dict[str, Any]
Tensors = dict[str, np.ndarray]
ENGINES = ("vllm", "sglang")
TOKEN_MAP = "hot_token_id.pt"
MAY_HOLD = ("embed_tokens.weight", "fc.bias")
"""Tensors of a folder that are no parameters: the target's embedding, and a bias of zeros."""


def read_config(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path, *, dtype: str
) -> DraftConfig:
    """The config of an official folder.

    Raises:
      CheckpointError: not a draft.
      ConfigError: blocks that are not supported.
    """
    if "fc.weight" not in tensors:
        raise CheckpointError(f"{folder}: not an EAGLE draft: tensor fc.weight is missing")
    layer = read_layer(fields, dtype=dtype)
    is_llama4 = layer.llama4 is not None
    return DraftConfig(
        layer=layer,
        feature_width=layer.hidden_size,
        input_norm=is_llama4,
        output_norm=is_llama4,
        # A bias of zeros is none: it is there for readers that insist on one.
        fc_bias="fc.bias" in tensors and bool(np.any(tensors["fc.bias"].read())),
        own_head=is_llama4 and "lm_head.weight" in tensors,
    )


def read_layer(fields: Mapping[str, Any], *, dtype: str) -> LlamaConfig:
    """The blocks of a draft: a Llama config whose architecture may be named after any reader."""
    if fields.get("model_type") == "eagle":  # an old form of vLLM
        fields = fields.get("model") or {}
    model_type = fields.get("model_type") or "llama"
    return LlamaConfig.from_hf(
        {**fields, "architectures": [], "model_type": model_type}, dtype=dtype
    )


def write(draft: Draft, target: Target | None, engine: str) -> tuple[Fields, Tensors]:
    """The Llama form, for one of `ENGINES`; `target` adds what only it knows.

    Raises:
      ConfigError: the form has no place for something that the draft has.
    """
    config = draft.config
    refuse(f"eagle-llama-{engine}", _without_place(config, engine))
    tensors = to_tensors(draft_entries(config), draft.params)
    architecture = "LlamaForCausalLM"
    if engine == "sglang":
        architecture = "LlamaForCausalLMEagle"
        weight = tensors["fc.weight"]
        tensors.setdefault("fc.bias", np.zeros(weight.shape[0], weight.dtype))
    return config_fields(config.layer, target) | {"architectures": [architecture]}, tensors


def write_llama4(draft: Draft, target: Target | None) -> tuple[Fields, Tensors]:
    """The Llama 4 form; errors as in `write`."""
    config = draft.config
    refuse("eagle-llama4", _without_place_llama4(config))
    fields = config_fields(config.layer, target)
    if config.own_head:
        fields["draft_vocab_size"] = config.layer.vocab_size
    return fields, to_tensors(draft_entries(config), draft.params)


def refuse(profile: str, reasons: Collection[str]) -> None:
    """Raises ConfigError if there are reasons why a draft does not fit a profile."""
    if reasons:
        raise ConfigError(f"profile {profile}: {'; '.join(reasons)}")


def _without_place(config: DraftConfig, engine: str) -> list[str]:
    place = "the format has no place for"
    if config.is_eagle3:
        return ["this is an EAGLE-3 draft: choose eagle3"]
    if config.layer.llama4 is not None:
        return ["this draft has Llama 4 blocks: choose eagle-llama4"]
    found = {
        f"{place} a norm behind the last layer": config.output_norm,
        f"{place} a norm in front of the first layer": config.input_norm,
        f"{place} a head: readers take the target's": config.own_head,
        "vLLM builds FC without a bias": config.fc_bias and engine == "vllm",
    }
    return [reason for reason, is_there in (found | _in_neither(config)).items() if is_there]


def _without_place_llama4(config: DraftConfig) -> list[str]:
    if config.is_eagle3 or config.layer.llama4 is None:
        kind = "an EAGLE-3 draft" if config.is_eagle3 else "a draft with Llama 3 blocks"
        return [f"this is {kind}: choose {'eagle3' if config.is_eagle3 else 'eagle-llama-vllm'}"]
    found = {
        "the format has a norm behind the last layer, this draft has none": not config.output_norm,
        "the format has a norm in front of the first layer, this draft has none": (
            not config.input_norm
        ),
        "vLLM builds FC without a bias": config.fc_bias,
        "the format has no place for the vocabulary map of an own head": (
            config.own_head and config.draft_vocab_size is not None
        ),
    }
    return [reason for reason, is_there in (found | _in_neither(config)).items() if is_there]


def _in_neither(config: DraftConfig) -> dict[str, bool]:
    layer = config.layer
    return {
        "the format has no place for an own embedding: readers take the target's": (
            config.own_embedding
        ),
        "the format has no place for biases of attention and MLP": (
            layer.attention_bias or layer.mlp_bias
        ),
    }


def config_fields(layer: LlamaConfig, target: Target | None) -> Fields:
    """The fields of config.json that every official form has, RoPE in its new and old form.

    Engines cap the context at the draft's max_position_embeddings: it is the target's.
    """
    if target is not None:
        layer = replace(layer, max_position=target.config.max_position)
    fields = layer.to_hf()
    rope = dict(fields["rope_parameters"])
    theta = rope.pop("rope_theta")
    fields |= {
        "rope_theta": theta,
        "rope_scaling": rope if layer.rope_scaling is not None else None,
        "tie_word_embeddings": False,
        "bias": False,
    }
    if not layer.stop_token_ids:
        del fields["eos_token_id"]
    if target is not None and target.tokenizer is not None:
        fields["bos_token_id"] = target.tokenizer.bos_token_id
    return fields


def write_token_map(path: Path, ids: np.ndarray) -> None:
    """Writes a draft vocabulary for SGLang's --speculative-token-map.

    SGLang hands the file to torch.load(weights_only=True) and makes a tensor of what it finds: here
    a list of ids, in the archive that torch.save writes for one.
    """
    records = {
        "data.pkl": pickle.dumps([int(i) for i in ids], protocol=2),
        "byteorder": b"little",
        "version": b"3\n",
    }
    partial = path.with_name(path.name + ".partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for name, data in records.items():
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/{name}"), data)
    os.replace(partial, path)
