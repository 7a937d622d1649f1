"""Hugging Face's config.json: the fields of a `LlamaConfig` read from it, and written into it.

RoPE has an old form and a new one. What a file leaves out has the defaults of Hugging Face's
classes, which live here alone: loaders of other files (GGUF) translate to this form.
"""

from collections.abc import Mapping
from typing import Any

from .architecture import ConfigError, Llama4Attention, MoE, RopeScaling
from .quantization import Quantization

_LLAMA4 = "llama4_text"
"""Hugging Face's model type of the text part of Llama 4."""
_MULTIMODAL = "llama4"
"""Its model type of the whole, whose "text_config" describes the text part."""
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    _LLAMA4: "Llama4ForCausalLM",
    _MULTIMODAL: "Llama4ForConditionalGeneration",
}
_LLAMA4_DEFAULTS = {  # of Hugging Face's class: what a config.json may leave out
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "moe_layers": None,
    "interleave_moe_layer_step": 1,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}


def read_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `LlamaConfig` that a config.json has: all but the dtypes.

    Of model type "llama4", which has pictures as well, the text part is read.

    Raises:
      ConfigError: another architecture, a missing field, an unknown RoPE type.
    """
    kind = _model_type(hf)
    if kind == _MULTIMODAL:
        hf, kind = _text_part(hf), _LLAMA4
    is_llama4 = kind == _LLAMA4
    if is_llama4:
        hf = {**_LLAMA4_DEFAULTS, **hf}
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {hf['hidden_act']!r} is not supported: expected 'silu'")
    try:
        heads = int(hf["num_attention_heads"])
        hidden = int(hf["hidden_size"])
        theta, scaling = _rope_from_hf(hf)
        return {
            "vocab_size": int(hf["vocab_size"]),
            "hidden_size": hidden,
            "intermediate_size": int(
                hf["intermediate_size_mlp" if is_llama4 else "intermediate_size"]
            ),
            "num_layers": int(hf["num_hidden_layers"]),
            "num_heads": heads,
            "num_kv_heads": int(hf.get("num_key_value_heads") or heads),
            "head_dim": int(hf.get("head_dim") or hidden // heads),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "rms_norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
            "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
            "attention_bias": bool(hf.get("attention_bias", False)),
            "mlp_bias": bool(hf.get("mlp_bias", False)),
            "max_position": int(hf.get("max_position_embeddings", 2048)),
            "stop_token_ids": token_ids(hf.get("eos_token_id")),
            "llama4": _llama4_from_hf(hf) if is_llama4 else None,
            "moe": _moe_from_hf(hf) if is_llama4 else None,
            "quantization": Quantization.from_hf(hf.get("quantization_config") or {}),
        }
    except KeyError as error:
        raise ConfigError(f"config.json lacks the field {error}") from None


def write_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json from which `read_fields` reads these fields of a `LlamaConfig`."""
    llama4, quantization = fields["llama4"], fields["quantization"]
    kind = "llama" if llama4 is None else _LLAMA4
    hf: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "intermediate_size": fields["intermediate_size"],
        "num_hidden_layers": fields["num_layers"],
        "num_attention_heads": fields["num_heads"],
        "num_key_value_heads": fields["num_kv_heads"],
        "head_dim": fields["head_dim"],
        "rope_parameters": _rope_to_hf(fields["rope_theta"], fields["rope_scaling"]),
        "rms_norm_eps": fields["rms_norm_eps"],
        "tie_word_embeddings": fields["tie_embeddings"],
        "attention_bias": fields["attention_bias"],
        "mlp_bias": fields["mlp_bias"],
        "max_position_embeddings": fields["max_position"],
        "eos_token_id": list(fields["stop_token_ids"]),
        "torch_dtype": fields["dtype"],
    }
    if quantization is not None:
        hf["quantization_config"] = quantization.to_hf()
    if llama4 is not None:
        hf["intermediate_size_mlp"] = fields["intermediate_size"]
        hf |= _moe_to_hf(fields["moe"], fields["num_layers"])
        hf |= _llama4_to_hf(llama4, fields["num_layers"])
    return hf


def token_ids(value) -> tuple[int, ...]:
    """The ids of a field such as eos_token_id: one, a list or nothing."""
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)


def _model_type(hf: Mapping[str, Any]) -> str:
    """The model type as given, or that of the architecture; ConfigError if it is not known."""
    architectures = hf.get("architectures") or []
    known = [kind for kind, name in _ARCHITECTURES.items() if name in architectures]
    kind = hf.get("model_type") or (known or ["llama"])[0]
    if kind not in _ARCHITECTURES or (architectures and not known):
        found = ", ".join(architectures) or kind
        expected = " or ".join(_ARCHITECTURES.values())
        raise ConfigError(f"unknown architecture {found}: expected {expected}")
    return kind


def _text_part(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the text part of a multimodal config.json."""
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(f"config.json of model type {_MULTIMODAL} lacks the field 'text_config'")
    shared = ("eos_token_id", "tie_word_embeddings")  # where a file may have them outside
    return {**{name: hf[name] for name in shared if name in hf}, **text}


def _rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """RoPE base and scaling from `rope_parameters` (new) or `rope_theta` + `rope_scaling` (old)."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"RoPE type {kind!r} is not supported: expected 'default' or 'llama3'")
    try:
        return theta, RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position=int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise ConfigError(f"llama3 RoPE scaling lacks the field {error}") from None


def _rope_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """`rope_parameters`, the new form."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


def _llama4_from_hf(hf: Mapping[str, Any]) -> Llama4Attention:
    """The Llama 4 fields of a config.json that has the defaults filled in."""
    L = int(hf["num_hidden_layers"])
    # 1 is a layer with RoPE, in spite of the name; an empty list says nothing.
    interval = hf["no_rope_layer_interval"]
    rotates = hf["no_rope_layers"] or [(i + 1) % interval for i in range(L)]
    if len(rotates) != L:
        raise ConfigError(f"no_rope_layers has {len(rotates)} entries for {L} layers")
    chunk = hf["attention_chunk_size"]
    kinds = ["chunked_attention" if rope else "full_attention" for rope in rotates]
    spellings = [None, kinds]
    if chunk is None:  # transformers 5.24 calls every layer full then
        spellings.append(["full_attention"] * L)
    if hf.get("layer_types") not in spellings:
        raise ConfigError("layer_types: expected chunked attention in the layers with RoPE alone")
    return Llama4Attention(
        nope_layers=tuple(i for i in range(L) if not rotates[i]),
        chunk=None if chunk is None else int(chunk),
        qk_norm=bool(hf["use_qk_norm"]),
        floor_scale=int(hf["floor_scale"]) if hf["attn_temperature_tuning"] else None,
        attn_scale=float(hf["attn_scale"]),
    )


def _llama4_to_hf(llama4: Llama4Attention, num_layers: int) -> dict[str, Any]:
    """The Llama 4 fields but those of the MoE layers."""
    return {
        "no_rope_layers": [int(i not in llama4.nope_layers) for i in range(num_layers)],
        "attention_chunk_size": llama4.chunk,
        "use_qk_norm": llama4.qk_norm,
        "attn_temperature_tuning": llama4.floor_scale is not None,
        "floor_scale": llama4.floor_scale or _LLAMA4_DEFAULTS["floor_scale"],
        "attn_scale": llama4.attn_scale,
    }


def _moe_from_hf(hf: Mapping[str, Any]) -> MoE | None:
    """The MoE layers of such a config.json: a list, or every so many layers."""
    L, step, layers = (
        int(hf["num_hidden_layers"]),
        hf["interleave_moe_layer_step"],
        hf["moe_layers"],
    )
    if layers is None:
        layers = range(step - 1, L, step) if step else ()
    if any(not 0 <= i < L for i in layers):
        raise ConfigError(f"moe_layers {list(layers)}: expected layers in 0..{L - 1}")
    if not layers:
        return None
    return MoE(
        num_experts=int(hf["num_local_experts"]),
        experts_per_token=int(hf["num_experts_per_tok"]),
        layers=tuple(sorted(layers)),
        intermediate_size=int(hf["intermediate_size"]),
    )


def _moe_to_hf(moe: MoE | None, num_layers: int) -> dict[str, Any]:
    """The fields of the MoE layers; the step is for readers that do not know the list."""
    if moe is None:
        return {"moe_layers": []}
    fields = {
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_layers": list(moe.layers),
    }
    step = moe.layers[0] + 1
    if moe.layers == tuple(range(step - 1, num_layers, step)):
        fields["interleave_moe_layer_step"] = step
    return fields
