"""Frozen model configurations. They are hashable, so they are static under jit.

One reader for each file form: `LlamaConfig.from_hf` (config.json, see `hf_config`) and
`DraftConfig.from_dict`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .architecture import ConfigError as ConfigError
from .architecture import Llama4Attention as Llama4Attention
from .architecture import MoE as MoE
from .architecture import RopeScaling as RopeScaling
from .hf_config import read_fields, write_fields
from .quantization import Quantization, Stored

KV_DTYPES = {"auto": None, "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}
"""Names of `LlamaConfig.kv_dtype` (vLLM's); None: that of the model."""


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
        if self.dtype == "float16" and (self.moe or self.quantization):
            what = "experts" if self.moe else "quantised weights"
            raise ConfigError(f"{what} in float16: expected dtype bfloat16 or float32")
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
        return cls(**read_fields(hf), dtype=dtype)

    def to_hf(self) -> dict[str, Any]:
        """The config.json that `from_hf` reads back to an equal config."""
        return write_fields(vars(self))


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
