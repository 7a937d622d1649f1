"""Frozen model configurations. They are hashable, so they are static under jit.

One reader for each file form: `LlamaConfig.from_hf` (config.json; old and new RoPE fields) and
`DraftConfig.from_dict`. GGUF metadata is translated to the HF form by its loader, so there is one
place where defaults live.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what was given and expected."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3 frequency scaling: long wavelengths are stretched by `factor`, with a smooth band."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A dense Llama decoder (Llama 2, Llama 3.x and what shares the architecture)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position: int = 2048
    stop_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} attention heads are not a multiple of "
                f"{self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], *, dtype: str = "float32") -> "LlamaConfig":
        """Reads a Hugging Face config.json of architecture LlamaForCausalLM.

        Raises:
          ConfigError: another architecture, a missing field, or an unknown RoPE type.
        """
        architectures = hf.get("architectures") or []
        known = "LlamaForCausalLM" in architectures if architectures else None
        if known is False or hf.get("model_type", "llama") != "llama":
            found = ", ".join(architectures) or hf.get("model_type")
            raise ConfigError(f"unknown architecture {found}: expected LlamaForCausalLM")
        if hf.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act {hf['hidden_act']!r} is not supported: expected 'silu'")
        try:
            heads = int(hf["num_attention_heads"])
            hidden = int(hf["hidden_size"])
            theta, scaling = _rope_from_hf(hf)
            return cls(
                vocab_size=int(hf["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(hf["intermediate_size"]),
                num_layers=int(hf["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(hf.get("num_key_value_heads") or heads),
                head_dim=int(hf.get("head_dim") or hidden // heads),
                rope_theta=theta,
                rope_scaling=scaling,
                rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
                tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
                attention_bias=bool(hf.get("attention_bias", False)),
                mlp_bias=bool(hf.get("mlp_bias", False)),
                max_position=int(hf.get("max_position_embeddings", 2048)),
                stop_token_ids=_as_ids(hf.get("eos_token_id")),
                dtype=dtype,
            )
        except KeyError as error:
            raise ConfigError(f"config.json lacks the field {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The config.json that `from_hf` reads back to an equal config."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            rope |= {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_max_position,
            }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_parameters": rope,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "max_position_embeddings": self.max_position,
            "eos_token_id": list(self.stop_token_ids),
            "torch_dtype": self.dtype,
        }


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """An EAGLE draft: FC over (embedding of the next token, feature), then dense decoder layers.

    `input_norm` is the norm in front of the first layer's attention (official EAGLE-1: none);
    `output_norm` the norm behind the last layer (Meta's drafts: yes). `draft_vocab_size` None means
    that the draft proposes from the target's whole vocabulary.
    """

    layer: LlamaConfig
    feature_width: int
    input_norm: bool = False
    output_norm: bool = True
    fc_bias: bool = False
    draft_vocab_size: int | None = None

    @classmethod
    def for_target(cls, target: LlamaConfig, *, num_layers: int = 1, **options) -> "DraftConfig":
        """A draft whose layers have the target's own shape."""
        layer = dataclasses.replace(target, num_layers=num_layers)
        return cls(layer=layer, feature_width=target.hidden_size, **options)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `from_dict` reads it back to an equal config."""
        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "layer"
        }
        return self.layer.to_hf() | {"architectures": ["EagleLlamaForCausalLM"], "eagle": own}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, dtype: str = "float32") -> "DraftConfig":
        """Reads what `to_dict` wrote. An unknown key under "eagle" raises ConfigError."""
        own = dict(data.get("eagle") or {})
        unknown = set(own) - {field.name for field in dataclasses.fields(cls)}
        if unknown or "feature_width" not in own:
            raise ConfigError(
                f"draft config: unknown keys {sorted(unknown)}"
                if unknown
                else "not an EAGLE draft: config.json has no 'eagle' section"
            )
        layer = LlamaConfig.from_hf({**data, "architectures": ["LlamaForCausalLM"]}, dtype=dtype)
        return cls(layer=layer, **own)


def _as_ids(value) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)


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
