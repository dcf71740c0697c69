"""How the TPU kernels of linear attention see their arguments: heads in blocks, decays as cumulative logs."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.documents import clear_padding, fill_padding

CHUNK = 128
TILE = 8  # sublanes of a register
# exp(-128) is 0 in float32: closed gates (-inf, too) stop here.
_MIN_LOG = -128.0


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

    def words(self, tokens: int):
        """Returns the scratch memory that `load` or `store` of one array wants."""
        if not self.in_place:
            return pltpu.VMEM((TILE, 128), jnp.float32)
        if self.dtype == jnp.float32:
            return pltpu.VMEM((tokens * self.size, self.width), jnp.float32)
        return pltpu.VMEM((tokens * self.size // 2, self.width), jnp.int32)

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


def load(ref, words, rows: slice) -> list[jax.Array]:
    """Returns the heads of a block, each `[rows, width]`."""
    if len(ref.shape) == 3:
        return [ref[n, rows] for n in range(ref.shape[0])]
    # Only words of 32 bits can be loaded with a stride; each holds one row of two bfloat16 heads.
    L, _, N, width = ref[rows].shape
    x = ref[rows].reshape(L * N, width)
    per_token = words.shape[0] // ref.shape[0]
    words[_span(rows, per_token)] = x if ref.dtype == jnp.float32 else pltpu.bitcast(x, jnp.int32)
    strided = [words[pl.ds(rows.start * per_token + i, L, stride=per_token)] for i in range(per_token)]
    if ref.dtype == jnp.float32:
        return strided
    halves = [half for word in strided for half in (word << 16, word & -(1 << 16))]
    return [jax.lax.bitcast_convert_type(half, jnp.float32).astype(ref.dtype) for half in halves]


def store(ref, words, rows: slice, heads: list[jax.Array]) -> None:
    """Writes the heads of a block."""
    if len(ref.shape) == 3:
        for n, x in enumerate(heads):
            ref[n, rows] = x.astype(ref.dtype)
        return
    per_token = words.shape[0] // ref.shape[0]
    if ref.dtype != jnp.float32:
        # What is rounded to bfloat16 stands in the upper half of the float32 word.
        halves = [jax.lax.bitcast_convert_type(x.astype(ref.dtype).astype(jnp.float32), jnp.int32) for x in heads]
        heads = [
            jax.lax.shift_right_logical(low, 16) | high for low, high in zip(halves[::2], halves[1::2], strict=True)
        ]
    for i, x in enumerate(heads):
        words[pl.ds(rows.start * per_token + i, CHUNK, stride=per_token)] = x
    written = words[_span(rows, per_token)]
    written = written if ref.dtype == jnp.float32 else pltpu.bitcast(written, ref.dtype)
    ref[rows] = written.reshape(CHUNK, *ref.shape[1:])


def _span(rows, per_token):
    return slice(rows.start * per_token, rows.stop * per_token)


def padded(width: int) -> int:
    return width + -width % 64


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


def gates(g_BTN: jax.Array, segment_ids: jax.Array, tiles: Tiles, num_parts: int, before: bool):
    """Returns the cumulative logs `[B, N / heads, X, 8, T]` and the documents `[B, 8, T]`.

    Logs are cumulated within chunks, up to and with a token, and before it where `before`: X holds the parts of the
    first, then those of the second. With two parts, one is a multiple of 1/64, whose sums are exact, and one a small
    rest: float32 differences lose nothing where a decay of -30 stands beside one of -0.01. Beside bfloat16 products
    one part is enough.

    Documents: each token's own (0 for padding), that of the state before its chunk, that of the state after it.
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
    upper_LL = jnp.triu(jnp.ones((CHUNK, CHUNK), g.dtype))
    logs = jnp.einsum("BnxhCL,LM->BnxhCM", g, upper_LL, precision="highest")
    if before:
        logs = jnp.concatenate([logs, logs - g], axis=2)
    logs = logs.reshape(*logs.shape[:4], tiles.padded_T)
    logs = jnp.pad(logs, ((0, 0), (0, 0), (0, 0), (0, TILE - tiles.heads), (0, 0)))

    filled_BCL = jnp.pad(fill_padding(segment_ids), ((0, 0), (0, tiles.padded_T - T)), mode="edge")
    filled_BCL = filled_BCL.reshape(B, -1, CHUNK)
    after_BC = filled_BCL[:, :, -1]
    before_BC = jnp.concatenate([filled_BCL[:, 0, :1], after_BC[:, :-1]], axis=1)
    borders = (jnp.repeat(x_BC, CHUNK, axis=1) for x_BC in (before_BC, after_BC))
    own_BT = jnp.pad(segment_ids, ((0, 0), (0, tiles.padded_T - T)))
    ids = jnp.stack([own_BT, *borders], axis=1).astype(jnp.int32)
    return logs, jnp.pad(ids, ((0, 0), (0, TILE - 3), (0, 0)))


def gate_gradient(sums: jax.Array, segment_ids: jax.Array, tiles: Tiles, before: bool) -> jax.Array:
    """Returns the gradient of g `BTN` from the sums `[B, N / heads, 3, 8, T]` of `common/decays.py`.

    They are rows, cols (less `whole` at a chunk's last token) and puts.
    """
    sums = sums[:, :, :, : tiles.heads].reshape(*sums.shape[:3], tiles.heads, -1, CHUNK)
    ones = jnp.ones((CHUNK, CHUNK), sums.dtype)
    weights = jnp.stack([jnp.tril(ones, -1 if before else 0), -jnp.tril(ones), jnp.triu(ones, 1)])
    dg = jnp.einsum("BnxhCL,xLM->BCMnh", sums, weights, precision="highest")
    dg_BTN = dg.reshape(tiles.B, tiles.padded_T, tiles.N)[:, : tiles.T]
    return clear_padding(dg_BTN, segment_ids)
