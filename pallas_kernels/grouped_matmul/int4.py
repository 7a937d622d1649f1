"""Two 4-bit integers a byte, laid out for a matrix unit.

Inputs form groups of G: the ones that share a scale. Within a group, byte row j holds input j in
its low half and input j + G/2 in its high half. So a block of byte rows is two blocks of
neighbouring inputs, one shift apart, and a kernel multiplies both without moving a value.

A value v of -8..7 is stored as v + 8: a bfloat16 whose last bits are those four is 128 + v + 8.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int8, UInt8

OFFSET = 8


def pack_int4(values: Int8[Array, "*E D F"], group: int) -> UInt8[Array, "*E D/2 F"]:
    """Bytes of `values`, which lie in -8..7.

    Args:
      group: inputs that share a scale, an even number that divides D; D for a scale a channel.

    Raises:
      ValueError: a group that is odd or does not divide the inputs.
    """
    *experts, D, F = values.shape
    if group < 2 or group % 2 or D % group:
        raise ValueError(f"a group of {group} inputs is odd or does not divide {D} inputs")
    stored = (values + jnp.int8(OFFSET)).astype(jnp.uint8)
    stored = jnp.reshape(stored, (*experts, D // group, 2, group // 2, F))
    low, high = stored[..., 0, :, :], stored[..., 1, :, :]
    return jnp.reshape(low | (high << 4), (*experts, D // 2, F))


def unpack_int4(packed: UInt8[Array, "*E D/2 F"], group: int) -> Int8[Array, "*E D F"]:
    """What `pack_int4` was given."""
    *experts, half, F = packed.shape
    packed = jnp.reshape(packed, (*experts, 2 * half // group, group // 2, F))
    stored = jnp.stack([packed & 15, packed >> 4], axis=-3)
    return jnp.reshape(stored, (*experts, 2 * half, F)).astype(jnp.int8) - jnp.int8(OFFSET)
