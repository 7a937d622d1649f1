"""The grouped product compiled for a described H100: registers, spills, tensor cores, memory.

Needs the CUDA plugin, as `test_aot` does.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot import SHARED_MEMORY_LIMIT, compile_for_h100, h100_mesh
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.shapes import SCHEMES, SHAPES, TOKENS, abstract_inputs

pytestmark = pytest.mark.aot

REGISTERS = 65_536
"""32-bit registers of a multiprocessor."""

# The rest of SHAPES compiles to the same kernels but for numbers.
NAMES = (
    "llama-3.1-8b qkv/8",
    "llama-3.1-8b down",
    "llama-3.3-70b gate_up",
    "llama-3.3-70b down/8",
    "llama-4-scout down/8",
    "llama-4-maverick gate_up/8",
)


def compile_all(cases: list[dict], implementation: str = "triton"):
    """One program that multiplies each case."""
    on_device = jax.sharding.NamedSharding(h100_mesh(), jax.sharding.PartitionSpec())
    cases = jax.tree.map(lambda x: x.update(sharding=on_device), cases)
    multiply = functools.partial(grouped_matmul, implementation=implementation)
    every = jax.jit(lambda cases: [multiply(**case) for case in cases])
    return compile_for_h100(every.lower(cases), kernels="grouped_matmul")


def widened(program, cases: list[dict]) -> list[str]:
    """Arrays in memory of the shape of some case's weights, in a wider dtype."""

    def plain(*shape: int) -> tuple[int, ...]:  # XLA drops dimensions of one
        return tuple(size for size in shape if size > 1)

    stored = {}
    for case in cases:
        E, _, F = case["w"].shape
        stored[plain(E, case["x_RD"].shape[1], F)] = case["w"].dtype.itemsize
    fused = re.compile(r"^%fused\S* .*?^}$", re.MULTILINE | re.DOTALL)  # never in memory
    found = re.findall(r"\b(bf16|f16|f32)\[([\d,]+)\]", fused.sub("", program.compiled.as_text()))
    bytes_each = {"bf16": 2, "f16": 2, "f32": 4}
    return [
        f"{dtype}[{dims}]"
        for dtype, dims in found
        if stored.get(plain(*map(int, dims.split(","))), 4) < bytes_each[dtype]
    ]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_real_shapes(scheme, tokens, capsys):
    """No spill, room for more than one program, tensor cores, weights in memory as they came."""
    cases = [abstract_inputs(SHAPES[name], tokens=tokens, scheme=scheme) for name in NAMES]
    program = compile_all(cases)
    for kernel in program.kernels:
        assert kernel.spill_bytes == 0, kernel
        programs = 2 if kernel.threads <= 128 else 1  # small blocks, blocks of a prompt
        assert programs * kernel.registers * kernel.threads <= REGISTERS, kernel
        assert programs * kernel.shared_memory <= SHARED_MEMORY_LIMIT, kernel
        assert kernel.wgmma or kernel.mma, kernel
        assert tokens > 1 or math.prod(kernel.grid) >= 224, kernel
    assert widened(program, cases) == []
    with capsys.disabled():
        memory = program.compiled.memory_analysis()
        print(
            f"\n{scheme}, {tokens} tokens: {len(program.kernels)} kernels in "
            f"{program.seconds:.0f} s, temp {memory.temp_size_in_bytes / 2**20:.1f} MiB, registers "
            f"up to {max(kernel.registers for kernel in program.kernels)}"
        )
    assert len(program.kernels) == len(cases)


@pytest.mark.parametrize("scheme", ["fp8", "int8", "int4"])
def test_partial_sums_are_all_that_is_kept_besides(scheme):
    """A program of its own: nothing lends it the room of another result."""
    case = abstract_inputs(SHAPES["llama-3.1-8b down/8"], tokens=16, scheme=scheme)
    program = compile_all([case])
    (kernel,) = program.kernels
    partial = kernel.grid[2] * case["x_RD"].shape[0] * case["w"].shape[2] * 4
    assert 1 < kernel.grid[2]
    assert partial <= program.compiled.memory_analysis().temp_size_in_bytes <= partial + 4096
    assert 2 * partial <= math.prod(case["w"].shape)


def test_the_search_finds_widened_weights():
    """What the search is for: the reference holds the weights in float32."""
    case = abstract_inputs(SHAPES["llama-3.1-8b qkv/8"], tokens=16, scheme="int8")
    assert widened(compile_all([case], "reference"), [case])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float32_keeps_every_bit(scheme):
    case = abstract_inputs(SHAPES["llama-3.1-8b qkv/8"], tokens=16, scheme=scheme)
    case["x_RD"] = case["x_RD"].update(dtype=jnp.float32)
    if scheme == "bf16":
        case["w"] = case["w"].update(dtype=jnp.float32)
    for kernel in compile_all([case]).kernels:
        assert kernel.spill_bytes == kernel.wgmma == kernel.mma == 0, kernel
