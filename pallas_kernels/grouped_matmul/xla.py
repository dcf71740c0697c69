"""`grouped_matmul` in tiles of rows: a loop of plain matmuls, as long as the groups of the day need.

`jax.lax.ragged_dot` multiplies every row with every matrix wherever XLA has no kernel for it, a CPU included.
"""

import jax
import jax.numpy as jnp

MAX_TILE = 128


def forward(x, w, group_sizes):
    return _multiply(x, w, group_sizes).astype(x.dtype)


def backward(x, w, group_sizes, dy):
    """Returns the gradients of x and w."""
    dx = _multiply(dy, w.swapaxes(1, 2), group_sizes).astype(x.dtype)
    tile, num_tiles, locate = _tiles(x.shape[0], group_sizes)
    x, dy = _pad(x, tile), _pad(dy, tile)

    def add(i, dw_EDF):
        group, first, is_in_L = locate(i)
        # Both are masked: after the last group there may be anything, and 0 * NaN is NaN.
        x_LD, dy_LF = (jnp.where(is_in_L[:, None], jax.lax.dynamic_slice_in_dim(a, first, tile), 0) for a in (x, dy))
        dw_DF = dw_EDF[group] + jnp.einsum("LD,LF->DF", x_LD, dy_LF, preferred_element_type=dw_EDF.dtype)
        return jax.lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, group, 0)

    dw_EDF = jax.lax.fori_loop(0, num_tiles, add, jnp.zeros(w.shape, jnp.promote_types(jnp.float32, x.dtype)))
    return dx, dw_EDF.astype(w.dtype)


def _multiply(x, w, group_sizes):
    num_rows, dtype = x.shape[0], jnp.promote_types(jnp.float32, x.dtype)
    tile, num_tiles, locate = _tiles(num_rows, group_sizes)
    x = _pad(x, tile)

    def write(i, y_RF):
        group, first, is_in_L = locate(i)
        x_LD = jax.lax.dynamic_slice_in_dim(x, first, tile)
        y_LF = jnp.einsum("LD,DF->LF", x_LD, w[group], preferred_element_type=dtype)
        # A tile reaches into the next groups, whose own tiles come later and write over it.
        return jax.lax.dynamic_update_slice_in_dim(y_RF, jnp.where(is_in_L[:, None], y_LF, 0), first, 0)

    y_RF = jax.lax.fori_loop(0, num_tiles, write, jnp.zeros((x.shape[0], w.shape[2]), dtype))
    return y_RF[:num_rows]


def _tiles(num_rows, group_sizes):
    """Returns the size of tiles, how many there are, and where one is: its group, first row, which rows are in it."""
    num_groups = group_sizes.shape[0]
    # Half a tile per group is wasted on average: not more than the rows themselves, if they are spread evenly.
    tile = MAX_TILE
    while tile > 8 and tile * num_groups > num_rows:
        tile //= 2
    tiles_E = -(-group_sizes // tile)
    tile_ends_E, row_ends_E = jnp.cumsum(tiles_E), jnp.cumsum(group_sizes)

    def locate(i):
        group = jnp.searchsorted(tile_ends_E, i, side="right").astype(jnp.int32)
        first = row_ends_E[group] - group_sizes[group] + (i - tile_ends_E[group] + tiles_E[group]) * tile
        return group, first, first + jnp.arange(tile) < row_ends_E[group]

    return tile, tile_ends_E[-1], locate


def _pad(x, tile):
    return jnp.pad(x, ((0, tile), (0, 0)))
