"""How the TPU kernels of linear attention see their arguments: heads in blocks, decays as cumulative logs."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.common.documents import clear_padding

CHUNK = 128
TILE = 8  # sublanes of a register
# exp(-128) is 0 in float32: closed gates (-inf, too) stop here.
_MIN_LOG = -128.0


def padded(width: int) -> int:
    return width + -width % 64


@dataclasses.dataclass(frozen=True)
class Heads:
    """Blocks of `size` of the N heads of an array `[B T N width]`.

    Eight heads of width 128 are tiles: they are read as they lie in HBM, and kernels pick every eighth row. Others XLA
    puts first, `[B N T width]`, which costs a pass over the array unless what made it can write it so.
    """

    size: int
    num: int
    width: int
    dtype: jnp.dtype

    @property
    def in_place(self) -> bool:
        return self.width == 128 and self.size == TILE

    def shape(self, B: int, T: int) -> jax.ShapeDtypeStruct:
        in_place = B, T, self.num // self.size, self.size, self.width
        return jax.ShapeDtypeStruct(in_place if self.in_place else (B, self.num, T, padded(self.width)), self.dtype)

    def spec(self, tokens: int, index: Callable[..., tuple]) -> pl.BlockSpec:
        """`index` gives the block's row, heads and tokens from the grid's indices."""
        if self.in_place:

            def in_place(*grid):
                b, n, t = index(*grid)
                return b, t, n, 0, 0

            return pl.BlockSpec((None, tokens, 1, self.size, self.width), in_place)
        return pl.BlockSpec((None, self.size, tokens, padded(self.width)), lambda *grid: (*index(*grid), 0))

    def pack(self, x_BTNW: jax.Array, T: int) -> jax.Array:
        """Returns x as the kernels take it, filled up to T tokens."""
        x_BTNW = jnp.pad(x_BTNW, ((0, 0), (0, T - x_BTNW.shape[1]), (0, 0), (0, 0)))
        if self.in_place:
            return x_BTNW.reshape(self.shape(*x_BTNW.shape[:2]).shape)
        return jnp.pad(jnp.moveaxis(x_BTNW, 2, 1), ((0, 0), (0, 0), (0, 0), (0, padded(self.width) - self.width)))

    def unpack(self, x: jax.Array, T: int) -> jax.Array:
        """Returns `[B T N width]` from what a kernel wrote."""
        if self.in_place:
            return x.reshape(*x.shape[:2], self.num, self.width)[:, :T]
        return jnp.moveaxis(x, 1, 2)[:, :T, :, : self.width]


class Block:
    """A block of heads in VMEM. Of those in place, a 32-bit word holds a row of two bfloat16 heads."""

    def __init__(self, ref):
        self._ref, self._in_place, self._packed = ref, len(ref.shape) == 4, ref.dtype == jnp.bfloat16
        self.num_heads = ref.shape[2] if self._in_place else ref.shape[0]
        if self._in_place:
            words = ref.reshape(ref.shape[0] * TILE, ref.shape[3])
            self._words = words.bitcast(jnp.int32) if self._packed else words

    def get(self, rows: slice, n: int) -> jax.Array:
        """Returns head n, `[L, width]`."""
        if not self._in_place:
            return self._ref[n, rows]
        if not self._packed:
            return self._words[self._every(rows, n)]
        word = self._words[self._every(rows, n // 2)]
        upper = word << 16 if n % 2 == 0 else word & -(1 << 16)
        # As float32 a bfloat16 number stands in the upper half of the word.
        return jax.lax.bitcast_convert_type(upper, jnp.float32).astype(jnp.bfloat16)

    def put(self, rows: slice, n: int, x: jax.Array) -> None:
        """Writes head n, `[L, width]`. All heads have to be written, in order."""
        x = x.astype(self._ref.dtype)
        if not self._in_place:
            self._ref[n, rows] = x
        elif not self._packed:
            self._words[self._every(rows, n)] = x
        elif n % 2 == 0:
            self._even = x
        else:
            low, high = (jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) for x in (self._even, x))
            self._words[self._every(rows, n // 2)] = jax.lax.shift_right_logical(low, 16) | high

    def _every(self, rows, n):
        stride = TILE // 2 if self._packed else TILE
        return pl.ds(rows.start * stride + n, rows.stop - rows.start, stride=stride)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What one grid step takes: `heads` value heads, `key_heads` key heads, `tokens` tokens of one row."""

    B: int
    T: int
    K: int
    N: int
    H: int
    P: int

    @functools.cached_property
    def heads(self) -> int:
        """As many as 8, fewer where they are wide; they share key heads, or belong to one."""
        G, most = self.N // self.K, max(1, TILE * 128 * 128 // max(128 * 128, self.H * self.P))
        return max(n for n in range(1, most + 1) if self.N % n == 0 and (n % G == 0 or G % n == 0))

    @property
    def key_heads(self) -> int:
        return max(1, self.heads * self.K // self.N)

    @property
    def num_parts(self) -> int:
        """Over so many steps are the gradients of a key head spread."""
        return max(1, self.N // self.K // self.heads)

    @property
    def padded_T(self) -> int:
        return self.T + -self.T % CHUNK

    @property
    def tokens(self) -> int:
        return CHUNK if self.padded_T % (2 * CHUNK) else 2 * CHUNK

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.B, self.N // self.heads, self.padded_T // self.tokens

    def state_shape(self) -> tuple[int, int, int, int]:
        return self.B, self.N, padded(self.H), padded(self.P)


def cumulative_logs(g_BTN: jax.Array, segment_ids: jax.Array, tiles: Tiles, num_parts: int, before: bool) -> jax.Array:
    """Returns the logs of g cumulated within chunks, `[B, N / heads, X, 8, T]`.

    X holds the parts of the sums up to and with each token, then, if `before`, those of the sums before it. With two
    parts, one is a multiple of 1/64, whose sums are exact, and one a small rest: float32 differences lose nothing where
    a decay of -30 stands beside one of -0.01. Beside bfloat16 products one part is enough.
    """
    B, T, N = g_BTN.shape
    g_BTN = jnp.maximum(clear_padding(g_BTN, segment_ids), _MIN_LOG)
    g_BTN = jnp.pad(g_BTN, ((0, 0), (0, tiles.padded_T - T), (0, 0)))
    g = jnp.moveaxis(g_BTN.reshape(B, -1, CHUNK, N // tiles.heads, tiles.heads), (3, 4), (1, 2))
    parts = [g]
    if num_parts == 2:
        coarse = jnp.ceil(g * 64) / 64
        parts = [coarse, g - coarse]
    g = jnp.stack(parts, axis=2)
    # A constant of the program: XLA would take longer to make it than to multiply by it.
    upper_LL = np.triu(np.ones((CHUNK, CHUNK), np.float32))
    logs = jnp.einsum("BnxhCL,LM->BnxhCM", g, upper_LL, precision="highest")
    if before:
        logs = jnp.concatenate([logs, logs - g], axis=2)
    logs = logs.reshape(*logs.shape[:4], tiles.padded_T)
    return jnp.pad(logs, ((0, 0), (0, 0), (0, 0), (0, TILE - tiles.heads), (0, 0)))


def gate_gradient(sums: jax.Array, segment_ids: jax.Array, tiles: Tiles, before: bool) -> jax.Array:
    """Returns the gradient of g `BTN` from the sums `[B, N / heads, 3, 8, T]` of `common/decays.py`.

    They are rows, with those of pairs, columns of pairs (less `whole` at a chunk's last token) and puts.
    """
    sums = sums[:, :, :, : tiles.heads].reshape(*sums.shape[:3], tiles.heads, -1, CHUNK)
    ones = np.ones((CHUNK, CHUNK), np.float32)
    weights = np.stack([np.tril(ones, -1 if before else 0), -np.tril(ones), np.triu(ones, 1)])
    dg = jnp.einsum("BnxhCL,xLM->BCMnh", sums, weights, precision="highest")
    dg_BTN = dg.reshape(tiles.B, tiles.padded_T, tiles.N)[:, : tiles.T]
    return clear_padding(dg_BTN, segment_ids)
