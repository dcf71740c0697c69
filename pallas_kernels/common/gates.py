"""One decay per head and token, for TPU kernels: what `decays.HeadDecay` is for XLA.

Logs are cumulated within chunks by XLA and come to the kernels as rows of tiles, `[8, L]`, a row per head: what is done
to them there is done to all heads at once. What a kernel needs along the other axis is turned once for all heads, and
spread over lanes before exp is taken: the unit that takes it is idle, that which spreads lanes is not.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.documents import clear_padding
from pallas_kernels.common.doubling import dot
from pallas_kernels.common.head_blocks import REAL, STARTS, Blocks, flags
from pallas_kernels.common.heads import TILE
from pallas_kernels.common.walk import CHUNK, keep_bits, widen_lanes

# exp(-128) is 0 in float32: closed gates (-inf, too) stop here.
_MIN_LOG = -128.0


def documents(segment_ids: jax.Array, length: int) -> jax.Array:
    """Returns how many documents have begun in its chunk up to each token, -1 for padding; float32 `B1T`.

    T is filled up to a multiple of `length`, which is one of CHUNK.
    """
    flags_B1CL = flags(segment_ids, length).reshape(segment_ids.shape[0], 1, -1, CHUNK)
    started = jnp.cumsum(flags_B1CL & STARTS > 0, axis=3)
    return jnp.where(flags_B1CL & REAL > 0, started, -1).astype(jnp.float32).reshape(segment_ids.shape[0], 1, -1)


def rows(x_BTN: jax.Array, segment_ids: jax.Array, blocks: Blocks) -> jax.Array:
    """Returns what each grid step takes of x, `[B groups heads C L]` float32, with zeros at padding and beyond T."""
    x_BTN = jnp.pad(clear_padding(x_BTN, segment_ids), ((0, 0), (0, -blocks.T % blocks.length), (0, 0)))
    x = x_BTN.astype(jnp.float32).reshape(blocks.B, -1, CHUNK, blocks.grid[1], blocks.size)
    return jnp.moveaxis(x, (3, 4), (1, 2))


def cumulative_logs(
    g_BTN: jax.Array, segment_ids: jax.Array, blocks: Blocks, exact: bool, before: bool = False
) -> list[jax.Array]:
    """Returns the logs of g cumulated within chunks, up to or `before` each token, in parts, each as `rows`.

    With two parts, one is a multiple of 1/64, whose sums are exact, and one a small rest: differences lose nothing
    where a decay of -30 stands beside one of -0.01. Beside bfloat16 products one part is enough.
    """
    parts = [rows(jnp.maximum(g_BTN, _MIN_LOG), segment_ids, blocks)]
    if exact:
        coarse = jnp.ceil(parts[0] * 64) / 64
        parts = [coarse, parts[0] - coarse]
    # A constant of the program: XLA would take longer to make it than to multiply by it.
    upper_LL = np.triu(np.ones((CHUNK, CHUNK), np.float32), int(before))
    return [jnp.einsum("BnhCL,LM->BnhCM", x, upper_LL, precision="highest") for x in parts]


def to_tiles(of_tokens: list[jax.Array]) -> jax.Array:
    """Returns `[B groups X 8 T]` of X arrays that are as `rows`."""
    x = jnp.stack(of_tokens, axis=2)
    x = x.reshape(*x.shape[:4], -1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, TILE - x.shape[3]), (0, 0)))


def from_tiles(x: jax.Array, blocks: Blocks) -> jax.Array:
    """Returns `[X B T N]` of what a kernel wrote, `[B groups X 8 T]`."""
    x = jnp.moveaxis(x[:, :, :, : blocks.size], (2, 4), (0, 2))
    return x.reshape(*x.shape[:3], blocks.N)[:, :, : blocks.T]


class Gates:
    """The decays and documents of a chunk of up to eight heads, in a kernel.

    `logs` are cumulative, `[heads, L]` in parts; with `logs_before` a token reads the state as it was before its own
    decay and write. The state before the chunk belongs to the document with number 0, that after it to the last one.
    """

    def __init__(self, logs: list[jax.Array], documents_1L: jax.Array, logs_before: list[jax.Array] | None = None):
        self._before = logs_before is not None
        self._logs, self._read_logs = logs, logs if logs_before is None else logs_before
        self._columns = [x.T for x in self._logs]
        self._read_columns = self._columns if logs_before is None else [x.T for x in logs_before]
        self._end = [x[:, -1:] for x in logs]
        self._last_11 = jnp.maximum(jnp.max(documents_1L, axis=1, keepdims=True), 0.0)
        self._documents_1L, self._documents_LL = documents_1L, jnp.broadcast_to(documents_1L, (CHUNK, CHUNK)).T
        self._real_LL = jnp.where(self._documents_LL >= 0, -1, 0)
        self.reads = jnp.where(documents_1L == 0, _exp(self._read_logs), 0)
        self.writes = jnp.where(documents_1L == self._last_11, _exp(_minus(self._end, logs)), 0)
        self.keep = jnp.where(self._last_11 == 0, _exp(self._end), 0)

    def clear(self, x_LX: jax.Array) -> jax.Array:
        """Returns x, float32, with zeros, in place of NaN too, for padding."""
        return keep_bits(x_LX, self._real_LL)

    def limit(self, readers_first: bool) -> tuple[jax.Array, jax.Array]:
        """Returns 0 for the pairs that see each other and -inf for others; and which are apart by a decay."""
        first, second = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
        since = first - second if readers_first else second - first
        same = (self._documents_LL == self._documents_1L) & (self._documents_LL >= 0)
        return jnp.where(same & (since >= self._before), 0.0, -jnp.inf), since > self._before

    def pairs_LL(self, n: int, limit_LL: jax.Array, readers_first: bool) -> jax.Array:
        """Returns the decay that one token sees of what another wrote, for head n; 0 where `limit` is -inf."""
        if readers_first:
            return _exp(_minus(_columns(self._read_columns, n), _rows(self._logs, n)), limit_LL)
        return _exp(_minus(_rows(self._read_logs, n), _columns(self._columns, n)), limit_LL)

    def reads_LX(self, n: int, width: int) -> jax.Array:
        """Returns the decay that tokens see of the state before the chunk, for head n, along all lanes."""
        decays_LL = _exp(_columns(self._read_columns, n))
        return widen_lanes(jnp.where(self._documents_LL == 0, decays_LL, 0), width)

    def writes_LX(self, n: int, width: int) -> jax.Array:
        """Returns the decay from tokens to the end of the chunk, for head n, along all lanes."""
        decays_LL = _exp(_minus(_rows(self._end, n), _columns(self._columns, n)))
        return widen_lanes(jnp.where(self._documents_LL == self._last_11, decays_LL, 0), width)

    def gradient(self, rows_NL: jax.Array, cols_NL: jax.Array, puts_NL: jax.Array, whole_NL: jax.Array) -> jax.Array:
        """Returns the gradient of g, as in `common/decays.py`, with the sum over pairs as a difference.

        `rows` have those of pairs, over what a token reads; `cols` are those over who reads it. `whole` is the same
        along a row.
        """
        token, t = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
        over = lambda x_NL, which_LL: dot(x_NL, jnp.where(which_LL, 1.0, 0.0), "nn", exact=True)
        dg_NL = whole_NL + over(puts_NL, token < t)
        if self._before:
            dg_NL += over(rows_NL, token > t) - over(cols_NL, token >= t)
        else:
            dg_NL += over(rows_NL - cols_NL, token >= t)
        return jnp.where(self._documents_1L >= 0, dg_NL, 0)


def column(x_LN: jax.Array, n: int) -> jax.Array:
    """Spreads the column of head n over `LL`."""
    return jnp.broadcast_to(x_LN[:, n : n + 1], (CHUNK, CHUNK))


def _columns(parts, n):
    return [column(x_LN, n) for x_LN in parts]


def _rows(parts, n):
    return [x_NL[n : n + 1] for x_NL in parts]


def _minus(later, earlier):
    return [x - y for x, y in zip(later, earlier, strict=True)]


def _exp(parts: list[jax.Array], limit: jax.Array | float = 0.0) -> jax.Array:
    """exp of a log in parts; it is at most `limit`, which is 0 or, for what is not to be seen, -inf."""
    return jnp.exp(jnp.minimum(functools.reduce(jnp.add, parts), limit))
