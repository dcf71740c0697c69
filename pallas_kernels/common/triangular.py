"""The inverse of I + A inside of TPU kernels, A [L L] strictly lower triangular: what `blocks.inverse` is for XLA.

Blocks of 16 are inverted by substitution, row by row; then two neighbours of size m make one of 2m, which is exact
algebra in two products, `[[E, 0], [A, O]]^-1 = [[E^-1, 0], [-O^-1 A E^-1, O^-1]]`. Both keep the accuracy of
substitution. (The Neumann product `(I - A)(I + A^2)(I + A^4)..` does not: with correlated keys its factors grow beyond
1e20 and cancel.)

All blocks of one size are kept side by side, `[m L]`: that is the sum of the rows of blocks of a block-diagonal matrix,
so that no number ever leaves its lane; and one product with a block-diagonal matrix multiplies each block by its own.
The blocks that a level multiplies fill half of the lanes. Two matrices share a product: the blocks at even places are
those of one, the ones at odd places those of the other.

Rows do not depend on later ones, to the bit: what they are multiplied by there is 0.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

_SMALL = 16


def inverses(strict: list[jax.Array], exact: bool) -> list[jax.Array]:
    """Returns `(I + A)^-1` of float32 matrices `[L L]` that are 0 on and above the diagonal; L is a multiple of 128.

    Factors are sums of bfloat16 numbers: three if `exact`, which is float32; else two, which leaves an error of 1e-5.
    """
    # All take a step together: while the matrix unit is at one pair, the others have something to do.
    found = [_substitute(_diagonal(a_LL, _SMALL)) for a_LL in strict]
    while found[0].shape[0] < strict[0].shape[0]:
        pairs = [(n, min(n + 1, len(strict) - 1)) for n in range(0, len(strict), 2)]
        doubled = [_double(strict[i], strict[j], found[i], found[j], 3 if exact else 2) for i, j in pairs]
        found = [x for pair in doubled for x in pair][: len(strict)]
    return found


def _double(a_LL: jax.Array, b_LL: jax.Array, a_ML: jax.Array, b_ML: jax.Array, num_parts: int) -> list[jax.Array]:
    """Makes one of two neighbouring blocks, in two matrices `_LL` whose inverted blocks are `_ML`."""
    m, L = a_ML.shape
    even = (_lane((m, L)) & m) == 0
    right, left = lambda x_ML: pltpu.roll(x_ML, m, 1), lambda x_ML: pltpu.roll(x_ML, L - m, 1)
    below = jnp.where(even, _below(a_LL, m), right(_below(b_LL, m)))
    product = _multiply(below, jnp.where(even, a_ML, right(b_ML)), num_parts)
    product = -_multiply(jnp.where(even, left(a_ML), b_ML), product, num_parts)
    return [
        jnp.concatenate([jnp.where(even, blocks, 0), jnp.where(even, corner, blocks)])
        for blocks, corner in ((a_ML, product), (b_ML, left(product)))
    ]


def _lane(shape: tuple[int, int]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _diagonal(a_LL: jax.Array, m: int) -> jax.Array:
    """Returns the blocks of size m on the diagonal, side by side."""
    lane, found = _lane((m, a_LL.shape[1])), a_LL[:m]
    for start in range(m, a_LL.shape[0], m):
        found = jnp.where(lane < start, found, a_LL[start : start + m])
    return found


def _below(a_LL: jax.Array, m: int) -> jax.Array:
    """Returns the blocks below the first of two on the diagonal, at the even places, and anything at the odd ones."""
    lane, found = _lane((m, a_LL.shape[1])), a_LL[m : 2 * m]
    for start in range(2 * m, a_LL.shape[0], 2 * m):
        found = jnp.where(lane < start, found, a_LL[start + m : start + 2 * m])
    return found


def _substitute(strict_ML: jax.Array) -> jax.Array:
    """Inverts I + the blocks."""
    m, L = strict_ML.shape
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (m, L), axis) for axis in (0, 1))
    found = jnp.where((lane & (m - 1)) == row, 1.0, 0.0)
    for j in range(m - 1):
        # Row j is done, and leaves the rows below it.
        column = jnp.take_along_axis(strict_ML, (lane & -m) + j, axis=1)
        found -= column * found[j : j + 1]
    return found


def _multiply(a_ML: jax.Array, b_ML: jax.Array, num_parts: int) -> jax.Array:
    """Returns the product of each block of a by that of b at its place."""
    m, a_parts, products = a_ML.shape[0], _split(a_ML, num_parts), []
    for i, b in enumerate(_split(b_ML, num_parts)):
        rows = jnp.concatenate(a_parts[: num_parts - i])
        found = jnp.dot(rows, _block_diagonal(b), preferred_element_type=jnp.float32)
        products += [found[start : start + m] for start in range(0, found.shape[0], m)]
    return functools.reduce(jnp.add, products[::-1])  # small ones first


def _split(x_ML: jax.Array, num_parts: int) -> list[jax.Array]:
    parts = []
    for _ in range(num_parts):
        parts.append(x_ML.astype(jnp.bfloat16))
        x_ML = x_ML - parts[-1].astype(jnp.float32)
    return parts


def _block_diagonal(b_ML: jax.Array) -> jax.Array:
    """Returns `[L L]`. A word holds two rows, and both are of one block."""
    m, L = b_ML.shape
    words = pltpu.bitcast(b_ML, jnp.int32)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (L // 2, L), axis) for axis in (0, 1))
    words = jnp.concatenate([words] * (L // m)) & jnp.where((2 * row) // m == lane // m, -1, 0)
    return pltpu.bitcast(words, jnp.bfloat16)
