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

TILE = 8


class Heads:
    """How kernels see `x [B T M X]` whose heads come `size` at a time, in blocks of `length` tokens.

    With `share` steps of the kernel reading one head, size is 1 and the block is the same for all of them.
    """

    def __init__(self, num_heads: int, size: int, length: int, share: int = 1):
        self.size, self._length, self._share = size, length, share
        self._tiled = size == TILE and num_heads % TILE == 0

    def spec(self, width: int, chunk) -> pl.BlockSpec:
        """Returns the block of a grid (row, group of heads, step), `chunk(step)` being the block's place in T."""
        block = lambda n: jax.lax.div(n, self._share)
        if self._tiled:
            return pl.BlockSpec((None, self._length, TILE, width), lambda b, n, c: (b, chunk(c), block(n), 0))
        shape = (None, self.size, self._length, width)
        return pl.BlockSpec(shape, lambda b, n, c: (b, block(n), chunk(c), 0))

    def shape(self, x_shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        """Returns the shape of the array that the kernel takes."""
        B, T, M, X = x_shape
        return jax.ShapeDtypeStruct(x_shape if self._tiled else (B, M, T, X), dtype)

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
