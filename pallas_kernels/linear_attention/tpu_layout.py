"""How the TPU kernels of linear attention see their arguments: heads in blocks, decays as cumulative logs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.documents import clear_padding, fill_padding

CHUNK = 128
TILE = 8  # sublanes of a register
# exp(-128) is 0 in float32: closed gates (-inf, too) stop here.
_MIN_LOG = -128.0


@dataclasses.dataclass(frozen=True)
class Heads:
    """Blocks of `size` of the N heads of an array `[B T N width]`.

    Where the width is 128 and the heads fill tiles, blocks are read as they lie in HBM, [T N 128]: a head's rows are
    every N-th sublane, and bfloat16 heads come two by two in words of 32 bits. Otherwise XLA puts heads first, which
    costs a pass over the array unless what made it can write it so.
    """

    size: int
    num: int
    width: int
    dtype: jnp.dtype

    @property
    def in_place(self) -> bool:
        return False

    @property
    def padded_width(self) -> int:
        return self.width + -self.width % 64

    def shape(self, B: int, T: int) -> jax.ShapeDtypeStruct:
        shape = (B, T, self.num, self.width) if self.in_place else (B, self.num, T, self.padded_width)
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def spec(self, tokens: int, index) -> pl.BlockSpec:
        """`index` gives the block's row, heads and tokens from the grid's indices."""
        if self.in_place:

            def in_place(*grid):
                b, n, t = index(*grid)
                return b, t, n, 0

            return pl.BlockSpec((1, tokens, self.size, self.width), in_place)
        return pl.BlockSpec((None, self.size, tokens, self.padded_width), lambda *grid: (*index(*grid), 0))

    def pack(self, x_BTNW: jax.Array, T: int) -> jax.Array:
        """Returns x as the kernels take it, filled up to T tokens."""
        x_BTNW = jnp.pad(x_BTNW, ((0, 0), (0, T - x_BTNW.shape[1]), (0, 0), (0, 0)))
        if self.in_place:
            return x_BTNW
        return jnp.pad(jnp.moveaxis(x_BTNW, 2, 1), ((0, 0), (0, 0), (0, 0), (0, self.padded_width - self.width)))

    def unpack(self, x: jax.Array, T: int) -> jax.Array:
        """Returns `[B T N width]` from what a kernel wrote."""
        x_BTNW = x if self.in_place else jnp.moveaxis(x, 1, 2)
        return x_BTNW[:, :T, :, : self.width]


def load(ref, rows: slice) -> list[jax.Array]:
    """Returns the heads of a block, each `[rows, width]`."""
    if len(ref.shape) == 3:
        return [ref[n, rows] for n in range(ref.shape[0])]
    _, T, N, width = ref.shape
    L = rows.stop - rows.start
    if ref.dtype == jnp.float32:
        flat = ref.reshape(T * N, width)
        return [flat[pl.ds(rows.start * N + n, L, stride=N)] for n in range(N)]
    flat = ref.bitcast(jnp.int32).reshape(T * N // 2, width)
    heads = []
    for pair in range(N // 2):
        words = flat[pl.ds(rows.start * N // 2 + pair, L, stride=N // 2)]
        for bits in (words << 16, words & -(1 << 16)):
            heads.append(jax.lax.bitcast_convert_type(bits, jnp.float32).astype(ref.dtype))
    return heads


def store(ref, rows: slice, heads: list[jax.Array]) -> None:
    """Writes the heads of a block."""
    if len(ref.shape) == 3:
        for n, x in enumerate(heads):
            ref[n, rows] = x.astype(ref.dtype)
        return
    _, T, N, width = ref.shape
    L = rows.stop - rows.start
    if ref.dtype == jnp.float32:
        flat = ref.reshape(T * N, width)
        for n, x in enumerate(heads):
            flat[pl.ds(rows.start * N + n, L, stride=N)] = x
        return
    flat = ref.bitcast(jnp.int32).reshape(T * N // 2, width)
    # Rounded to the upper half of a word.
    words = lambda x: jax.lax.bitcast_convert_type(x.astype(ref.dtype).astype(jnp.float32), jnp.int32)
    for pair in range(N // 2):
        low, high = words(heads[2 * pair]), words(heads[2 * pair + 1])
        flat[pl.ds(rows.start * N // 2 + pair, L, stride=N // 2)] = jax.lax.shift_right_logical(low, 16) | high


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
        return self.B, self.N, self.H + -self.H % 64, self.P + -self.P % 64


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
