"""What a model takes on a mesh, told from its configs alone: nothing is allocated.

Bytes are those of the real parameters, as abstract arrays, under their real shardings; no device of
the mesh has to be there. Times are floors (`roofline`).
"""

import dataclasses
from collections import Counter
from typing import Any

from jax.sharding import Mesh

from . import hub
from .cache import cached_bytes, token_bytes
from .checkpoint import gguf, hf
from .checkpoint.files import read_json
from .config import KV_DTYPES, ConfigError, DraftConfig, LlamaConfig
from .deployment import Deployment
from .draft import Draft
from .eagle import abstract_draft_params
from .llama import Target, abstract_params
from .load import check_fit
from .memory import device_bytes, size_text
from .quantize import quantized
from .roofline import Accelerator, Floor, Roofline, WeightBytes, Weights
from .sharding import TENSOR, data_size, fit
from .tree import PLAIN, TreeShape, parse_tree

CONTEXT = 8192
"""Tokens of the sequences that are planned for, unless the deployment says otherwise."""


@dataclasses.dataclass(frozen=True)
class RoundFloor:
    """The least time of one round, and of the plain step that it competes with."""

    batch: int
    """Sequences on all devices together."""
    tree: str
    step_seconds: float
    round_seconds: float
    """Drafting and verification."""

    @property
    def break_even(self) -> float:
        """The acceptance length from which on the round is faster."""
        return self.round_seconds / self.step_seconds


@dataclasses.dataclass(frozen=True)
class Share:
    """What one device holds of a network, in bytes."""

    config: Any
    """LlamaConfig of a target, DraftConfig of a draft."""
    groups: dict[str, int]
    """Of the parameters."""
    token: int
    """Of cached keys and values, for one token."""
    per_weight: WeightBytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """A deployment on a mesh; bytes are those of one device."""

    deployment: Deployment
    mesh: Mesh
    roofline: Roofline
    memory: float
    target: Share
    draft: Share | None
    length: int
    """Tokens of the longest sequence."""

    @property
    def weights(self) -> dict[str, int]:
        """By group; the draft is one."""
        if self.draft is None:
            return self.target.groups
        return self.target.groups | {"draft": sum(self.draft.groups.values())}

    @property
    def token_bytes(self) -> int:
        """Of cached keys and values for one token, in target and draft."""
        return self.target.token + (0 if self.draft is None else self.draft.token)

    @property
    def usable(self) -> float:
        """What weights and cache may take; activations and logits live in the rest."""
        return self.memory * self.deployment.gpu_memory_utilization

    @property
    def weight_bytes(self) -> int:
        """Of all groups."""
        return sum(self.weights.values())

    @property
    def pages(self) -> int:
        """Pages that fit, without the one for trash."""
        room = self.usable - self.weight_bytes
        return max(0, int(room // (self.token_bytes * self.deployment.block_size)) - 1)

    @property
    def num_tokens(self) -> int:
        """Tokens that fit into the caches of all data-parallel ranks together."""
        return self.pages * self.deployment.block_size * data_size(self.mesh)

    @property
    def num_sequences(self) -> int:
        """Sequences of full length that fit there."""
        return self.pages // self._pages_for(self.length) * data_size(self.mesh)

    @property
    def needed(self) -> int:
        """The weights, one sequence of full length, the trash page."""
        pages = self._pages_for(self.length) + 1
        return self.weight_bytes + pages * self.token_bytes * self.deployment.block_size

    def has_room_for(self, batch: int) -> bool:
        """Whether so many sequences of `context` tokens fit, spread over the ranks."""
        return self._each(batch) * self._pages_for(self.context) <= self.pages

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.deployment.block_size)

    def _each(self, batch: int) -> int:
        """Sequences of one data-parallel rank."""
        return -(-batch // data_size(self.mesh))

    @property
    def context(self) -> int:
        """Cached tokens of the sequences whose rounds are timed."""
        return min(CONTEXT, self.length)

    def floor(self, batch: int) -> RoundFloor:
        """Of so many sequences, spread evenly over the data-parallel ranks."""
        name = PLAIN if self.draft is None else self.deployment.tree(batch)
        shape = parse_tree(name)
        each = self._each(batch)

        def verify(nodes: int) -> Floor:
            own = self.target
            return self.roofline.step(
                own.config, batch=each, nodes=nodes, context=self.context, weights=own.per_weight
            )

        step, rounds = verify(1), verify(shape.num_nodes)
        if (its := self.draft) is not None:
            rounds += self.roofline.drafting(
                its.config, batch=each, context=self.context, rows=draft_rows(shape),
                weights=its.per_weight,
            )  # fmt: skip
        return RoundFloor(batch, name, step.seconds, rounds.seconds)

    def check(self) -> None:
        """Raises ConfigError, in one line what is needed and what is there, unless it fits."""
        if self.needed <= self.usable:
            return
        weights, cache = map(size_text, (self.weight_bytes, self.needed - self.weight_bytes))
        raise ConfigError(
            f"{self.deployment.model} does not fit: each of {self.mesh.size} devices needs "
            f"{size_text(self.needed)} ({weights} for weights, {cache} to cache a sequence of "
            f"{self.length:,} tokens), there are {self.usable_text}; "
            "take more devices, weights of fewer bits or shorter sequences"
        )

    @property
    def usable_text(self) -> str:
        """What may be taken, and of what."""
        share = f"{100 * self.deployment.gpu_memory_utilization:g} %"
        return f"{size_text(self.usable)} ({share} of {size_text(self.memory)})"


def make_plan(deployment: Deployment, mesh: Mesh, accelerator: Accelerator, memory: float) -> Plan:
    """What `deployment` takes; `Plan.check` tells whether that is there.

    Args:
      mesh: axes "tensor" and, with several copies of the model, "data" (`deployment.read_mesh`).
      memory: bytes of one device.

    Raises:
      ConfigError, CheckpointError: a model or a draft that cannot be used or does not divide over
        the mesh, or sequences longer than the model takes.
    """
    target, draft = read_configs(deployment)
    length = deployment.max_model_len or min(CONTEXT, target.max_position)
    if length > target.max_position:
        raise ConfigError(
            f"{deployment.model}: max-model-len is {length}, "
            f"this model's context holds {target.max_position}"
        )
    own = target_share(target, mesh, deployment.enable_expert_parallel)
    return Plan(
        deployment,
        mesh,
        Roofline(accelerator, mesh.shape[TENSOR], cached_bytes(target)),
        memory,
        own,
        None if draft is None else draft_share(draft, mesh, own.per_weight.head),
        length,
    )


def read_configs(deployment: Deployment) -> tuple[LlamaConfig, DraftConfig | None]:
    """Of target and draft, with weights and cache stored as the deployment says."""
    if deployment.kv_cache_dtype not in KV_DTYPES:
        raise ConfigError(
            f"kv-cache-dtype is {deployment.kv_cache_dtype!r}, expected one of "
            f"{', '.join(KV_DTYPES)}"
        )
    kv = {"kv_dtype": KV_DTYPES[deployment.kv_cache_dtype]}
    target = quantized(read_target(deployment.model, deployment.dtype), deployment.quantization)
    target = dataclasses.replace(target, **kv)
    if deployment.draft is None:
        return target, None
    draft = read_draft(deployment.draft, deployment.dtype)
    check_fit(Draft(None, None, draft), Target(None, target), deployment.draft)
    layer = quantized(draft.layer, deployment.draft_quantization)
    return target, dataclasses.replace(draft, layer=dataclasses.replace(layer, **kv))


def read_target(name: str, dtype: str) -> LlamaConfig:
    """The config of a target whose weights need not be here. Errors as `load_target`."""
    path = hub.resolve(name, weights=False)
    if path.is_file():
        metadata, tensors = gguf.read_file(path)
        return LlamaConfig.from_hf(gguf.hf_config(metadata, tensors, path), dtype=dtype)
    return hf.read_config(path, dtype=dtype)


def read_draft(name: str, dtype: str) -> DraftConfig:
    """The config of a draft in our own form; what others are, their tensors tell."""
    path = hub.resolve(name, weights=False)
    try:
        return DraftConfig.from_dict(read_json(path / "config.json"), dtype=dtype)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def draft_rows(shape: TreeShape) -> tuple[int, ...]:
    """Rows of each pass of the draft, for one sequence: a path to sync, then the frontiers."""
    frontiers = tuple(max(level.frontier_row) + 1 for level in shape.levels[1:])
    return (shape.max_depth + 1, *frontiers) if shape.levels else ()


# ---- one device's share of a network ------------------------------------------------------------


def target_share(config: LlamaConfig, mesh: Mesh, expert_parallel: bool = False) -> Share:
    """What one device of the mesh holds of a target."""
    fitted = fit(config, mesh, expert_parallel=expert_parallel)
    groups = device_bytes(abstract_params(fitted), mesh, expert_parallel=expert_parallel)
    head = groups["head"] or groups["embedding"]  # tied
    per_weight = _per_weight(groups, head, Weights.of(config), mesh)
    return Share(config, groups, token_bytes(fitted, mesh), per_weight)


def draft_share(draft: DraftConfig, mesh: Mesh, target_head: float) -> Share:
    """What one device holds of a draft; `target_head`: bytes of one weight of the target's head."""
    layer, own = draft.layer, draft.draft_vocab_size
    kv_heads = fit(
        dataclasses.replace(layer, vocab_size=own or layer.vocab_size), mesh
    ).num_kv_heads
    fitted = dataclasses.replace(layer, num_kv_heads=kv_heads)
    groups = device_bytes(abstract_draft_params(dataclasses.replace(draft, layer=fitted)), mesh)
    count, head = Weights.of_draft(draft), groups["head"]
    if not draft.own_head:
        head = int(count.head * target_head) // mesh.shape[TENSOR]
        if own is not None:  # the rows of the target's head are copied
            groups["head"] = head
    per_weight = _per_weight(groups, head, count, mesh)
    return Share(draft, groups, token_bytes(fitted, mesh), per_weight)


def _per_weight(groups: Counter[str], head: int, count: Weights, mesh: Mesh) -> WeightBytes:
    """Bytes of one weight, from the bytes of its group on each device."""

    def each(num_bytes: int, num_weights: int) -> float:
        return num_bytes * mesh.shape[TENSOR] / max(1, num_weights)

    return WeightBytes(
        attention=each(groups["attention"], count.attention),
        mlp=each(groups["dense FFN"] + groups["shared experts"], count.mlp),
        experts=each(groups["routed experts"], count.experts),
        head=each(head, count.head),
    )
