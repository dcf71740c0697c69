"""Products of float32 matrices whose every entry is right to the last bit or so.

A sum of many float32 products is off by several units in the last place, and a triangular system that is made of such
sums, of keys that are all alike, multiplies the error by ten.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# The smallest step; of numbers below, none matters.
_LEAST = 2.0**-100

Product = Callable[[jax.Array, jax.Array], jax.Array]


def accurate(
    product: Product, x: jax.Array, y: jax.Array, axes: tuple[int, int] = (-1, -1), y_sizes: jax.Array | None = None
) -> jax.Array:
    """Returns `product(x, y)`, which sums over one axis of x and one of y, `axes`; 512 numbers at most.

    The upper eight bits of x and y, counted from the largest number along the axis, are multiples of one number, and so
    are their products and all sums of those: float32 holds them exactly, in whatever order they are added. What the
    lower bits add is small, and so is the error of it.

    Args:
      y_sizes: what to count the bits of y from instead, such as the sizes of its own numbers: where the axis runs over
        tokens, later ones would change the last bits of earlier ones. Sums then are exact but for small numbers.
    """
    if x.dtype != jnp.float32:
        return product(x, y)
    upper, lower = _parts(product, x, y, axes, y_sizes)
    return upper + lower


def with_rest(product: Product, x: jax.Array, y: jax.Array, axes: tuple[int, int] = (-1, -1)) -> list[jax.Array]:
    """Returns what `accurate` does, of float32, and what float32 does not hold of it."""
    upper, lower = _parts(product, x, y, axes, None)
    total = upper + lower
    return [total, (upper - total) + lower]


def rest_of_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns what float32 does not hold of x * y, entry by entry."""
    (x_upper, x_lower), (y_upper, y_lower) = (_halves(a) for a in (x, y))
    return ((x_upper * y_upper - x * y) + x_upper * y_lower + x_lower * y_upper) + x_lower * y_lower


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    upper = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & -(1 << 12), jnp.float32)
    return upper, x - upper


def _parts(
    product: Product, x: jax.Array, y: jax.Array, axes: tuple[int, int], y_sizes: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    largest = lambda x, axis: jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    x_upper, x_lower = _split(x, largest(x, axes[0]))
    y_upper, y_lower = _split(y, largest(y, axes[1]) if y_sizes is None else y_sizes)
    return product(x_upper, y_upper), product(x_upper, y_lower) + product(x_lower, y)


def _split(x: jax.Array, largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000, jnp.float32)
    step = jnp.maximum(power * 2.0**-6, _LEAST)
    # The reciprocal of a power of two, without a division, for which kernels would ask what chip they are for.
    steps = jax.lax.bitcast_convert_type(0x7F000000 - jax.lax.bitcast_convert_type(step, jnp.int32), jnp.float32)
    upper = jnp.round(x * steps) * step
    return upper, x - upper
