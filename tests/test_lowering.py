"""Every kernel lowers for a GPU, on a machine without one."""

import functools

import jax.numpy as jnp
import pytest

from pallas_kernels.aot import lower_for_cuda
from pallas_kernels.tree_attention import tree_attention
from pallas_kernels.tree_attention.shapes import SHAPES, abstract_inputs

triton = functools.partial(tree_attention, implementation="triton")


@pytest.mark.parametrize("kv_dtype", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_lower_for_a_gpu(shape, kv_dtype):
    dtype = jnp.float32 if kv_dtype == jnp.float32 else jnp.bfloat16
    few = abstract_inputs(shape, batch=1, nodes=16, context=8192, dtype=dtype, kv_dtype=kv_dtype)
    text = lower_for_cuda(triton, **few)
    assert "tree_attention_prefix" in text and "tree_attention_merge" in text
    many = abstract_inputs(shape, batch=128, nodes=16, context=8192, dtype=dtype, kv_dtype=kv_dtype)
    assert "tree_attention_whole" in lower_for_cuda(triton, **many)


def test_windows_and_causal_chunks_lower_for_a_gpu():
    inputs = abstract_inputs(SHAPES["llama-4-scout"], batch=1, nodes=16, context=8192)
    window = inputs["length_B"].update(shape=(1, 16))
    assert "tree_attention_merge" in lower_for_cuda(triton, **inputs, first_BM=window)
    chunk = abstract_inputs(SHAPES["llama-3.1-8b"], batch=1, nodes=2048, context=8192, causal=True)
    assert "tree_attention_whole" in lower_for_cuda(triton, **chunk)
