"""Frozen model configurations. They are hashable, so they are static under jit.

One reader for each file form: `LlamaConfig.from_hf` (config.json; old and new RoPE fields) and
`DraftConfig.from_dict`. GGUF metadata is translated to the HF form by its loader, so there is one
place where defaults live.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

LLAMA4 = "llama4_text"
"""Hugging Face's model type of the text part of Llama 4."""
_ARCHITECTURES = {"llama": "LlamaForCausalLM", LLAMA4: "Llama4ForCausalLM"}
_LLAMA4_DEFAULTS = {  # of Hugging Face's class: what a config.json may leave out
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "moe_layers": None,
    "interleave_moe_layer_step": 1,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}


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
class Llama4Attention:
    """What attention in Llama 4 has beyond Llama 3; it alternates between two kinds of layers.

    Rotary layers use RoPE and see only their own chunk of positions. The others (NoPE) do not
    rotate and see everything, with queries that grow slowly with the position.
    """

    nope_layers: tuple[int, ...]
    """Layers without RoPE."""
    chunk: int | None = 8192
    """Rotary layers: positions i and j see each other only if i // chunk == j // chunk."""
    qk_norm: bool = True
    """Rotary layers: queries and keys have an RMS norm per head, without a weight."""
    floor_scale: int | None = 8192
    """NoPE layers: the query at position i is multiplied by
    1 + attn_scale * ln(1 + (i + 1) // floor_scale); None: by nothing."""
    attn_scale: float = 0.1

    def __post_init__(self):
        for name, value in (("chunk", self.chunk), ("floor_scale", self.floor_scale)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}: expected a number of positions, or none")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A dense Llama decoder (Llama 2, Llama 3.x, Llama 4 and what shares their architecture)."""

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
    llama4: Llama4Attention | None = None
    """None: Llama 3. Given: the layers, the file format and `to_hf` are those of Llama 4."""

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} attention heads are not a multiple of "
                f"{self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        if self.llama4 is not None:  # a config cut to its first layers keeps what they have
            kept = tuple(i for i in self.llama4.nope_layers if i < self.num_layers)
            cut = dataclasses.replace(self.llama4, nope_layers=kept)
            object.__setattr__(self, "llama4", cut)

    def uses_rope(self, layer: int) -> bool:
        """Whether a layer rotates its queries and keys."""
        return self.llama4 is None or layer not in self.llama4.nope_layers

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], *, dtype: str = "float32") -> "LlamaConfig":
        """Reads a Hugging Face config.json of model type "llama" or, without MoE, "llama4_text".

        Raises:
          ConfigError: another architecture, a missing field, an unknown RoPE type, MoE layers.
        """
        is_llama4 = _model_type(hf) == LLAMA4
        if is_llama4:
            hf = {**_LLAMA4_DEFAULTS, **hf}
        if hf.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act {hf['hidden_act']!r} is not supported: expected 'silu'")
        try:
            heads = int(hf["num_attention_heads"])
            hidden = int(hf["hidden_size"])
            theta, scaling = _rope_from_hf(hf)
            return cls(
                vocab_size=int(hf["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(
                    hf["intermediate_size_mlp" if is_llama4 else "intermediate_size"]
                ),
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
                llama4=_llama4_from_hf(hf) if is_llama4 else None,
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
        kind = "llama" if self.llama4 is None else LLAMA4
        fields = {
            "architectures": [_ARCHITECTURES[kind]],
            "model_type": kind,
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
        if (own := self.llama4) is None:
            return fields
        return fields | {
            "intermediate_size_mlp": self.intermediate_size,
            "moe_layers": [],
            "no_rope_layers": [int(self.uses_rope(i)) for i in range(self.num_layers)],
            "attention_chunk_size": own.chunk,
            "use_qk_norm": own.qk_norm,
            "attn_temperature_tuning": own.floor_scale is not None,
            "floor_scale": own.floor_scale or _LLAMA4_DEFAULTS["floor_scale"],
            "attn_scale": own.attn_scale,
        }


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """An EAGLE draft: FC, then dense decoder layers.

    EAGLE: FC over (embedding of a token, feature before it); its output is fed back as the next
    feature. EAGLE-3 (`taps` are given): FC over tapped residual streams of the target, and a first
    layer whose attention reads (normed embedding, normed state) side by side.
    """

    layer: LlamaConfig
    """Shape of the draft's layers; `vocab_size` is the target's."""
    feature_width: int
    """Width of what the target hands over: its hidden size, EAGLE-3: that times the taps."""
    input_norm: bool = False
    """EAGLE: a norm in front of the first layer's attention (official EAGLE-1: none)."""
    output_norm: bool = True
    """The output that the next pass takes is normed (Meta's drafts; "norm_output" of EAGLE-3.1).
    EAGLE-3 drafts without it still norm in front of their head."""
    fc_bias: bool = False
    draft_vocab_size: int | None = None
    """Tokens the draft proposes from; None: the target's whole vocabulary."""
    taps: tuple[int, ...] = ()
    """EAGLE-3: the layers whose incoming residual streams are the features, low to high."""
    own_embedding: bool = False
    """The draft has an embedding of its own; it must where its width is not the target's."""
    own_head: bool = False
    """The draft has a head of its own, over the draft vocabulary."""
    norm_before_residual: bool = False
    """EAGLE-3: the first layer's residual is the normed state."""
    feature_norm: str | None = None
    """EAGLE-3: norm in front of FC, "joint" over all taps or one "each"."""

    def __post_init__(self):
        if self.feature_norm not in (None, "joint", "each"):
            raise ConfigError(f"feature_norm {self.feature_norm!r}: expected 'joint' or 'each'")
        if self.taps and self.feature_width == self.layer.hidden_size:
            raise ConfigError("EAGLE-3 taps as wide together as the draft: FC could not be told")

    @property
    def is_eagle3(self) -> bool:
        """Whether features are tapped residual streams."""
        return bool(self.taps)

    @classmethod
    def for_target(cls, target: LlamaConfig, *, num_layers: int = 1, **options) -> "DraftConfig":
        """An EAGLE draft whose layers have the target's own shape."""
        layer = dataclasses.replace(target, num_layers=num_layers)
        return cls(layer=layer, feature_width=target.hidden_size, **options)

    @classmethod
    def eagle3_for_target(
        cls,
        target: LlamaConfig,
        *,
        num_layers: int = 1,
        taps: tuple[int, ...] | None = None,
        **options,
    ) -> "DraftConfig":
        """An EAGLE-3 draft with an own head; taps None: layers 2, L // 2 and L - 3."""
        taps = default_taps(target.num_layers) if taps is None else taps
        layer = dataclasses.replace(target, num_layers=num_layers, tie_embeddings=False)
        width = len(taps) * target.hidden_size
        own: dict[str, Any] = {"output_norm": False, "own_head": True} | options
        return cls(layer=layer, feature_width=width, taps=taps, **own)

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
        own: dict[str, Any] = dict(data.get("eagle") or {})
        unknown = set(own) - {field.name for field in dataclasses.fields(cls)}
        if unknown or "feature_width" not in own:
            raise ConfigError(
                f"draft config: unknown keys {sorted(unknown)}"
                if unknown
                else "not an EAGLE draft: config.json has no 'eagle' section"
            )
        layer = LlamaConfig.from_hf({**data, "architectures": ["LlamaForCausalLM"]}, dtype=dtype)
        own["taps"] = tuple(own.get("taps", ()))
        return cls(layer=layer, **own)


def default_taps(num_layers: int) -> tuple[int, ...]:
    """The layers that EAGLE-3 taps: early, middle and late (official code).

    Raises:
      ConfigError: a target too shallow to have three of them.
    """
    taps = 2, num_layers // 2, num_layers - 3
    if not taps[0] < taps[1] < taps[2]:
        raise ConfigError(f"a target of {num_layers} layers: name the taps, low to high")
    return taps


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


def _llama4_from_hf(hf: Mapping[str, Any]) -> Llama4Attention:
    """The Llama 4 fields of a config.json that has the defaults filled in."""
    L, step = int(hf["num_hidden_layers"]), hf["interleave_moe_layer_step"]
    moe_layers = hf["moe_layers"]
    if moe_layers is None:
        moe_layers = list(range(step - 1, L, step))
    if moe_layers:
        raise ConfigError(f"MoE layers are not supported yet: moe_layers {moe_layers}, expected []")
    # 1 is a layer with RoPE, in spite of the name; an empty list says nothing.
    interval = hf["no_rope_layer_interval"]
    rotates = hf["no_rope_layers"] or [(i + 1) % interval for i in range(L)]
    if len(rotates) != L:
        raise ConfigError(f"no_rope_layers has {len(rotates)} entries for {L} layers")
    kinds = ["chunked_attention" if rope else "full_attention" for rope in rotates]
    if hf.get("layer_types") not in (None, kinds):
        raise ConfigError("layer_types: expected chunked attention in the layers with RoPE alone")
    chunk = hf["attention_chunk_size"]
    return Llama4Attention(
        nope_layers=tuple(i for i in range(L) if not rotates[i]),
        chunk=None if chunk is None else int(chunk),
        qk_norm=bool(hf["use_qk_norm"]),
        floor_scale=int(hf["floor_scale"]) if hf["attn_temperature_tuning"] else None,
        attn_scale=float(hf["attn_scale"]),
    )


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
