"""Widens a trained checkpoint into a larger shape that computes the same function.

    python -m benchmarks.grow          # grows SmolLM2 and compares its logits with the original's

Real acceptance needs trained models, and real cost needs large ones. A grown model is both: SmolLM2
and its draft inside the shape of Llama 3.1 8B, with every matrix of that shape read and multiplied.
In exact arithmetic it gives the same logits:

- Channels behind the original's are zero everywhere: in the embedding and in what output
  projections and FFNs add. RMS norms divide by a mean over more channels, so their weights are
  multiplied by sqrt(D / D') and epsilon by D / D'.
- Heads, FFN units and layers behind the original's have random weights; what they give meets zeros.
- A longer head takes every r-th rotary frequency (its own are r times denser); queries are
  multiplied by sqrt(r), because scores are divided by the root of the longer head.
- Tokens behind the vocabulary are copies of the first ones. The argmax is the first of equals, so
  greedy text is the same. Sampling would have to mask the copies: a grown model is for T = 0.
"""

import dataclasses
import math
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import traverse_util

from jax_eagle import Draft, Target, load_draft, load_target
from jax_eagle.config import LlamaConfig
from jax_eagle.eagle import abstract_draft_params
from jax_eagle.llama import abstract_params
from jax_eagle.packing import unpack_params
from jax_eagle.program import run_program

from .synthetic import LLAMA_8B

_ZERO_OUTSIDE = ("o", "down", "fc", "embed", "lm_head")
"""What must not add anything to the residual stream, nor read more of it."""


def grow_target(target: Target, shape: LlamaConfig, *, seed: int = 0) -> Target:
    """The target inside `shape`, in the dtype of `shape`.

    Raises:
      ValueError: a shape that is smaller somewhere, or a head dimension that is no multiple.
    """
    config = _grown_config(target.config, shape)
    params = unpack_params(target.params)
    if target.config.tie_embeddings:
        params = params | {"lm_head": {"kernel": params["embed"]["embedding"].T}}
    grown = _grow(params, abstract_params(config), target.config, config, seed)
    return Target(grown, config, target.tokenizer, target.backend)


def grow_draft(draft: Draft, target: Target, *, seed: int = 1) -> Draft:
    """The draft inside layers of the grown target's shape; its vocabulary stays."""
    shape = dataclasses.replace(target.config, num_layers=draft.config.layer.num_layers)
    layer = _grown_config(draft.config.layer, shape)
    config = dataclasses.replace(draft.config, layer=layer, feature_width=layer.hidden_size)
    boxed = abstract_draft_params(config)
    params = _grow(unpack_params(draft.params), boxed, draft.config.layer, config.layer, seed)
    return Draft(params, draft.draft_to_target, config)


def _grown_config(small: LlamaConfig, shape: LlamaConfig) -> LlamaConfig:
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_kv_heads"):
        if getattr(shape, field) < getattr(small, field):
            raise ValueError(
                f"{field} {getattr(shape, field)} is smaller than the {getattr(small, field)} "
                "of the model to grow"
            )
    if shape.num_heads // shape.num_kv_heads < small.num_heads // small.num_kv_heads:
        raise ValueError("fewer query heads a KV head than the model to grow has")
    if shape.head_dim % small.head_dim:
        raise ValueError(f"head_dim {shape.head_dim} is no multiple of {small.head_dim}")
    if small.attention_bias or small.mlp_bias:
        raise ValueError("models with biases cannot be grown")
    return dataclasses.replace(
        shape,
        rope_theta=small.rope_theta,
        rope_scaling=small.rope_scaling,
        rms_norm_eps=small.rms_norm_eps * small.hidden_size / shape.hidden_size,
        tie_embeddings=False,
        stop_token_ids=small.stop_token_ids,
    )


def _grow(params: Any, boxed: Any, small: LlamaConfig, large: LlamaConfig, seed: int) -> Any:
    """Every leaf of the larger model: random or zero, with the original's block set in."""
    old = traverse_util.flatten_dict(params)
    axes = traverse_util.flatten_dict(nn.get_partition_spec(boxed))
    new = {}
    for number, (path, like) in enumerate(traverse_util.flatten_dict(nn.unbox(boxed)).items()):
        name = path[-2]
        key = jax.random.fold_in(jax.random.key(seed), number)
        if name in _ZERO_OUTSIDE:
            leaf = jnp.zeros(like.shape, like.dtype)
        else:
            leaf = 0.02 * jax.random.normal(key, like.shape, like.dtype)
        if path in old:
            places = [
                _places(axis, name, size, small, large)
                for axis, size in zip(axes[path], old[path].shape, strict=True)
            ]
            if name == "q":  # the other dimensions of a head that is used must not reach its scores
                leaf = leaf.at[:, places[1]].set(0)
            block = old[path].astype(jnp.float32) * _factor(name, small, large)
            leaf = leaf.at[np.ix_(*places)].set(block.astype(leaf.dtype))
        if "vocab" in axes[path]:
            leaf = _copy_tokens(leaf, axes[path].index("vocab"), small.vocab_size)
        new[path] = leaf
    return traverse_util.unflatten_dict(new)


def _places(axis: str, name: str, size: int, small: LlamaConfig, large: LlamaConfig) -> np.ndarray:
    """Where the entries of one axis of the original stand in the larger model."""
    index = np.arange(size)
    if axis == "heads":
        group = small.num_heads // small.num_kv_heads
        return index // group * (large.num_heads // large.num_kv_heads) + index % group
    if axis == "head_dim" and name in "qk":  # pairs (i, i + H/2) turn at frequency i
        half = small.head_dim // 2
        stride = large.head_dim // small.head_dim
        return index // half * (large.head_dim // 2) + index % half * stride
    if axis == "feature":  # the embedding, then the feature
        width = small.hidden_size
        return index // width * large.hidden_size + index % width
    return index


def _factor(name: str, small: LlamaConfig, large: LlamaConfig) -> float:
    if name == "q":
        return math.sqrt(large.head_dim / small.head_dim)
    if name.endswith("norm"):
        return math.sqrt(small.hidden_size / large.hidden_size)
    return 1.0


def _copy_tokens(leaf: jax.Array, axis: int, vocab_size: int) -> jax.Array:
    """Tokens behind the original vocabulary repeat it from the start."""
    return jnp.take(leaf, jnp.arange(leaf.shape[axis]) % vocab_size, axis=axis)


def describe(small: Target, large: Target, draft: Draft) -> str:
    """What a grown model is, in one sentence for the reader of its results."""
    a, b = small.config, large.config
    return (
        f"a model of {a.num_layers} layers and width {a.hidden_size} grown to {b.num_layers} "
        f"layers, width {b.hidden_size}, {b.num_heads}/{b.num_kv_heads} heads of {b.head_dim}, FFN "
        f"{b.intermediate_size}, vocabulary {b.vocab_size}: the text and the acceptance of the "
        f"small one (draft vocabulary {draft.config.draft_vocab_size}) at the cost of the large one"
    )


def main(
    model: Annotated[str, typer.Option()] = "smollm2-135m-instruct",
    draft: Annotated[str, typer.Option()] = "smollm2-135m-instruct-eagle",
    layers: Annotated[int, typer.Option(help="Layers of the grown model.")] = 32,
    width: Annotated[int, typer.Option(help="Its width; heads and FFN in proportion.")] = 1024,
) -> None:
    """Grows a model and compares its logits with the original's, in float32."""
    small = load_target(model, dtype="float32")
    heads = max(small.config.num_kv_heads, width // 512)
    shape = dataclasses.replace(
        LLAMA_8B, num_layers=layers, hidden_size=width, intermediate_size=width * 7 // 2,
        num_heads=4 * heads, num_kv_heads=heads, vocab_size=small.config.vocab_size + 64,
        dtype="float32", max_position=small.config.max_position,
    )  # fmt: skip
    large = grow_target(small, shape)
    head = grow_draft(load_draft(draft, small), large)
    print(describe(small, large, head))
    tokens = np.arange(1, 33)[None] * 97 % small.config.vocab_size
    with jax.default_matmul_precision("highest"):
        before = np.asarray(small.logits(tokens))
        after = np.asarray(large.logits(tokens))[:, :, : small.config.vocab_size]
    bound = 1e-4 + 2e-5 * np.abs(before).max()
    difference = np.abs(after - before).max()
    print(f"largest difference of the logits {difference:.1e}, bound {bound:.1e}")
    raise typer.Exit(0 if difference <= bound else 1)


if __name__ == "__main__":
    run_program(main, "benchmarks.grow")
