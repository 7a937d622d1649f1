"""What some Llama models have and others lack: parts of a `LlamaConfig`, which holds the sizes."""

import dataclasses


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
