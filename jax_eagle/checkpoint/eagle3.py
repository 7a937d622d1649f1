"""EAGLE-3 folders: those of the official code, SGLang and vLLM, and those of speculators.

Both hold the same tensors; speculators calls the first layer layers.0 instead of midlayer and nests
the config of the layers. Layers behind the first one are layers.1 and so on, as in vLLM.

Draft vocabulary: the target id of draft id j is j + d2t[j]; t2d says of each target id whether it
is one of them. Neither is there when the draft knows every token.

Tapped layers are numbered in two ways. We, vLLM and speculators name the layer that a residual
stream enters ("enter"); SGLang and NVIDIA, in "eagle_config", the layer that it leaves ("output"),
which is one less. Each reader looks in its own place, so `write` can serve both.

What readers do besides: the official code always taps layers 2, L/2 and L-3, knows one layer, no
scaled RoPE and none of the norm options; it takes the embedding from the target's folder, and from
the draft's only if config.json has a "target_hidden_size". llama.cpp's converter knows one layer.
SGLang wants the norm in front of a layer behind the first one to be named hidden_norm.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Array, Int

from ..config import ConfigError, DraftConfig, default_taps
from ..draft import Draft
from ..llama import Target
from .eagle_llama import Fields, Tensors, config_fields, read_layer, refuse
from .mapping import CheckpointError, Entry, Tensor, draft_entries, to_tensors

NUMBERINGS = ("enter", "output")
FIRST_LAYERS = ("midlayer", "layers.0")
EMBEDDING = "embed_tokens.weight"
MAY_HOLD = (EMBEDDING, "t2d")
"""Tensors of a folder that are no parameters; the embedding is none if it is the target's."""
_IDS = "eagle_aux_hidden_state_layer_ids"
_WITHOUT_IDS = (
    f"config.json does not name the tapped layers ({_IDS}), whose default depends on the "
    "target: load the draft with its target"
)


def is_eagle3(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder holds an EAGLE-3 draft."""
    first = f"{first_layer_of(tensors)}.hidden_norm.weight"
    return first in tensors or not {_IDS, "eagle_config"}.isdisjoint(fields)


def first_layer_of(tensors: Mapping[str, Tensor]) -> str:
    """Which of `FIRST_LAYERS` the tensors have."""
    return FIRST_LAYERS[not any(name.startswith("midlayer.") for name in tensors)]


def entries_of(config: DraftConfig, first_layer: str) -> list[Entry]:
    """Every parameter of a draft, the first layer under one of the names of `FIRST_LAYERS`."""
    return [
        replace(entry, module=first_layer + entry.module.removeprefix("midlayer"))
        if entry.module.startswith("midlayer.")
        else entry
        for entry in draft_entries(config)
    ]


def read_config(
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: str,
    target: Target | None,
    numbering: str | None,
) -> DraftConfig:
    """The config of an EAGLE-3 folder.

    Args:
      tensors: what has no field of its own is told by what is there.
      target: decides on the tapped layers where none are named, and whether a stored embedding is
        just its own.
      numbering: one of `NUMBERINGS`, against what the place of the tapped layers says.

    Raises:
      ConfigError: a field is missing, contradicts another or is not supported.
    """
    nested = fields.get("eagle_config") or {}
    if not nested.get("use_aux_hidden_state", True):
        raise ConfigError("use_aux_hidden_state false is not supported: expected tapped layers")
    speculators = "transformer_layer_config" in fields
    if speculators and "norm_before_residual" not in fields:
        raise ConfigError("config.json lacks norm_before_residual, of which readers differ")
    layer = read_layer(fields["transformer_layer_config"] if speculators else fields, dtype=dtype)
    if layer.llama4 is not None:
        raise ConfigError("EAGLE-3 drafts with Llama 4 blocks are not supported: expected 'llama'")
    has_bias = f"{first_layer_of(tensors)}.self_attn.q_proj.bias" in tensors
    layer = replace(layer, tie_embeddings=False, attention_bias=has_bias)
    taps = _read_taps(fields, target, numbering)
    num_tokens: int | None = int(fields.get("draft_vocab_size") or layer.vocab_size)
    if num_tokens == layer.vocab_size and "d2t" not in tensors:
        num_tokens = None
    return DraftConfig(
        layer=layer,
        feature_width=len(taps) * int(fields.get("target_hidden_size") or layer.hidden_size),
        output_norm=bool(fields.get("norm_output", False)),
        fc_bias="fc.bias" in tensors,
        draft_vocab_size=num_tokens,
        taps=taps,
        own_embedding=EMBEDDING in tensors and not _is_embedding(tensors[EMBEDDING], target),
        own_head="lm_head.weight" in tensors,
        norm_before_residual=bool(fields.get("norm_before_residual", False)),
        feature_norm=_read_feature_norm(fields),
    )


def _read_taps(
    fields: Mapping[str, Any], target: Target | None, numbering: str | None
) -> tuple[int, ...]:
    """The tapped layers as we number them."""
    if numbering is not None:
        _check_choice("numbering", numbering, NUMBERINGS)
    places = {"enter": fields.get(_IDS), "output": (fields.get("eagle_config") or {}).get(_IDS)}
    named = {place: tuple(int(i) for i in ids) for place, ids in places.items() if ids}
    if not named:
        if target is None:
            raise ConfigError(_WITHOUT_IDS)
        return default_taps(target.config.num_layers)
    if numbering is None:
        read = {_as_entered(ids, place) for place, ids in named.items()}
        if len(read) > 1:
            raise ConfigError(
                f"tapped layers {named['enter']} and, in eagle_config, {named['output']}: expected "
                "the latter to be one less each; say how they are numbered: enter or output"
            )
        return read.pop()
    return _as_entered(named.get(numbering) or next(iter(named.values())), numbering)


def _as_entered(ids: tuple[int, ...], numbering: str) -> tuple[int, ...]:
    return tuple(i + NUMBERINGS.index(numbering) for i in ids)


def _read_feature_norm(fields: Mapping[str, Any]) -> str | None:
    joint, each = fields.get("norm_before_fc"), fields.get("fc_norm") or fields.get("use_aux_norm")
    if joint and each:
        raise ConfigError("norm_before_fc and fc_norm are both true: expected at most one")
    return "joint" if joint else "each" if each else None


def _is_embedding(tensor: Tensor, target: Target | None) -> bool:
    """Whether a tensor is the target's embedding."""
    if target is None:
        return False
    embedding = target.params["embed"]["embedding"]
    if tensor.shape != embedding.shape:
        return False
    return np.array_equal(tensor.read().astype(embedding.dtype), np.asarray(embedding))


def offsets(draft_to_target: Int[Array, "U"]) -> np.ndarray:
    """The tensor d2t [U], int64."""
    ids_U = np.asarray(draft_to_target, np.int64)
    return ids_U - np.arange(len(ids_U), dtype=np.int64)


def check_flags(t2d: Tensor, ids_U: np.ndarray | None, vocab_size: int) -> None:
    """Raises CheckpointError unless the tensor t2d is true for these ids alone; None: for all."""
    expected_V = np.isin(np.arange(vocab_size), np.arange(vocab_size) if ids_U is None else ids_U)
    if not np.array_equal(t2d.read().astype(bool), expected_V):
        raise CheckpointError(f"{t2d.file}: tensor t2d names other tokens than tensor d2t")


def write(
    draft: Draft,
    target: Target | None,
    *,
    embedding: np.ndarray | None = None,
    numbering: str = "both",
    first_layer: str = "midlayer",
) -> tuple[Fields, Tensors]:
    """The form of the official code, SGLang and vLLM.

    Args:
      target: adds what only it knows; None: without that.
      embedding: the target's, to be stored as well.
      numbering: of the tapped layers, one of `NUMBERINGS` or "both", each in its place.
      first_layer: one of `FIRST_LAYERS`.

    Raises:
      ConfigError: the form has no place for something that the draft has.
    """
    config, width = draft.config, draft.config.layer.hidden_size
    refuse("eagle3", _without_place(config))
    _check_choice("numbering", numbering, (*NUMBERINGS, "both"))
    fields = config_fields(config.layer, target) | _own_fields(draft)
    fields["architectures"] = ["LlamaForCausalLMEagle3"]
    if not config.own_head:
        fields["draft_vocab_size"] = None  # so that SGLang takes the target's head
    stores_embedding = config.own_embedding or embedding is not None
    if fields["target_hidden_size"] == width and not stores_embedding:
        del fields["target_hidden_size"]
    if numbering != "output":
        fields[_IDS] = list(config.taps)
    nested: Fields = {"use_aux_hidden_state": True}
    if numbering != "enter":
        if config.taps[0] == 0:
            raise ConfigError("the embedding is tapped, which only the numbering 'enter' can say")
        nested[_IDS] = [i - 1 for i in config.taps]
    fields["eagle_config"] = nested
    return fields, _tensors(draft, embedding, first_layer)


def write_speculators(
    draft: Draft, target: Target | None, *, verifier: str, embedding: np.ndarray | None = None
) -> tuple[Fields, Tensors]:
    """The form of speculators; `verifier` is the name under which vLLM finds the target."""
    refuse("speculators", _without_place(draft.config))
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3}
    layers = config_fields(draft.config.layer, target)
    known = layers if target is None else target.config.to_hf()
    fields = _own_fields(draft) | {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.7.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": verifier, "architectures": known["architectures"]},
        },
        "tie_word_embeddings": False,
        "torch_dtype": layers["torch_dtype"],
        "transformer_layer_config": layers,
        _IDS: list(draft.config.taps),
    }
    return fields, _tensors(draft, embedding, "layers.0")


def _without_place(config: DraftConfig) -> list[str]:
    if not config.is_eagle3:
        return ["this is not an EAGLE-3 draft: choose an eagle-llama profile"]
    found = {
        "readers build Llama 3 layers, this draft has Llama 4 blocks": (
            config.layer.llama4 is not None
        ),
        "readers build FC without a bias": config.fc_bias,
        "readers cannot cut the target's head to a draft vocabulary: it needs an own head": (
            not config.own_head and config.draft_vocab_size is not None
        ),
    }
    return [reason for reason, is_there in found.items() if is_there]


def _own_fields(draft: Draft) -> Fields:
    """What both forms say of a draft besides its layers."""
    config = draft.config
    num_tokens = config.draft_vocab_size or config.layer.vocab_size
    return {
        "draft_vocab_size": num_tokens,
        "target_hidden_size": config.feature_width // len(config.taps),
        "num_aux_hidden_states": len(config.taps),
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.feature_norm == "joint",
        "fc_norm": config.feature_norm == "each",
        "norm_output": config.output_norm,
    }


def _tensors(draft: Draft, embedding: np.ndarray | None, first_layer: str) -> Tensors:
    _check_choice("first layer", first_layer, FIRST_LAYERS)
    tensors = to_tensors(entries_of(draft.config, first_layer), draft.params)
    if embedding is not None:
        tensors[EMBEDDING] = embedding
    if draft.draft_to_target is not None:
        tensors["d2t"] = offsets(draft.draft_to_target)
        token_V = np.arange(draft.config.layer.vocab_size)
        tensors["t2d"] = np.isin(token_V, np.asarray(draft.draft_to_target))
    return tensors


def _check_choice(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ConfigError(f"{what} {given!r}: expected one of {', '.join(known)}")
