"""Timing on a GPU: inside compiled loops, beside the least time that the machine allows."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement."""

    name: str
    seconds: float
    floor_seconds: float
    """The least time that this machine's measured bandwidth and peak allow."""
    note: str = ""

    @property
    def share(self) -> float:
        """Of the floor that was reached: 1 is perfect."""
        return self.floor_seconds / self.seconds if self.seconds else 0.0


@dataclasses.dataclass(frozen=True)
class Machine:
    """What this machine can do at best, measured."""

    bytes_per_second: float
    """Read and written by a copy."""
    flops_per_second: float
    """Of a bf16 matrix product."""

    def floor(self, num_bytes: float, flops: float = 0.0) -> float:
        """Seconds that reading the bytes and doing the arithmetic take at least."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


def measure_machine(*, copy_bytes: int, matrix: int, many: int) -> Machine:
    """Copy bandwidth and matrix peak."""
    x = jnp.zeros(copy_bytes // 4, jnp.float32)
    copied = 2 * x.nbytes / per_iteration(lambda x: x + 1, x, many)[0]
    n = matrix
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    b = a[::-1] * n**-0.5  # products of products stay of the same size
    seconds = per_iteration(lambda a, b: (a @ b).astype(a.dtype), a, many, b)[0]
    return Machine(copied, 2 * n**3 / seconds)


def per_iteration(step: Callable[..., Any], carry: Any, many: int, *constant) -> tuple[float, Any]:
    """(seconds of `step(carry, *constant) -> carry`, carry after): inside one compiled loop.

    Long loops less short ones: neither the dispatch of a call nor its compilation counts. The
    carry is donated.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(carry, count, constant):
        return jax.lax.fori_loop(0, count, lambda _, carry: step(carry, *constant), carry)

    return time_loops(lambda carry, count: loop(carry, np.int32(count), constant), carry, many)


def time_loops(loop: Callable[[Any, int], Any], carry: Any, many: int) -> tuple[float, Any]:
    """(seconds an iteration, carry after) of `loop(carry, iterations)`."""
    seconds = []
    for count in loop_counts(many):
        begin = time.perf_counter()
        carry = jax.block_until_ready(loop(carry, count))
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds[2::2]) - np.median(seconds[1::2])) / many, carry


def loop_counts(many: int) -> list[int]:
    """Iterations of the calls that are timed; the first compiles."""
    few = max(1, many // 4)
    return [1, *3 * [few, few + many]]
