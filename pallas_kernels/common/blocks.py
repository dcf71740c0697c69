"""Lower triangular matrices by block doubling: two blocks of size m and what stands below the first make one of 2m."""

import jax
import jax.numpy as jnp

# Up to this size inverses are taken row by row, on all blocks at once.
_BASE = 8


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
    while blocks_XMM.shape[-1] > _BASE:
        blocks_XMM, below_XMM = part(blocks_XMM)
        below.append(below_XMM)
    blocks_XMM = _substitute(blocks_XMM)
    for below_XMM in reversed(below):
        *_, n, m, _ = below_XMM.shape
        pairs_XMM = blocks_XMM.reshape(*lead, n, 2, m, m)
        a_XMM, b_XMM = pairs_XMM[..., 0, :, :], pairs_XMM[..., 1, :, :]
        # Full float32 products: rounded to bfloat16 the inverse of correlated keys is off by a tenth.
        product_XMM = jnp.matmul(jnp.matmul(b_XMM, below_XMM, precision="highest"), a_XMM, precision="highest")
        blocks_XMM = merge(blocks_XMM, -product_XMM)
    return blocks_XMM.reshape(strict_XLL.shape)


def _substitute(strict_XMM: jax.Array) -> jax.Array:
    m = strict_XMM.shape[-1]
    strict_MMX = jnp.moveaxis(strict_XMM, (-2, -1), (0, 1)).reshape(m, m, -1)  # an entry is a vector of all blocks
    identity_MM1 = jnp.eye(m, dtype=strict_XMM.dtype)[..., None]

    def row(i, inverse_MMX):
        return inverse_MMX.at[i].set(identity_MM1[i] - jnp.sum(strict_MMX[i][:, None] * inverse_MMX, axis=0))

    inverse_MMX = jax.lax.fori_loop(0, m, row, jnp.zeros_like(strict_MMX))
    return jnp.moveaxis(inverse_MMX.reshape(m, m, *strict_XMM.shape[:-2]), (0, 1), (-2, -1))
