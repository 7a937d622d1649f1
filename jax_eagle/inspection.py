"""What a checkpoint holds, or what it will take, in lines of text: `jax-eagle inspect`."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from . import bench, hub
from .acceptance import CONVENTION, decode_acceptance
from .checkpoint import hf, orbax
from .checkpoint.files import read_json
from .config import ConfigError, DraftConfig, LlamaConfig
from .demo import chat_prompt
from .draft import Draft
from .llama import Target
from .load import dtype_name, load_draft, load_target, read_draft
from .memory import size_text
from .planning import Plan
from .prefill import PAGE_SIZE

SMOKE_TREE, SMOKE_PROMPTS, SMOKE_TOKENS = "chain:3", 4, 32
BATCHES = (1, 8, 64)
"""Whose rounds a plan times."""
FLOOR_TITLE = "  batch      step     round   break-even   tree"


def inspect(
    name: str, *, target: Target | None = None, numbering: str | None = None, smoke: bool = True
) -> Iterator[str]:
    """Describes a target or a draft, line by line, after loading it whole.

    Args:
      target: what a draft has to fit; None: not checked.
      numbering: of the layers that an EAGLE-3 folder taps, as in `load_draft`.
      smoke: decode a little with draft and target, enough to tell a good draft from a broken one.

    Raises:
      ValueError: a checkpoint that cannot be used, or a draft that does not fit.
    """
    path = hub.resolve(name)
    if not is_draft(path):
        if target is not None or numbering is not None:
            raise ConfigError(
                f"{name} is a target, expected a draft: only those have a target to tap"
            )
        yield from _target_lines(path, load_target(path))
        return
    if target is None:
        draft = read_draft(path, dtype=dtype_name(), numbering=numbering)
    else:
        draft = load_draft(path, target, numbering=numbering)
    yield from _draft_lines(path, draft, fits=target is not None)
    if target is not None and smoke:
        yield smoke_acceptance(target, draft)


def plan_lines(plan: Plan) -> Iterator[str]:
    """What a deployment takes on each device of its mesh, and the floors of its rounds."""
    axes = ", ".join(f"{name}={size}" for name, size in plan.mesh.shape.items())
    yield f"{plan.deployment.model} on {plan.mesh.size} x {plan.roofline.accelerator.name} ({axes})"
    yield _line("draft", plan.deployment.draft or "none")
    yield "bytes of each device"
    for name, size in plan.weights.items():
        yield _line(name, f"{size_text(size):>10}")
    yield _line("all weights", f"{size_text(plan.weight_bytes):>10}")
    yield _line("left for the cache", f"{size_text(plan.usable - plan.weight_bytes):>10}")
    yield "KV cache"
    yield _line("a token", f"{plan.token_bytes:,} bytes on each device")
    room = f"{plan.num_tokens:,} tokens, {plan.num_sequences:,} sequences of {plan.length:,}"
    yield _line("room", room)
    yield f"floors in ms, at {plan.context:,} cached tokens a sequence"
    yield FLOOR_TITLE
    for at in map(plan.floor, BATCHES):
        step, rounds = 1e3 * at.step_seconds, 1e3 * at.round_seconds
        rounds = f"{rounds:9.2f} {at.break_even:12.2f}   {at.tree}" if plan.draft else ""
        room = "" if plan.has_room_for(at.batch) else "   (no room in the cache)"
        yield f"  {at.batch:<6} {step:8.2f} {rounds}".rstrip() + room
    yield (
        f"fits: {size_text(plan.needed)} needed with one sequence of {plan.length:,} tokens, "
        f"{plan.usable_text} there"
    )


def draft_kind(config: DraftConfig) -> str:
    """EAGLE-3, or EAGLE with the blocks of Llama 3 or Llama 4."""
    if config.is_eagle3:
        return f"EAGLE-3, features from layers {', '.join(map(str, config.taps))}"
    return "EAGLE" if config.layer.llama4 is None else "EAGLE, Llama 4 blocks"


def smoke_acceptance(target: Target, draft: Draft) -> str:
    """The acceptance length on a few built-in prompts, with how much it rests on."""
    try:
        prompts = [chat_prompt(target, text) for text in bench.PROMPTS[:SMOKE_PROMPTS]]
    except ValueError:
        return "acceptance not measured: its prompts need a target with tokenizer and chat template"
    decoded = decode_acceptance(
        target, draft, prompts, trees=[SMOKE_TREE], max_new_tokens=SMOKE_TOKENS
    )[SMOKE_TREE]
    length = decoded.acceptance_length()
    return (
        f"acceptance length {length.value:.2f} [{length.low:.2f}, {length.high:.2f}] with "
        f"{SMOKE_TREE}, a smoke test on {decoded.gained.sum()} tokens of {len(prompts)} prompts "
        f"({CONVENTION})"
    )


def is_draft(path: Path) -> bool:
    """Whether a folder holds a draft: by its config, or by its tensors if it is an official one."""
    if not (path / "config.json").is_file():
        return False
    if "eagle" in read_json(path / "config.json"):
        return True
    return not orbax.is_orbax(path) and "fc.weight" in hf.read_folder(path)


def _target_lines(path: Path, target: Target) -> Iterator[str]:
    config = target.config
    yield f"target {path}"
    yield from _config_lines(config, skip=("stop_token_ids",))
    yield _line("stop_token_ids", _tokens(target))
    yield _line("tokenizer", target.tokenizer or "none: prompts are token ids")
    yield from _cache_lines(config, target.params)
    yield from _tensor_lines(target.params)


def _draft_lines(path: Path, draft: Draft, *, fits: bool) -> Iterator[str]:
    layer = draft.config.layer
    yield f"draft {path}"
    yield _line("kind", draft_kind(draft.config))
    yield from _config_lines(draft.config, skip=("layer",))
    yield _line("layers", f"{layer.num_layers} of {layer.num_heads} heads")
    hidden_size = draft.config.feature_width // max(1, len(draft.config.taps))
    needs = f"hidden size {hidden_size}, vocabulary {layer.vocab_size}"
    yield _line("target", f"fits ({needs})" if fits else f"not checked; needs {needs}")
    yield from _cache_lines(layer, draft.params)
    yield from _tensor_lines(draft.params)


def _config_lines(config: LlamaConfig | DraftConfig, *, skip: tuple[str, ...]) -> Iterator[str]:
    for field in dataclasses.fields(config):
        if field.name not in skip:
            yield _line(field.name, getattr(config, field.name))


def _cache_lines(config: LlamaConfig, params: Any) -> Iterator[str]:
    leaves = jax.tree.leaves(params)
    num_bytes = sum(leaf.nbytes for leaf in leaves)
    yield _line("parameters", f"{sum(leaf.size for leaf in leaves):,} ({num_bytes / 1e6:,.1f} MB)")
    item = jnp.dtype(config.dtype).itemsize
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * item
    yield _line("KV cache", f"{token:,} bytes a token, {token * PAGE_SIZE:,} a page of {PAGE_SIZE}")


def _tensor_lines(params: Any) -> Iterator[str]:
    """One line for all tensors that differ in the layer's number alone."""
    counts: Counter[tuple[str, str]] = Counter()
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = re.sub(r"\blayers_\d+", "layers_*", "/".join(key.key for key in keys))
        counts[name, f"{leaf.dtype} {list(leaf.shape)}"] += 1
    yield "tensors"
    for (name, shape), count in counts.items():
        yield f"  {name:<36} {shape}{f' x {count}' if count > 1 else ''}"


def _tokens(target: Target) -> str:
    ids, tokenizer = target.config.stop_token_ids, target.tokenizer
    return ", ".join(f"{i} {tokenizer.decode([i])!r}" if tokenizer else str(i) for i in ids)


def _line(name: str, value: Any) -> str:
    return f"  {name:<20} {value}"
