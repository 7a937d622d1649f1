"""The least time that a round can take on given accelerators: a floor, not a forecast.

A forward is cut into classes of work: dense matrix products, routed experts, attention. Each takes
the longer of reading its bytes once and doing its arithmetic; the classes run one after another, so
their times add up, and those of the all-reduces with them. Every weight matrix is read once, of the
routed experts as many as independent tokens hit on average; cached keys and values are read once
for all nodes of a sequence. Weights of fewer bits are dequantised inside the products, which run at
bfloat16's peak. Left out: prefill, activations and norms, sampling, launches, and an uneven load of
experts.
"""

import dataclasses
from collections.abc import Sequence

from .config import DraftConfig, LlamaConfig

_UNTOUCHED = 2
"""Bytes of one weight of a router or of FC, which stay in bfloat16."""


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """The limits of one GPU among its like."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes a second."""
    flops: float
    """Of matrix products in bfloat16, a second."""
    link: float
    """To all others together, bytes a second in one direction."""
    latency: float
    """Seconds that a small all-reduce takes; an assumption, plausible from 2e-6 to 8e-6."""
    source: str


H100 = Accelerator(
    "H100", 80e9, 3.35e12, 989e12, 450e9, 3e-6, "NVIDIA's data sheet of the SXM5 card, dense FLOPs"
)
H200 = Accelerator(
    "H200", 141e9, 4.3e12, 790e12, 450e9, 3e-6,
    "copies and bfloat16 products as measured on one card; memory and links by the data sheet",
)  # fmt: skip
ACCELERATORS = {"h100": H100, "h200": H200}


@dataclasses.dataclass(frozen=True)
class Weights:
    """How many weights a network has, by group, all layers together. Norms and biases: none."""

    attention: int
    mlp: int
    """Of dense layers and of shared experts."""
    head: int
    router: int = 0
    experts: int = 0
    """All routed ones."""
    fc: int = 0
    """Of a draft."""

    @classmethod
    def of(cls, config: LlamaConfig) -> "Weights":
        """Of a target. Its embedding, which is looked up, has as many as its head."""
        c, D = config, config.hidden_size
        moe_layers = 0 if c.moe is None else len(c.moe.layers)
        mlp, router, experts = (c.num_layers - moe_layers) * 3 * D * c.intermediate_size, 0, 0
        if c.moe is not None:
            expert = 3 * D * c.moe.intermediate_size
            mlp += moe_layers * expert
            router = moe_layers * D * c.moe.num_experts
            experts = moe_layers * c.moe.num_experts * expert
        attention = c.num_layers * 2 * D * (c.num_heads + c.num_kv_heads) * c.head_dim
        return cls(attention, mlp, D * c.vocab_size, router, experts)

    @classmethod
    def of_draft(cls, draft: DraftConfig) -> "Weights":
        """Of a draft, with those rows of the target's head that it uses."""
        layer, D = draft.layer, draft.layer.hidden_size
        count, inputs = cls.of(layer), draft.feature_width
        attention = count.attention
        if draft.is_eagle3:  # its first layer reads two states side by side
            attention += D * (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
        else:
            inputs += D
        head = D * (draft.draft_vocab_size or layer.vocab_size)
        return cls(attention, count.mlp, head, fc=inputs * D)

    @property
    def every_token(self) -> int:
        """Those that every token meets, FC left out."""
        return self.attention + self.mlp + self.router + self.head


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """Bytes of one weight by group, scales included."""

    attention: float = 2
    mlp: float = 2
    experts: float = 2
    head: float = 2


@dataclasses.dataclass(frozen=True)
class Floor:
    """Seconds by class of work."""

    dense: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    collectives: float = 0.0

    @property
    def seconds(self) -> float:
        """All classes, one after another."""
        return self.dense + self.experts + self.attention + self.collectives

    def __add__(self, other: "Floor") -> "Floor":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Floor(*(a + b for a, b in pairs))


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Devices that share each layer of a model, and what they read."""

    accelerator: Accelerator
    devices: int = 1
    """Of one tensor-parallel group."""
    cache_bytes: float = 2
    """Bytes of one cached number."""

    def step(
        self,
        config: LlamaConfig,
        *,
        batch: int,
        context: int,
        nodes: int = 1,
        weights: WeightBytes = WeightBytes(),  # noqa: B008 (frozen)
    ) -> Floor:
        """One forward of the target over `nodes` nodes of each of `batch` sequences.

        Args:
          context: cached tokens of a sequence.
          nodes: 1 is plain decoding.
        """
        count, n = Weights.of(config), batch * nodes
        floor = Floor(
            dense=self._shared(_dense_bytes(count, weights), 2 * n * count.every_token),
            attention=self._attention(config, batch, n, context),
            collectives=self._collectives(config, n),
        )
        if (moe := config.moe) is None:
            return floor
        hit = distinct_experts(moe.num_experts, moe.experts_per_token, n) / moe.num_experts
        active = count.experts * moe.experts_per_token / moe.num_experts
        experts = self._shared(hit * count.experts * weights.experts, 2 * n * active)
        return dataclasses.replace(floor, experts=experts)

    def drafting(
        self,
        draft: DraftConfig,
        *,
        batch: int,
        context: int,
        rows: Sequence[float],
        weights: WeightBytes = WeightBytes(),  # noqa: B008 (frozen)
    ) -> Floor:
        """The draft's passes of one round: the sync pass, then one for each deeper level.

        Args:
          rows: of each pass, for one sequence.
        """
        c, count, total = draft.layer, Weights.of_draft(draft), Floor()
        for number, own in enumerate(rows):
            n = batch * own
            # The states of its later passes skip the FC of EAGLE-3.
            fc = count.fc if number == 0 or not draft.is_eagle3 else 0
            total += Floor(
                dense=self._shared(
                    _dense_bytes(count, weights) + fc * _UNTOUCHED, 2 * n * (count.every_token + fc)
                ),
                attention=self._attention(c, batch, n, context),
                collectives=self._collectives(c, n),
            )
        return total

    def _shared(self, num_bytes: float, flops: float) -> float:
        """Work that all devices share evenly."""
        a = self.accelerator
        return max(num_bytes / a.bandwidth, flops / a.flops) / self.devices

    def _attention(self, config: LlamaConfig, batch: int, n: float, context: int) -> float:
        seen = seen_tokens(config, context)
        # More devices than KV heads: each has a whole one.
        kv_heads = max(config.num_kv_heads, self.devices)
        numbers = 2 * kv_heads * config.head_dim * (batch * seen + n * config.num_layers)
        return self._shared(
            numbers * self.cache_bytes, 4 * n * config.num_heads * config.head_dim * seen
        )

    def _collectives(self, config: LlamaConfig, n: float) -> float:
        """Two all-reduces a layer of n bfloat16 states, and one of the best tokens at the end."""
        if self.devices == 1:
            return 0.0
        a, P = self.accelerator, self.devices
        seconds = 2 * n * config.hidden_size / a.link
        at_once = a.latency + (P - 1) * seconds  # each device sends all it has to all others
        in_two = 2 * a.latency + 2 * (P - 1) / P * seconds  # reduce-scatter, then all-gather
        return 2 * config.num_layers * min(at_once, in_two) + a.latency


def _dense_bytes(count: Weights, each: WeightBytes) -> float:
    """Of what every token meets, FC left out."""
    dense = count.attention * each.attention + count.mlp * each.mlp + count.head * each.head
    return dense + count.router * _UNTOUCHED


def distinct_experts(num_experts: int, experts_per_token: int, num_tokens: float) -> float:
    """How many experts of a layer independent tokens hit on average, each as likely."""
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** num_tokens)


def seen_tokens(config: LlamaConfig, context: int) -> int:
    """Cached tokens that a new one sees, summed over layers; chunks count as full."""
    if config.llama4 is None or config.llama4.chunk is None:
        return config.num_layers * context
    whole = sum(not config.uses_rope(i) for i in range(config.num_layers))
    return whole * context + (config.num_layers - whole) * min(context, config.llama4.chunk)
