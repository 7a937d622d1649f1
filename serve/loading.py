"""From the configuration to a service: devices, models, tokenizer, trees, the size of the KV cache.

All processes of a server come to the same settings of the engine: from flags that are the same, and
from the least memory that any of them has.
"""

import dataclasses
import hashlib
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jax_eagle import hub, load_draft, load_target
from jax_eagle.cache import token_bytes
from jax_eagle.checkpoint.files import fingerprint
from jax_eagle.compilation_cache import enable_compilation_cache
from jax_eagle.draft import Draft
from jax_eagle.llama import Target
from jax_eagle.quantization import Quantization
from jax_eagle.sharding import make_mesh
from jax_eagle.tokenizer import Tokenizer
from jax_eagle.tree import AUTO_TREES, parse_tree

from . import log
from .api import Api
from .config import ServerConfig
from .device import Device, EngineConfig
from .dispatch import PLAIN, Ladder, Programs
from .engine import Engine
from .lifecycle import Ending
from .service import Service
from .translation import read_defaults

CPU_CACHE_BYTES = 2 * 2**30
"""Of the KV cache on a machine without a GPU, unless --num-gpu-blocks-override says otherwise."""
_MIB = 2**20


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


def load(config: ServerConfig, api: Api, ending: Ending) -> None:
    """Loads everything and attaches the service to `api`; it still has to be started.

    Raises:
      ValueError, OSError: files or settings that cannot be used; the message says which.
    """
    enable_compilation_cache()
    leader = ending.lead(config)
    models = [_models(config, mesh) for mesh in meshes(config)]
    tokenizer = models[0][0].tokenizer
    if tokenizer is None:
        raise ValueError(f"{config.model}: has no tokenizer, which a server of text needs")
    if config.chat_template is not None:
        tokenizer = with_template(tokenizer, config.chat_template)
    configs = [engine_config(config, target, draft) for target, draft in models]
    least = min(configs, key=lambda own: own.num_pages)
    service = Service(
        [Engine(target, draft, least, leader) for target, draft in models],
        tokenizer,
        max_queued_requests=config.max_num_queued_reqs,
        max_queued_tokens=config.max_num_queued_tokens,
        on_program=lambda name, seconds: log.event("compiled", program=name, seconds=seconds),
    )
    neutral = config.generation_config == "vllm"
    api.attach(service, {} if neutral else read_defaults(hub.resolve(config.model)))


def load_device(config: ServerConfig) -> Device:
    """What a follower needs of it. Errors: those of `load`."""
    enable_compilation_cache()
    (mesh,) = meshes(config)
    target, draft = _models(config, mesh)
    return Device(target, draft, engine_config(config, target, draft))


def meshes(config: ServerConfig) -> list[Mesh | None]:
    """The devices of each replica; None: the only one has the first device, and no mesh.

    Of several processes each gives its first devices, the same number of them.

    Raises:
      ValueError: there are too few devices.
    """
    size, replicas = config.tensor_parallel_size, config.data_parallel_size
    needed = size // config.nnodes * replicas
    by_process = [jax.local_devices(process_index=rank) for rank in range(config.nnodes)]
    least = min(map(len, by_process))
    if needed > least:
        each = f" in each of {config.nnodes} processes" if config.nnodes > 1 else ""
        raise ValueError(
            f"--tensor-parallel-size {size} times --data-parallel-size {replicas} needs {needed} "
            f"devices{each}, there {'is' if least == 1 else 'are'} {least}"
        )
    if needed * config.nnodes == 1 and not config.enable_expert_parallel:
        return [None]
    devices = [device for own in by_process for device in own[:needed]]
    return [make_mesh(size, devices[i * size : (i + 1) * size]) for i in range(replicas)]


def _models(config: ServerConfig, mesh: Mesh | None) -> tuple[Target, Draft | None]:
    """The target and its draft, on the devices of a mesh; nothing is read before both are found.

    Several processes see to it that they have the same ones.
    """
    wanted, name, quantization = config.speculative_config, None, None
    paths = [hub.resolve(config.model)]
    if wanted is not None:
        name = hub.DRAFTS.get(config.model) if wanted.model == "auto" else wanted.model
        quantization = wanted.quantization and Quantization.parse(wanted.quantization)
        if name is None:
            raise ValueError(
                f"no draft is known for {config.model}: give --speculative-config "
                '\'{"model": "DRAFT"}\', or --speculative-config none'
            )
        paths.append(hub.resolve(name))
    if config.nnodes > 1:
        _check_same(paths)
    target = load_target(
        config.model,
        dtype=None if config.dtype == "auto" else config.dtype,
        mesh=mesh,
        expert_parallel=config.enable_expert_parallel,
        quantization=config.quantization,
        kv_dtype=config.kv_cache_dtype,
    )
    target = target.pack()
    if name is None:
        return target, None
    return target, load_draft(name, target, quantization=quantization).pack()


def _check_same(paths: list[Path]) -> None:
    """Raises ValueError unless all processes have these models, and one version of JAX."""
    content = hashlib.sha256(jax.__version__.encode())
    for path in paths:
        content.update(fingerprint(path))
    own = np.frombuffer(content.digest(), np.uint8)
    others = multihost_utils.process_allgather(own.astype(np.int32))
    if different := [i for i, other in enumerate(others) if not np.array_equal(other, others[0])]:
        raise ValueError(
            f"process {different[0]} has other files in {' or '.join(map(str, paths))} than "
            "process 0, or another version of jax: give all hosts the same ones"
        )


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
    each = sum(token_bytes(layer, target.backend.mesh) for layer in layers)
    needed = slots * -(-length // config.block_size)
    room = _cache_bytes(config, target) // (config.block_size * each)
    if room < 1:
        raise ValueError("no memory is left for the KV cache: raise --gpu-memory-utilization")
    return min(needed, room) + 1


def _cache_bytes(config: ServerConfig, target: Target) -> int:
    """Memory for the cache on each device of the target, the least that any of them has."""
    if jax.default_backend() == "cpu":
        return CPU_CACHE_BYTES
    mesh = target.backend.mesh
    own = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    free = []
    for memory in filter(None, (device.memory_stats() for device in own)):
        limit = int(memory["bytes_limit"] * config.gpu_memory_utilization)
        free.append(limit - memory["bytes_in_use"])
    least = min(free, default=CPU_CACHE_BYTES)
    if config.nnodes > 1:
        least = multihost_utils.process_allgather(np.array(least / _MIB)).min() * _MIB
    return int(least)


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
