"""Matrix products of few rows at the speed of memory.

On a CPU: weights in column blocks. XLA's product of a few rows rearranges the weights on every
call, which costs as much as reading them: verifying a small tree then takes nearly twice a plain
step, and speculation gains nothing. Blocks [out / 64, in, 64] are used as they lie. Measured on
two EPYC cores in float32, kernel 1536 x 576: 16.1 -> 19.6 GB/s for one row, 12.6 -> 22.3 for two,
9.9 -> 19.8 for four, 12.2 -> 16.0 for eight. A forward of SmolLM2-135M over four nodes takes 45 ms
instead of 62. Where blocks are slower (many rows; one row and many columns) the ordinary kernel is
used. Other processors read kernels faster as they lie when there are several rows, because XLA
multiplies blocks on one core and one core does not fill their memory bus: on two cores of an Intel
Xeon (Ice Lake) four rows pass the layers in 41 ms, with blocks in 55; one row in 33, with blocks in
28. So the machine is measured once (`few_rows_pay`), and blocks without a use are not made.

`Target.pack` and `Draft.pack` keep the blocks in the parameter tree, beside the kernel they repeat:
parameters that are replaced take their blocks with them. All its blocks double a model.

On a GPU: one row is multiplied as eight (see `_padded`); blocks are not needed. Weights that
multiply the same rows stay apart (`COMPILER_OPTIONS`). Quantised weights are half of the bytes or
less: a kernel widens them inside the product, and they never lie in memory in another dtype
(`quantized_matmul`).
"""

import functools
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Num

from pallas_kernels.grouped_matmul import grouped_matmul

from .sharding import LOGICAL_AXES, TENSOR, Backend

COMPILER_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}
"""Of every program that reads weights again and again. XLA would merge products of the same rows
by joining their weights, in every round: with 8B on eight H100s it copied queries, keys and values,
and gate and up, of each layer."""

BLOCKS = "blocks"
_PACKED = "packed"
_COLUMNS = 64
_MAX_ROWS = 8
_MAX_COLUMNS_OF_ONE_ROW = 1024
_GPU_ROWS = 8
_PROBE_KERNELS = ((576, 1536), (1536, 576)) * 16
_PROBE_ROWS = 4
_MARGIN = 1.2  # while others work, blocks on one core look as fast as kernels on two


def matmul(
    x: Float[Array, "... D"],
    kernel_DF: Float[Array, "D F"],
    blocks: Float[Array, "X D J"] | None,
    dtype: Any = None,
) -> Float[Array, "... F"]:
    """x @ kernel; from the kernel's blocks where there are any and that is faster.

    `dtype` is that of the result, and of the sums: None means that of x.
    """
    num_rows = _num_rows(x)
    if blocks is None or not _pays(num_rows, kernel_DF.shape[1]):
        product = functools.partial(jnp.matmul, **_exactly(x, dtype))
        if num_rows > 1:
            return product(x, kernel_DF)
        return jax.lax.platform_dependent(
            x, kernel_DF, cuda=functools.partial(_padded, product), default=product
        )
    return _in_blocks(x, blocks, dtype)


def tied_head(
    x: Float[Array, "... D"],
    table_VD: Float[Array, "V D"],
    blocks: Float[Array, "X D J"] | None,
    dtype: Any = None,
) -> Float[Array, "... V"]:
    """x @ table.T, like `matmul`. On a CPU the table is multiplied as it lies, with few rows as
    its columns. Four rows of SmolLM2-135M in float32 take 8.4 ms instead of 11.2 on two cores of an
    Intel Xeon (Ice Lake), 3.1 instead of 4.3 on two cores of an EPYC with AVX-512.
    """
    num_rows = _num_rows(x)
    blocks_serve = blocks is not None and _pays(num_rows, table_VD.shape[0])
    if num_rows > _MAX_ROWS or blocks_serve:
        return matmul(x, table_VD.T, blocks, dtype)

    def table_first(x, table_VD):
        columns_DR = jnp.reshape(x, (num_rows, -1)).T
        # Without the barrier XLA turns the product and its transposition back into x @ table.T.
        y_VR = jax.lax.optimization_barrier(jnp.matmul(table_VD, columns_DR, **_exactly(x, dtype)))
        return jnp.reshape(y_VR.T, (*x.shape[:-1], -1))

    return jax.lax.platform_dependent(
        x, table_VD, cpu=table_first, default=lambda x, table_VD: matmul(x, table_VD.T, None, dtype)
    )


def _num_rows(x: jax.Array) -> int:
    return x.size // x.shape[-1]


def _exactly(x: jax.Array, dtype: Any) -> dict[str, Any]:
    """How every product is made. float32 is not rounded to TF32 on a GPU: the text of a float32
    model must not depend on the tree."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return {"precision": precision, "preferred_element_type": dtype}


def _in_blocks(x: jax.Array, blocks: jax.Array, dtype: Any) -> jax.Array:
    rows_1RD = jnp.reshape(x, (1, _num_rows(x), -1))
    rows_XRD = jnp.broadcast_to(rows_1RD, (blocks.shape[0], *rows_1RD.shape[1:]))
    dimensions = ((2,), (1,)), ((0,), (0,))
    y_XRJ = jax.lax.dot_general(rows_XRD, blocks, dimensions, **_exactly(x, dtype))
    return jnp.reshape(jnp.swapaxes(y_XRJ, 0, 1), (*x.shape[:-1], -1))


def quantized_matmul(
    x: Float[Array, "... D"],
    values: Num[Array, "stored F"],
    scale_SF: Float[Array, "S F"],
    axes: tuple[str | None, str | None],
    backend: Backend = Backend(),
    dtype: Any = None,
) -> Float[Array, "... F"]:
    """x @ (values * scale), by `grouped_matmul` with one group.

    Args:
      values: float8_e4m3fn or int8 [D, F], or int4 as uint8 [D / 2, F].
      scale_SF: float32, for S groups of inputs.
      axes: the logical axes of inputs and outputs, which say what each device of a mesh has: some
        outputs, or some inputs, whose sums are added up.
      dtype: of the result; None: that of x.
    """
    product = functools.partial(
        _one_group, dtype=dtype, implementation=backend.matmul, interpret=backend.interpret
    )
    if backend.mesh is None:
        return product(x, values, scale_SF)
    inputs, outputs = (TENSOR if axis and LOGICAL_AXES[axis] == TENSOR else None for axis in axes)

    def share(x, values, scale_SF):
        y = product(x, values, scale_SF)
        return y if inputs is None else jax.lax.psum(y, TENSOR)

    leading = (backend.batch_spec(x), *(None,) * x.ndim)[: x.ndim - 1]
    groups = inputs if scale_SF.shape[0] > 1 else None
    return backend.on_each_device(
        share,
        (P(*leading, inputs), P(inputs, outputs), P(groups, outputs)),
        P(*leading, outputs),
        check_vma=False,  # the kernel does not say how its output varies
    )(x, values, scale_SF)


def _one_group(x, values, scale_SF, *, dtype, **options):
    rows_RD = jnp.reshape(x, (-1, x.shape[-1]))
    y_RF = grouped_matmul(
        rows_RD, values[None], jnp.zeros(1, jnp.int32),
        scale=scale_SF[None], out_dtype=dtype, **options,
    )  # fmt: skip
    return jnp.reshape(y_RF, (*x.shape[:-1], -1))


def _padded(product, x, kernel_DF):
    """One row as eight. Of one row XLA makes elementwise products and sums on a GPU, some of them
    by way of copies of the weights; eight are a product for the tensor cores."""
    rows_8D = jnp.pad(jnp.reshape(x, (1, -1)), ((0, _GPU_ROWS - 1), (0, 0)))
    return jnp.reshape(product(rows_8D, kernel_DF)[:1], (*x.shape[:-1], -1))


def unpack_params(params: Any) -> Any:
    """`params` without blocks: what is saved, and what a round has to read."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({k: v for k, v in flat.items() if BLOCKS not in k})


def _pays(num_rows: int, num_columns: int) -> bool:
    if num_rows == 1:
        return num_columns <= _MAX_COLUMNS_OF_ONE_ROW
    return num_rows <= _MAX_ROWS and few_rows_pay()


def useful_blocks(kernel_DF: Float[Array, "D F"]) -> Float[Array, "X D J"] | None:
    """The kernel's blocks; None where `matmul` would not use them on this machine."""
    used = _pays(1, kernel_DF.shape[1]) or _pays(2, kernel_DF.shape[1])
    return column_blocks(kernel_DF) if used else None


def column_blocks(kernel_DF: Float[Array, "D F"]) -> Float[Array, "X D J"] | None:
    """The kernel in blocks of 64 columns; None where they do not fill whole blocks."""
    D, F = kernel_DF.shape
    if F % _COLUMNS:
        return None
    return jnp.swapaxes(jnp.reshape(kernel_DF, (D, F // _COLUMNS, _COLUMNS)), 0, 1)


def module_blocks(module: nn.Module, kernel_DF: Float[Array, "D F"]) -> jax.Array | None:
    """The blocks that lie beside a module's kernel. During `pack_params` they are made."""
    if module.is_mutable_collection(_PACKED) and not module.is_initializing():
        blocks = useful_blocks(kernel_DF)
        if blocks is not None:
            module.put_variable(_PACKED, BLOCKS, blocks)
    if module.has_variable("params", BLOCKS):
        return module.get_variable("params", BLOCKS)
    return None


def pack_params(module: nn.Module, params: Any, *args, method: str | None = None) -> Any:
    """`params` with blocks beside the kernels; `args` are a call that reaches every kernel.

    On other backends than a CPU, or spread over several devices, `params` as they are.
    """
    if jax.default_backend() != "cpu" or len(jax.tree.leaves(params)[0].devices()) > 1:
        return params
    made = _blocks(module, method, params, args)
    return traverse_util.unflatten_dict(
        traverse_util.flatten_dict(params) | traverse_util.flatten_dict(made)
    )


@functools.cache
def few_rows_pay() -> bool:
    """Whether this machine multiplies a few rows faster by blocks than by kernels as they lie.

    Measured once a process, in about a second: a chain of products, each of which waits for the one
    before as in a model, over more weights than a cache holds.
    """
    with jax.ensure_compile_time_eval():  # whoever asks may be under a trace
        kernels = [jnp.full(shape, 1e-3) for shape in _PROBE_KERNELS]
        blocks = [column_blocks(kernel) for kernel in kernels]
        x = jnp.ones((_PROBE_ROWS, kernels[0].shape[0]))
        rivals = (kernels, _by_kernels), (blocks, _by_blocks)
        seconds = [[_seconds(chain, x, weights) for weights, chain in rivals] for _ in range(12)]
    as_they_lie, in_blocks = np.min(seconds, axis=0)  # least disturbed by what else runs here
    return bool(in_blocks * _MARGIN < as_they_lie)


def _seconds(chain: Any, x: jax.Array, weights: list[Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(chain(x, weights))
    return time.perf_counter() - begin


@jax.jit
def _by_kernels(x: jax.Array, kernels: list[jax.Array]) -> jax.Array:
    return functools.reduce(lambda x, kernel: matmul(x, kernel, None), kernels, x)


@jax.jit
def _by_blocks(x: jax.Array, blocks: list[jax.Array]) -> jax.Array:
    return functools.reduce(lambda x, each: _in_blocks(x, each, None), blocks, x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _blocks(module: nn.Module, method: str | None, params: Any, args: tuple) -> Any:
    """What the modules put into the collection of packed kernels; the rest is not computed."""
    _, made = module.apply({"params": params}, *args, method=method, mutable=[_PACKED])
    return made.get(_PACKED, {})
