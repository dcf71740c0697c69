"""Heads of a `BTN...` array in TPU kernels, without a pass over the array to bring them apart.

XLA keeps the last two axes of an array in tiles of 8 x 128. With 8 heads a token's tile holds one row of each head, and
bringing a head's rows together, by a transposition or as lanes of `BT(NH)`, costs a copy of the whole array. A kernel
that takes all 8 heads of its tokens reads a head as every eighth row, at no cost. In bfloat16 a row holds two heads, of
which each is the half of a 32-bit word.

Arrays whose number of heads is no multiple of 8 are taken as `BNT...`.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

TILE = 8


class Heads:
    """How kernels see `x [B T M X]`: blocks of `length` tokens and `size` of the M heads.

    `readers` steps, one after another, see the same heads.
    """

    def __init__(self, shape_BTM: tuple[int, int, int], size: int, length: int, readers: int = 1):
        self._shape_BTM, self._size, self._length, self._readers = shape_BTM, size, length, readers
        self._tiled = size == TILE and shape_BTM[2] % TILE == 0

    def spec(self, width: int, chunk) -> pl.BlockSpec:
        """Returns the blocks of a grid (row, group of heads, step); `chunk(step)` is the block's place in T."""
        group = lambda n: n if self._readers == 1 else jax.lax.div(n, self._readers)
        if self._tiled:
            return pl.BlockSpec((None, self._length, TILE, width), lambda b, n, c: (b, chunk(c), group(n), 0))
        return pl.BlockSpec((None, self._size, self._length, width), lambda b, n, c: (b, group(n), chunk(c), 0))

    def shape(self, width: int, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        """Returns the shape of what kernels write."""
        B, T, M = self._shape_BTM
        return jax.ShapeDtypeStruct((B, T, M, width) if self._tiled else (B, M, T, width), dtype)

    def to_kernel(self, x_BTMX: jax.Array) -> jax.Array:
        return x_BTMX if self._tiled else jnp.moveaxis(x_BTMX, 2, 1)

    def from_kernel(self, x: jax.Array) -> jax.Array:
        return x if self._tiled else jnp.moveaxis(x, 1, 2)

    def read(self, ref, head: int) -> jax.Array:
        """Returns one head of a block, float32."""
        if not self._tiled:
            return ref[head].astype(jnp.float32)
        if ref.dtype == jnp.float32:
            return _rows(ref)[pl.ds(head, self._length, stride=TILE)]
        words = _rows(ref).bitcast(jnp.uint32)[pl.ds(head // 2, self._length, stride=TILE // 2)]
        return jax.lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000) if head % 2 else words << 16, jnp.float32)

    def write(self, ref, head: int, values: list[jax.Array]) -> None:
        """Writes heads `head, head + 1 ..`: tiles of bfloat16 take an even number of them, from an even one on."""
        if not self._tiled:
            for i, value in enumerate(values):
                ref[head + i] = value.astype(ref.dtype)
        elif ref.dtype == jnp.float32:
            for i, value in enumerate(values):
                _rows(ref)[pl.ds(head + i, self._length, stride=TILE)] = value
        else:
            bits = lambda x: jax.lax.bitcast_convert_type(x.astype(ref.dtype).astype(jnp.float32), jnp.uint32)
            for i in range(0, len(values), 2):
                place = pl.ds((head + i) // 2, self._length, stride=TILE // 2)
                _rows(ref).bitcast(jnp.uint32)[place] = bits(values[i]) >> 16 | bits(values[i + 1])


def _rows(ref):
    return ref.reshape(ref.shape[0] * ref.shape[1], ref.shape[2])
