"""What depends on the JAX version or on XLA's habits, in one place.

Also the only module that may name the Triton and Mosaic GPU modules: they move between versions.
"""

import warnings

import jax
import jax.numpy as jnp

with warnings.catch_warnings():  # deprecated since JAX 0.11, which nothing here can help
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas import triton as triton


def order_after(x: jax.Array, integers: jax.Array) -> jax.Array:
    """`integers` as they are, but computed after `x` as far as XLA can tell.

    XLA orders operations by data flow alone. Two places need more: a write to the KV cache that has
    to follow the last read (or XLA copies the whole cache to be safe), and page gathers that should
    wait for their layer (or those of all layers run first and fill the memory). It drops an
    optimization_barrier before it looks for copies, so the dependency is a zero that it cannot see.
    """
    first = jax.lax.bitcast_convert_type(jnp.ravel(x)[0].astype(jnp.float32), jnp.int32)
    return integers + ((first & 1) >> 1)
