"""Lower triangular matrices by block doubling: two blocks of size m and what stands below the first make one of 2m."""

import jax
import jax.numpy as jnp

# Products of matrices up to this size are sums of products: a call to a matmul would cost more.
_TINY = 4


def merge(blocks_XMM: jax.Array, below_XMM: jax.Array) -> jax.Array:
    """Returns [[even, 0], [below, odd]] for each pair of neighbours in `blocks [.. 2n m m]`, `below [.. n m m]`."""
    *lead, n, m, _ = below_XMM.shape
    blocks_XMM = blocks_XMM.reshape(*lead, n, 2, m, m)
    even_XMM, odd_XMM = blocks_XMM[..., 0, :, :], blocks_XMM[..., 1, :, :]
    upper = jnp.concatenate([even_XMM, jnp.zeros_like(even_XMM)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([below_XMM, odd_XMM], axis=-1)], axis=-2)


def part(blocks_XMM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Undoes `merge`: returns the 2n blocks on the diagonals and the n below."""
    *lead, n, m, _ = blocks_XMM.shape
    h = m // 2
    diagonal = jnp.stack([blocks_XMM[..., :h, :h], blocks_XMM[..., h:, h:]], axis=-3)
    return diagonal.reshape(*lead, 2 * n, h, h), blocks_XMM[..., h:, :h]


def inverse(strict_XLL: jax.Array) -> jax.Array:
    """Returns `(I + strict)^-1` for strictly lower triangular matrices whose size is a power of two.

    Each doubling is exact algebra, `[[A, 0], [M, B]]^-1 = [[A^-1, 0], [-B^-1 M A^-1, B^-1]]`, in matmuls, and keeps the
    accuracy of substitution. (The Neumann product `(I - M)(I + M^2)(I + M^4)..` does not: with correlated keys its
    factors grow beyond 1e20 and cancel.)
    """
    *lead, L, _ = strict_XLL.shape
    blocks_XMM, below = strict_XLL.reshape(*lead, 1, L, L), []
    while blocks_XMM.shape[-1] > 1:
        blocks_XMM, below_XMM = part(blocks_XMM)
        below.append(below_XMM)
    blocks_XMM = jnp.ones_like(blocks_XMM)
    for below_XMM in reversed(below):
        *_, n, m, _ = below_XMM.shape
        pairs_XMM = blocks_XMM.reshape(*lead, n, 2, m, m)
        a_XMM, b_XMM = pairs_XMM[..., 0, :, :], pairs_XMM[..., 1, :, :]
        blocks_XMM = merge(blocks_XMM, -_multiply(_multiply(b_XMM, below_XMM), a_XMM))
    return blocks_XMM.reshape(strict_XLL.shape)


def _multiply(a_XMM: jax.Array, b_XMM: jax.Array) -> jax.Array:
    if a_XMM.shape[-1] <= _TINY:
        return jnp.sum(a_XMM[..., :, :, None] * b_XMM[..., None, :, :], axis=-2)
    # In full float32: rounded to bfloat16 the inverse of correlated keys is off by a tenth.
    return jnp.matmul(a_XMM, b_XMM, precision="highest")
