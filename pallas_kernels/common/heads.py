"""Heads of a `BTN...` array in TPU kernels, without a pass over the array to bring them apart.

XLA keeps the last two axes of an array in tiles, of 8 x 128 numbers if there are that many. With 8 heads a token's tile
holds one row of each head, with 2 or 4 heads such tiles lie one after another. To bring a head's rows together, by a
transposition or as lanes of `BT(NX)`, costs a copy of the whole array. A kernel that takes all of a token's rows reads
a head as every eighth row, at no cost. In bfloat16 a row of memory holds two heads, each a half of its 32-bit words.

Arrays with other numbers of heads, or wider than 128, are taken as `BNT...`.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

TILE = 8


class Heads:
    """How kernels see an array `[B T M X]`: blocks of `length` tokens and `size` of the M heads.

    `readers` steps, one after another, see the same heads.
    """

    def __init__(self, shape: tuple[int, int, int, int], size: int, length: int, readers: int = 1):
        self._shape, self._size, self._length, self._readers = shape, size, length, readers
        *_, M, X = shape
        self._tiled = X <= 128 and ((size == TILE and M % TILE == 0) or (size == M and M in (2, 4)))

    def spec(self, chunk) -> pl.BlockSpec:
        """Returns the blocks of a grid (row, group of heads, step); `chunk(step)` is the block's place in T."""
        width = self._shape[3]
        group = lambda n: n if self._readers == 1 else jax.lax.div(n, self._readers)
        if self._tiled:
            shape = (None, self._length * self._size // TILE, TILE, width)
            return pl.BlockSpec(shape, lambda b, n, c: (b, chunk(c), group(n), 0))
        return pl.BlockSpec((None, self._size, self._length, width), lambda b, n, c: (b, group(n), chunk(c), 0))

    def shape(self, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        """Returns the shape of the array that kernels see."""
        B, T, M, X = self._shape
        tiles = B, pl.cdiv(T * self._size, TILE), M // self._size * TILE, X
        return jax.ShapeDtypeStruct(tiles if self._tiled else (B, M, T, X), dtype)

    def to_kernel(self, x_BTMX: jax.Array) -> jax.Array:
        if not self._tiled:
            return jnp.moveaxis(x_BTMX, 2, 1)
        missing = -x_BTMX.shape[1] % (TILE // self._size)
        return jnp.pad(x_BTMX, ((0, 0), (0, missing), (0, 0), (0, 0))).reshape(self.shape(x_BTMX.dtype).shape)

    def from_kernel(self, x: jax.Array) -> jax.Array:
        if not self._tiled:
            return jnp.moveaxis(x, 1, 2)
        B, T, M, X = self._shape
        return x.reshape(B, -1, M, X)[:, :T]

    def read(self, ref, head: int, tokens: slice | None = None) -> jax.Array:
        """Returns one head of a block, float32: `tokens` of it, or all."""
        tokens = tokens or slice(0, self._length)
        if not self._tiled:
            return ref[head, tokens].astype(jnp.float32)
        if ref.dtype == jnp.float32:
            return _rows(ref)[self._place(tokens, head, 1)]
        words = _rows(ref).bitcast(jnp.uint32)[self._place(tokens, head, 2)]
        return jax.lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000) if head % 2 else words << 16, jnp.float32)

    def write(self, ref, head: int, values: list[jax.Array], tokens: slice | None = None) -> None:
        """Writes heads `head, head + 1 ..`: tiles of bfloat16 take an even number of them, from an even one on."""
        tokens = tokens or slice(0, self._length)
        if not self._tiled:
            for i, value in enumerate(values):
                ref[head + i, tokens] = value.astype(ref.dtype)
        elif ref.dtype == jnp.float32:
            for i, value in enumerate(values):
                _rows(ref)[self._place(tokens, head + i, 1)] = value
        else:
            bits = lambda x: jax.lax.bitcast_convert_type(x.astype(ref.dtype).astype(jnp.float32), jnp.uint32)
            for i in range(0, len(values), 2):
                words = bits(values[i]) >> 16 | bits(values[i + 1])
                _rows(ref).bitcast(jnp.uint32)[self._place(tokens, head + i, 2)] = words

    def _place(self, tokens: slice, head: int, per_word: int):
        """Where the rows of a head lie, if a row of memory holds `per_word` of the heads."""
        stride = self._size // per_word
        return pl.ds(tokens.start * stride + head // per_word, tokens.stop - tokens.start, stride=stride)


def _rows(ref):
    return ref.reshape(ref.shape[0] * ref.shape[1], ref.shape[2])
