"""`grouped_matmul` on TPU: JAX's megablox, https://arxiv.org/abs/2211.15841."""

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

INTERPRET = False  # Tests set it, to run the kernels on a CPU.

# Of a row of a tile. With it, two tiles of each operand and the sums take 9 MiB of the 16 that every chip has.
MAX_BYTES = 2048


def unsupported(x, w):
    """Returns why these arguments need another implementation, or None."""
    if x.dtype not in (jnp.float32, jnp.bfloat16) or w.dtype != x.dtype:
        return f"x {x.dtype} with w {w.dtype}; both have to be float32, or both bfloat16"
    return None


def forward(x, w, group_sizes):
    return _multiply(x, w, group_sizes, transpose=False)


def backward(x, w, group_sizes, dy):
    """Returns the gradients of x and w."""
    dx = _multiply(dy, w, group_sizes, transpose=True)
    x, dy = _pad(x), _pad(dy)
    tiles = _tiles(x.shape[0], x.shape[1], dy.shape[1], x.dtype)
    dw = tgmm(x.T, dy, group_sizes, w.dtype, tiles, interpret=INTERPRET)
    return dx, dw


def _multiply(x, w, group_sizes, transpose):
    num_rows, (D, F) = x.shape[0], w.shape[1:] if not transpose else w.shape[:0:-1]
    x = _pad(x)
    tiles = _tiles(x.shape[0], D, F, x.dtype)
    y = gmm(x, w, group_sizes, x.dtype, tiles, transpose_rhs=transpose, interpret=INTERPRET)[:num_rows]
    # Nobody writes the tiles after the last group.
    return jnp.where(jnp.arange(num_rows)[:, None] < jnp.sum(group_sizes), y, 0)


def _pad(x):
    """The kernels want a whole number of tiles."""
    return jnp.pad(x, ((0, -x.shape[0] % _row_tile(x.shape[0])), (0, 0)))


def _row_tile(num_rows):
    return next((tile for tile in (512, 256) if num_rows >= 2 * tile), 128)


def _tiles(num_rows, D, F, dtype):
    """Returns the tiles of rows, of D and of F."""
    largest = MAX_BYTES // dtype.itemsize
    fit = lambda size: min(largest, size + -size % 128)
    return _row_tile(num_rows), fit(D), fit(F)
