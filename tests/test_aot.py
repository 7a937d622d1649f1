"""Compiled for a described H100: registers, spills, tensor cores, memory, collectives.

Needs the CUDA plugin; `make aot` installs it and runs these tests.
"""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks.compiled import collectives, on_device, remade
from benchmarks.deployments import CONFIGS, MEMORY
from benchmarks.deployments import compile_round as compile_deployment
from benchmarks.synthetic import DRAFT_8B, LLAMA_8B, abstract_models, abstract_round, make_plan
from jax_eagle.generate import decode
from jax_eagle.sharding import Backend
from pallas_kernels.aot import SHARED_MEMORY_LIMIT, compile_for_h100, h100_mesh
from pallas_kernels.tree_attention import tree_attention
from pallas_kernels.tree_attention.shapes import NODES, SHAPES, abstract_inputs

pytestmark = pytest.mark.aot

REGISTERS = 65_536
"""32-bit registers of a multiprocessor."""

attend = functools.partial(tree_attention, implementation="triton")


def compile_attention(inputs: dict):
    on_device = jax.sharding.NamedSharding(h100_mesh(), jax.sharding.PartitionSpec())
    inputs = {k: None if v is None else v.update(sharding=on_device) for k, v in inputs.items()}
    return compile_for_h100(jax.jit(attend).lower(**inputs)).kernels


def check(kernel, rows: int, exact: bool) -> None:
    """No spill, fits a multiprocessor (twice while the tile is small), uses the tensor cores."""
    assert kernel.spill_bytes == 0, kernel
    programs = 2 if rows <= 64 else 1
    assert programs * kernel.registers * kernel.threads <= REGISTERS, kernel
    assert programs * kernel.shared_memory <= SHARED_MEMORY_LIMIT, kernel
    assert (kernel.wgmma == 0) == (exact or rows < 64), kernel
    assert exact or rows >= 64 or kernel.mma > 0, kernel


@pytest.mark.parametrize("kv_dtype", [jnp.bfloat16, jnp.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_neither_spill_nor_miss_the_tensor_cores(shape, nodes, kv_dtype):
    rows = max(16, 1 << (nodes * shape.group - 1).bit_length())
    few, many = (
        compile_attention(
            abstract_inputs(shape, batch=batch, nodes=nodes, context=8192, kv_dtype=kv_dtype)
        )
        for batch in (1, 128)
    )
    assert [k.name for k in few + many] == [
        "tree_attention_merge", "tree_attention_prefix", "tree_attention_whole",
    ]  # fmt: skip
    check(few[0], 16, exact=False)
    check(few[1], min(rows, 256), exact=False)
    check(many[0], min(rows, 256), exact=False)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_chunk_of_a_prompt(shape):
    inputs = abstract_inputs(shape, batch=1, nodes=2048, context=8192, causal=True)
    for kernel in compile_attention(inputs):
        check(kernel, 128, exact=False)


@pytest.mark.parametrize("kv_dtype", [jnp.bfloat16, jnp.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("nodes", [16, 1024])
def test_windows(nodes, kv_dtype):
    """Llama 4's chunked layers, verifying a tree and in a prompt."""
    shape, chunk = SHAPES["llama-4-scout"], nodes > 64
    inputs = abstract_inputs(
        shape, batch=8, nodes=nodes, context=8192, kv_dtype=kv_dtype, causal=chunk
    )
    inputs["first_BM"] = inputs["length_B"].update(shape=(8, nodes))
    for kernel in compile_attention(inputs):
        check(kernel, 16 if "merge" in kernel.name and not chunk else 128, exact=False)


def test_a_level_of_a_draft():
    """Few queries of many tree keys."""
    inputs = abstract_inputs(SHAPES["llama-3.1-8b"], batch=1, nodes=10, context=8192)
    inputs["q_BMNH"] = inputs["q_BMNH"].update(shape=(1, 4, 32, 128))
    inputs["tree_mask_BMX"] = inputs["tree_mask_BMX"].update(shape=(1, 4, 10))
    for kernel in compile_attention(inputs):
        check(kernel, 16, exact=False)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32_keeps_every_bit(shape):
    inputs = abstract_inputs(shape, batch=1, nodes=16, context=8192, dtype=jnp.float32)
    for kernel in compile_attention(inputs):
        assert kernel.wgmma == kernel.mma == 0, kernel


# ---- the whole round of an 8B target -----------------------------------------------------------

MIB = 2**20


def compile_round(devices: int, tree: str, batch: int):
    """(program, arguments) of a round at 8k tokens of context."""
    backend = Backend(attention="triton", mesh=h100_mesh(devices))
    target, draft = abstract_models(LLAMA_8B, None if tree == "root" else DRAFT_8B, backend)
    arguments = abstract_round(target, draft, make_plan(tree, batch), batch=batch, context=8192)
    return compile_for_h100(decode.lower(*arguments)), arguments


def pools(state) -> list:
    caches = [cache for cache in (state.cache, state.draft_cache) if cache is not None]
    return [pool for cache in caches for pool in (cache.k_pages, cache.v_pages)]


# Temporaries are about eleven arrays of the size of a device's logits, in the branch that samples.
@pytest.mark.parametrize(
    "devices, tree, batch, temp_mib",
    [
        (1, "root", 1, 48),
        (1, "static:16", 1, 128),
        (1, "chain:3", 32, 768),
        (8, "static:16", 1, 16),
        (8, "root", 1, 16),
    ],
)
def test_the_round_of_an_8b_target(devices, tree, batch, temp_mib, capsys):
    program, arguments = compile_round(devices, tree, batch)
    target, draft, head, plan, state, _ = arguments
    memory, text = program.compiled.memory_analysis(), program.compiled.as_text()
    found = collectives(text)
    kinds = collections.Counter(one.kind for one in found)
    with capsys.disabled():
        print(
            f"\n8B, {tree}, batch {batch}, {devices} x H100: compiled in {program.seconds:.0f} s, "
            f"temp {memory.temp_size_in_bytes / MIB:.0f} MiB, {dict(kinds)}"
        )
    cache_bytes = sum(2 * math.prod(on_device(pool)) for pool in pools(state))
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < temp_mib * MIB
    parts = {kernel.name.split("__")[0] for kernel in program.kernels}
    assert parts == {"tree_attention_prefix", "tree_attention_merge"}
    assert all(kernel.spill_bytes == 0 for kernel in program.kernels)
    weights = [x for x in jax.tree.leaves((target, draft, head)) if len(x.shape) > 1]
    assert remade(text, weights + pools(state)) == []

    if devices == 1:
        assert not found
        return
    # Embedding, then attention and FFN of each layer; the draft has its FC besides. The branch that
    # samples finds two thresholds, the mass of what top-k left and the best score.
    passes, nodes = plan.shape.max_depth, plan.shape.num_nodes
    draft_layers = draft.config.layer.num_layers if draft is not None else 0
    summed = 1 + 2 * LLAMA_8B.num_layers + passes * (2 + 2 * draft_layers) + 4
    # The devices' candidates: of each pass of the draft, of greedy draws and of sampled ones.
    assert kinds == {"all-reduce": summed, "all-gather": passes + 2}
    sizes = {kind: max(one.size for one in found if one.kind == kind) for kind in kinds}
    rows = 8 if nodes == 1 else nodes  # one row is multiplied, and summed, as eight
    assert sizes["all-reduce"] == rows * LLAMA_8B.hidden_size * 2
    assert sizes["all-gather"] == devices * nodes * 4
    vocabularies = {LLAMA_8B.vocab_size, DRAFT_8B.draft_vocab_size}
    assert not [one for one in found for shape in one.shapes if vocabularies & {*shape}]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_rounds_of_large_targets(name):
    # Neither 7 nor the 28 nodes of their trees are dimensions of a model: no weights are mistaken
    # for activations.
    row = compile_deployment(name, batch=7)
    assert row["gigabytes"] < MEMORY / 1e9
    assert row["collectives"]["all-reduce"] == row["all_reduces_expected"]
    assert row["vocabulary_gathers"] == 0 and row["widened_weights"] == []


def test_the_search_finds_copies_of_weights():
    """What the search is for: one row by one matrix makes XLA lay the weights out anew."""
    mesh = h100_mesh()
    alone = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16, sharding=alone)
    w = jax.ShapeDtypeStruct((4096, 8, 128), jnp.bfloat16, sharding=alone)
    twice = jax.jit(lambda x, w: (jnp.einsum("md,dkh->mkh", x, w), jnp.swapaxes(w, 0, 2)))
    assert remade(compile_for_h100(twice.lower(x, w)).compiled.as_text(), [w])
