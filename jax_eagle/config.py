"""Frozen model configurations. They are hashable, so they are static under jit.

One reader for each file form: `LlamaConfig.from_hf` (config.json; old and new RoPE fields) and
`DraftConfig.from_dict`. GGUF metadata is translated to the HF form by its loader, so there is one
place where defaults live.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

LLAMA4 = "llama4_text"
"""Hugging Face's model type of the text part of Llama 4."""
_MULTIMODAL = "llama4"
"""Its model type of the whole, whose "text_config" describes the text part."""
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    LLAMA4: "Llama4ForCausalLM",
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
class MoE:
    """Layers of Llama 4 with a router, experts of which each token takes a few, and a shared one.

    The dense layers between them have the width `LlamaConfig.intermediate_size`.
    """

    num_experts: int
    experts_per_token: int
    layers: tuple[int, ...]
    """Layers with experts; the others are dense."""
    intermediate_size: int
    """Of each expert, and of the shared one."""

    def __post_init__(self):
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ConfigError(
                f"{self.experts_per_token} experts per token: expected 1 to {self.num_experts}, "
                "the number of experts"
            )


STORED_DTYPES = {"fp8": "float8_e4m3fn", "int8": "int8", "int4": "uint8"}
"""How weights may be stored, and in which arrays: of int4, two values a byte."""
_GROUPS = ("experts", "mlp", "attention", "head")
_QUANT_METHOD = "jax_eagle"
"""Under which config.json says, in Hugging Face's "quantization_config", that weights are stored
as `Quantization` has it."""
KV_DTYPES = {"auto": None, "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}
"""Names of `LlamaConfig.kv_dtype` (vLLM's); None: that of the model."""


class Stored(NamedTuple):
    """How the kernel of one linear map is stored, beside its scales in float32."""

    scheme: str
    group_size: int
    """int4: the inputs that share a scale, as far as they divide."""

    @property
    def dtype(self) -> str:
        """Of the kernel."""
        return STORED_DTYPES[self.scheme]

    def kernel_shape(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...]):
        """[in..., out...], of int4 the last input axis halved."""
        *outer, last = in_shape
        return *outer, last // 2 if self.scheme == "int4" else last, *out_shape

    def groups(self, num_inputs: int) -> int:
        """Scales of one output: one, or one for each group of inputs.

        A group is the largest part of `group_size` that divides the inputs: 64 of 576.

        Raises:
          ConfigError: groups that are no multiple of 32, which the kernels cannot read.
        """
        if self.scheme != "int4":
            return 1
        size = math.gcd(self.group_size, num_inputs)
        if size % 32:
            raise ConfigError(
                f"int4 in groups of {self.group_size}: {num_inputs} inputs leave groups of {size}, "
                "expected a multiple of 32"
            )
        return num_inputs // size


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which linear maps store their weights in fewer bits, and how; None: as they are.

    "fp8" (e4m3) and "int8" have a scale for each output channel, "int4" one for each group of
    inputs of an output channel; all are symmetric. Norms, biases, routers, embeddings and a draft's
    FC stay as they are.
    """

    experts: str | None = None
    """Routed experts."""
    mlp: str | None = None
    """Dense FFNs and shared experts."""
    attention: str | None = None
    """Queries, keys, values and output."""
    head: str | None = None
    skipped_layers: tuple[int, ...] = ()
    """Layers that stay as they are; Meta's files skip the first and the last."""
    group_size: int = 128
    """int4: inputs that share a scale. See `Stored.groups` for inputs that this does not divide."""

    def __post_init__(self):
        for group in _GROUPS:
            if (scheme := getattr(self, group)) not in (None, *STORED_DTYPES):
                raise ConfigError(
                    f"quantization {group}={scheme}: expected one of {', '.join(STORED_DTYPES)}"
                )
        if self.group_size < 32 or self.group_size % 32:
            raise ConfigError(f"group_size {self.group_size}: expected a multiple of 32, as is 128")

    @classmethod
    def parse(cls, text: str) -> "Quantization":
        """From "fp8" (all linear maps but the head), or such as "mlp=int4,attention=int8".

        Other keys: group_size=64, skipped_layers=0+47.

        Raises:
          ConfigError: another form.
        """
        if text in STORED_DTYPES:
            return cls(experts=text, mlp=text, attention=text)
        given: dict[str, Any] = {}
        for part in text.split(","):
            key, _, value = part.strip().partition("=")
            if key in given or key not in {field.name for field in dataclasses.fields(cls)}:
                raise ConfigError(
                    f"quantization {text!r}: expected {', '.join(STORED_DTYPES)}, or such as "
                    f"experts=fp8,mlp=int4 (of {', '.join(_GROUPS)}, skipped_layers, group_size)"
                )
            given[key] = value
        try:
            if "group_size" in given:
                given["group_size"] = int(given["group_size"])
            if "skipped_layers" in given:
                given["skipped_layers"] = tuple(map(int, given["skipped_layers"].split("+")))
        except ValueError as error:
            raise ConfigError(f"quantization {text!r}: {error}") from None
        return cls(**given)

    def stored(self, group: str, layer: int | None = None) -> Stored | None:
        """How the maps of a group are stored; None: as they are."""
        scheme: str | None = getattr(self, group)
        if scheme is None or layer in self.skipped_layers:
            return None
        return Stored(scheme, self.group_size)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A Llama decoder (Llama 2, Llama 3.x, Llama 4 and what shares their architecture)."""

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
    moe: MoE | None = None
    """None: every layer is dense. Given: some are not, which only Llama 4 knows."""
    quantization: Quantization | None = None
    """Which parameters are stored in fewer bits; None: none."""
    kv_dtype: str | None = None
    """Of cached keys and values, "float8_e4m3fn" or None: that of the model. It belongs to a run,
    not to a checkpoint."""

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} attention heads are not a multiple of "
                f"{self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        # A config cut to its first layers keeps what they have.
        if self.llama4 is not None:
            kept = tuple(i for i in self.llama4.nope_layers if i < self.num_layers)
            cut = dataclasses.replace(self.llama4, nope_layers=kept)
            object.__setattr__(self, "llama4", cut)
        if self.moe is not None:
            if self.llama4 is None:
                raise ConfigError("MoE layers without `llama4`: expected attention of Llama 4")
            kept = tuple(i for i in self.moe.layers if i < self.num_layers)
            cut = dataclasses.replace(self.moe, layers=kept) if kept else None
            object.__setattr__(self, "moe", cut)
        if self.moe is None and self.quantization is not None:
            own = dataclasses.replace(self.quantization, experts=None)
            object.__setattr__(self, "quantization", own)
        if self.tie_embeddings and self.stored("head") is not None:
            raise ConfigError(
                "quantization head: this model's head is its embedding, which stays as it is"
            )
        if self.quantization is not None and self.dtype == "float16":
            raise ConfigError("quantised weights in float16: expected dtype bfloat16 or float32")
        if self.kv_dtype not in KV_DTYPES.values():
            raise ConfigError(f"kv_dtype {self.kv_dtype!r}: expected float8_e4m3fn, or none")

    def stored(self, group: str, layer: int | None = None) -> Stored | None:
        """How the linear maps of a group ("experts", "mlp", "attention", "head") are stored."""
        return None if self.quantization is None else self.quantization.stored(group, layer)

    def uses_rope(self, layer: int) -> bool:
        """Whether a layer rotates its queries and keys."""
        return self.llama4 is None or layer not in self.llama4.nope_layers

    def uses_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of one dense SwiGLU."""
        return self.moe is not None and layer in self.moe.layers

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], *, dtype: str = "float32") -> "LlamaConfig":
        """Reads a Hugging Face config.json of model type "llama", "llama4_text" or "llama4".

        Of the last, which has pictures as well, the text part is read.

        Raises:
          ConfigError: another architecture, a missing field, an unknown RoPE type.
        """
        kind = _model_type(hf)
        if kind == _MULTIMODAL:
            hf, kind = _text_part(hf), LLAMA4
        is_llama4 = kind == LLAMA4
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
                stop_token_ids=token_ids(hf.get("eos_token_id")),
                dtype=dtype,
                llama4=_llama4_from_hf(hf) if is_llama4 else None,
                moe=_moe_from_hf(hf) if is_llama4 else None,
                quantization=_quantization_from_hf(hf),
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
        if self.quantization is not None:
            own_form = {"quant_method": _QUANT_METHOD} | dataclasses.asdict(self.quantization)
            fields["quantization_config"] = own_form
        if (own := self.llama4) is None:
            return fields
        return fields | {
            "intermediate_size_mlp": self.intermediate_size,
            **_moe_to_hf(self.moe, self.num_layers),
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
        if self.layer.moe is not None:
            raise ConfigError("a draft with MoE layers: expected dense ones (moe_layers [])")
        if self.feature_norm not in (None, "joint", "each"):
            raise ConfigError(f"feature_norm {self.feature_norm!r}: expected 'joint' or 'each'")
        if not self.own_head and self.layer.stored("head") is not None:
            raise ConfigError("quantization head: this draft has no head of its own")
        if self.taps and self.feature_width == self.layer.hidden_size:
            raise ConfigError("EAGLE-3 taps as wide together as the draft: FC could not be told")

    @property
    def is_eagle3(self) -> bool:
        """Whether features are tapped residual streams."""
        return bool(self.taps)

    @classmethod
    def for_target(cls, target: LlamaConfig, *, num_layers: int = 1, **options) -> "DraftConfig":
        """An EAGLE draft whose layers have the target's own shape; those of a draft are dense."""
        layer = _draft_layer(target, num_layers)
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
        layer = dataclasses.replace(_draft_layer(target, num_layers), tie_embeddings=False)
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


def _draft_layer(target: LlamaConfig, num_layers: int) -> LlamaConfig:
    """The shape of a target's dense layers, with weights as they are."""
    return dataclasses.replace(target, num_layers=num_layers, moe=None, quantization=None)


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


def _text_part(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the text part of a multimodal config.json."""
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(f"config.json of model type {_MULTIMODAL} lacks the field 'text_config'")
    shared = ("eos_token_id", "tie_word_embeddings")  # where a file may have them outside
    return {**{name: hf[name] for name in shared if name in hf}, **text}


def _llama4_from_hf(hf: Mapping[str, Any]) -> Llama4Attention:
    """The Llama 4 fields of a config.json that has the defaults filled in."""
    L = int(hf["num_hidden_layers"])
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


def _quantization_from_hf(hf: Mapping[str, Any]) -> Quantization | None:
    """What `to_hf` wrote; the forms of other programs are told by their tensors."""
    fields = dict(hf.get("quantization_config") or {})
    if fields.pop("quant_method", None) != _QUANT_METHOD:
        return None
    known = {field.name for field in dataclasses.fields(Quantization)}
    if unknown := sorted(set(fields) - known):
        raise ConfigError(f"quantization_config: unknown keys {unknown}")
    fields["skipped_layers"] = tuple(fields.get("skipped_layers", ()))
    return Quantization(**fields)


def token_ids(value) -> tuple[int, ...]:
    """The ids of a field such as eos_token_id: one, a list or nothing."""
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
