"""From the configuration to a service: models, tokenizer, trees, the size of the KV cache."""

import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from jax_eagle import hub, load_draft, load_target
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.draft import Draft
from jax_eagle.llama import Target
from jax_eagle.sharding import make_mesh
from jax_eagle.tokenizer import Tokenizer
from jax_eagle.tree import AUTO_TREES, parse_tree

from . import log
from .api import Api
from .config import ServerConfig
from .device import EngineConfig
from .dispatch import PLAIN, Ladder, Programs
from .engine import Engine
from .service import Service
from .translation import read_defaults

CPU_CACHE_BYTES = 2 * 2**30
"""Of the KV cache on a machine without a GPU, unless --num-gpu-blocks-override says otherwise."""


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What an engine is made for unless flags say otherwise."""

    slots: int
    """Sequences decoded together."""
    buckets: tuple[int, ...]
    """Batch sizes to compile, besides that number."""
    chunk_sizes: tuple[int, ...]
    tokens_per_step: int


CAPACITIES = {
    "cpu": Capacity(16, (1, 4, 8), (64, 256), 256),
    "gpu": Capacity(64, (1, 4, 16, 32), (256, 2048), 2048),
}
"""By platform. On a CPU prefill is slow, so steps are short; each program is start-up time."""


def _capacity() -> Capacity:
    return CAPACITIES.get(jax.default_backend(), CAPACITIES["gpu"])


def load(config: ServerConfig, api: Api) -> None:
    """Loads everything and attaches the service to `api`; it still has to be started.

    Raises:
      ValueError, OSError: files or settings that cannot be used; the message says which.
    """
    enable_compilation_cache()
    mesh = make_mesh(config.tensor_parallel_size) if config.tensor_parallel_size > 1 else None
    dtype = None if config.dtype == "auto" else config.dtype
    target = load_target(config.model, dtype=dtype, mesh=mesh).pack()
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise ValueError(f"{config.model}: has no tokenizer, which a server of text needs")
    if config.chat_template is not None:
        tokenizer = with_template(tokenizer, config.chat_template)
    draft = _draft(config, target)
    service = Service(
        Engine(target, draft, engine_config(config, target, draft)),
        tokenizer,
        max_queued_requests=config.max_num_queued_reqs,
        max_queued_tokens=config.max_num_queued_tokens,
        on_program=lambda name, seconds: log.event("compiled", program=name, seconds=seconds),
    )
    neutral = config.generation_config == "vllm"
    api.attach(service, {} if neutral else read_defaults(hub.resolve(config.model)))


def _draft(config: ServerConfig, target: Target) -> Draft | None:
    wanted = config.speculative_config
    if wanted is None:
        return None
    name = hub.DRAFTS.get(config.model) if wanted.model == "auto" else wanted.model
    if name is None:
        raise ValueError(
            f"no draft is known for {config.model}: give --speculative-config "
            '\'{"model": "DRAFT"}\', or --speculative-config none'
        )
    return load_draft(name, target).pack()


def engine_config(config: ServerConfig, target: Target, draft: Draft | None) -> EngineConfig:
    """The engine's settings.

    Raises:
      ValueError: settings that do not fit the model or each other.
    """
    longest = target.config.max_position
    length = config.max_model_len or longest
    if length > longest:
        raise ValueError(f"--max-model-len is {length}, this model's context holds {longest}")
    own = _capacity()
    tokens = config.max_num_batched_tokens or own.tokens_per_step
    chunks = [size for size in own.chunk_sizes if size <= tokens]
    programs = Programs(ladder(config, draft), buckets(config))
    pages = num_pages(config, target, draft, programs.buckets[-1], length)
    room = (pages - 1) * config.block_size
    if config.max_model_len is not None and room < length:
        raise ValueError(
            f"--max-model-len is {length}, the KV cache has room for {room} tokens: lower it, or "
            "give more memory or --num-gpu-blocks-override"
        )
    return EngineConfig(
        max_model_len=min(length, room),
        programs=programs,
        num_pages=pages,
        page_size=config.block_size,
        prefix_caching=config.enable_prefix_caching,
        chunk_sizes=tuple(chunks) or (tokens,),
        tokens_per_step=tokens,
    )


def ladder(config: ServerConfig, draft: Draft | None) -> Ladder:
    """Trees by number of running sequences."""
    if draft is None or config.speculative_config is None:
        return ((None, PLAIN),)
    wanted = config.speculative_config.tree
    if wanted == ((None, "auto"),):
        return AUTO_TREES.get(jax.default_backend(), AUTO_TREES["gpu"])
    for _, tree in wanted:
        if tree == "auto":
            raise ValueError("--speculative-config: the tree auto stands alone, in no list")
        parse_tree(tree)
    return wanted


def buckets(config: ServerConfig) -> tuple[int, ...]:
    """Batch sizes to compile; the last one is --max-num-seqs."""
    own = _capacity()
    most = config.max_num_seqs or own.slots
    sizes = set(config.batch_buckets) or {size for size in own.buckets if size < most}
    if max(sizes, default=most) > most:
        raise ValueError(f"--batch-buckets holds {max(sizes)}, but --max-num-seqs is {most}")
    return tuple(sorted(sizes | {most}))


def num_pages(
    config: ServerConfig, target: Target, draft: Draft | None, slots: int, length: int
) -> int:
    """Pages of the cache: those of all slots at full length, or what memory has room for.

    The trash page counts.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override + 1
    layers = [target.config] + ([draft.config.layer] if draft is not None else [])
    page_bytes = config.block_size * sum(
        2 * c.num_layers * c.num_kv_heads * c.head_dim * jnp.dtype(c.dtype).itemsize for c in layers
    )
    needed = slots * -(-length // config.block_size)
    room = _cache_bytes(config) * config.tensor_parallel_size // page_bytes
    if room < 1:
        raise ValueError("no memory is left for the KV cache: raise --gpu-memory-utilization")
    return min(needed, room) + 1


def _cache_bytes(config: ServerConfig) -> int:
    """Memory for the cache, on each device."""
    memory = jax.devices()[0].memory_stats()
    if jax.default_backend() == "cpu" or not memory:
        return CPU_CACHE_BYTES
    return int(memory["bytes_limit"] * config.gpu_memory_utilization) - memory["bytes_in_use"]


def with_template(tokenizer: Tokenizer, path: str) -> Tokenizer:
    """The same tokenizer with the chat template of a file.

    Raises:
      OSError: the file cannot be read.
    """
    template = Path(path).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        (Path(folder) / "chat_template.jinja").write_text(template, encoding="utf-8")
        return Tokenizer.from_folder(folder)
