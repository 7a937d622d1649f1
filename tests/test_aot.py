"""Compiled for an H100 that is only described: registers, spills, tensor cores, memory, collectives.

Needs the CUDA plugin; `make aot` installs it and runs these tests.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

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
    (kernel,) = compile_attention(inputs)
    check(kernel, 128, exact=False)


def test_windows():
    inputs = abstract_inputs(SHAPES["llama-4-scout"], batch=8, nodes=16, context=8192)
    inputs["first_BM"] = inputs["length_B"].update(shape=(8, 16))
    for kernel in compile_attention(inputs):
        check(kernel, 16 if "merge" in kernel.name else 128, exact=False)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32_keeps_every_bit(shape):
    inputs = abstract_inputs(shape, batch=1, nodes=16, context=8192, dtype=jnp.float32)
    for kernel in compile_attention(inputs):
        assert kernel.wgmma == kernel.mma == 0, kernel
