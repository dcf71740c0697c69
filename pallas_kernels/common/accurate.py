"""Products of float32 matrices whose every entry is right to the last bit or so.

A sum of many float32 products is off by several units in the last place, and a triangular system that is made of such
sums, of keys that are all alike, multiplies the error by ten.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# The smallest step; of numbers below, none matters.
_LEAST = 2.0**-100


def accurate(product: Callable[[jax.Array, jax.Array], jax.Array], x_XH: jax.Array, y_XH: jax.Array) -> jax.Array:
    """Returns `product(x, y)`, which sums over the last axis of both; 512 numbers at most.

    The upper eight bits of x and y, counted from each row's largest number, are multiples of one number, and so are
    their products and all sums of those: float32 holds them exactly. What the lower bits add is small, and so is the
    error of it.
    """
    if x_XH.dtype != jnp.float32:
        return product(x_XH, y_XH)
    (x_upper_XH, x_lower_XH), (y_upper_XH, y_lower_XH) = _split(x_XH), _split(y_XH)
    return product(x_upper_XH, y_upper_XH) + (product(x_upper_XH, y_lower_XH) + product(x_lower_XH, y_XH))


def _split(x_XH: jax.Array) -> tuple[jax.Array, jax.Array]:
    largest_X1 = jnp.max(jnp.abs(x_XH), axis=-1, keepdims=True)
    power_X1 = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(largest_X1, jnp.int32) & 0x7F800000, jnp.float32
    )
    step_X1 = jnp.maximum(power_X1 * 2.0**-6, _LEAST)
    # The reciprocal of a power of two, without a division, for which kernels would ask what chip they are for.
    steps_X1 = jax.lax.bitcast_convert_type(0x7F000000 - jax.lax.bitcast_convert_type(step_X1, jnp.int32), jnp.float32)
    upper_XH = jnp.round(x_XH * steps_X1) * step_X1
    return upper_XH, x_XH - upper_XH
