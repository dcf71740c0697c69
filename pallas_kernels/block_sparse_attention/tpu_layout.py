"""How the TPU kernels of `block_sparse_attention` see its arrays: X = B K pairs of a row and a key/value head."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention.selection import tokens

LANES = 128
# The place of a key that nothing sees; and the only place that a query sees which sees nothing.
NEVER, NOWHERE = 2**30, -1


class Rows:
    """Queries `[B T N ...]` in groups of rows that share their keys: `size` of them, M queries times G heads.

    Heads that fill tiles are read where they lie. Others are brought together by XLA, and filled up to 128 rows.
    """

    def __init__(self, q: jax.Array, K: int, M: int):
        self.B, self.T, self.N, _ = q.shape
        self.K, self.M, self.G = K, M, self.N // K
        self.num_groups = pl.cdiv(self.T, M)
        self._real = M * self.G
        self.size = pl.cdiv(self._real, LANES) * LANES
        self._in_place = self.G % 16 == 0 and self.size == self._real

    def spec(self, width: int) -> pl.BlockSpec:
        """Returns the blocks of a grid (x, group, step)."""
        if self._in_place:
            shape = (None, self.M, self.G, width)
            return pl.BlockSpec(shape, lambda x, u, *_: (jax.lax.div(x, self.K), u, jax.lax.rem(x, self.K), 0))
        return pl.BlockSpec((None, None, self.size, width), lambda x, u, *_: (x, u, 0, 0))

    def shape(self, width: int, dtype) -> jax.ShapeDtypeStruct:
        """Returns the shape of an array that kernels see."""
        if self._in_place:
            return jax.ShapeDtypeStruct((self.B, self.num_groups * self.M, self.N, width), dtype)
        return jax.ShapeDtypeStruct((self.B * self.K, self.num_groups, self.size, width), dtype)

    def to_kernel(self, a_BTNX: jax.Array) -> jax.Array:
        a_BTNX = self._fill(a_BTNX)
        return a_BTNX if self._in_place else self._rows(a_BTNX)

    def from_kernel(self, a: jax.Array) -> jax.Array:
        return a[:, : self.T] if self._in_place else self._undo(a)

    def read(self, ref) -> jax.Array:
        """Returns the rows of a block."""
        return ref[...].reshape(self.size, ref.shape[-1])

    def write(self, ref, a_RX: jax.Array) -> None:
        ref[...] = a_RX.reshape(ref.shape).astype(ref.dtype)

    def numbers(self, a_BTN: jax.Array, fill: int | float = 0) -> jax.Array:
        """Returns `[X U 1 R]` of a number for each query and head; those of rows that are no query are `fill`."""
        return self._rows(self._fill(a_BTN, fill), fill)[:, :, None]

    def undo_numbers(self, a_XU1R: jax.Array) -> jax.Array:
        return self._undo(a_XU1R[:, :, 0])

    def _fill(self, a_BT, fill: int | float = 0):
        missing = self.num_groups * self.M - self.T
        return jnp.pad(a_BT, ((0, 0), (0, missing), *((0, 0) for _ in a_BT.shape[2:])), constant_values=fill)

    def _rows(self, a_BTN, fill: int | float = 0):
        a_BUMKG = a_BTN.reshape(self.B, self.num_groups, self.M, self.K, self.G, *a_BTN.shape[3:])
        a_BKUMG = jnp.moveaxis(a_BUMKG, 3, 1)
        a_XUR = a_BKUMG.reshape(self.B * self.K, self.num_groups, self._real, *a_BTN.shape[3:])
        padding = (0, 0), (0, 0), (0, self.size - self._real), *((0, 0) for _ in a_BTN.shape[3:])
        return jnp.pad(a_XUR, padding, constant_values=fill)

    def _undo(self, a_XUR):
        tail = a_XUR.shape[3:]
        a_BKUMG = a_XUR[:, :, : self._real].reshape(self.B, self.K, self.num_groups, self.M, self.G, *tail)
        return jnp.moveaxis(a_BKUMG, 1, 3).reshape(self.B, -1, self.N, *tail)[:, : self.T]


def key_blocks(a_BSKH: jax.Array, block_size: int) -> jax.Array:
    """Returns `[X S H]`, S a multiple of the block."""
    B, S, K, H = a_BSKH.shape
    a_BSKH = jnp.pad(a_BSKH, ((0, 0), (0, -S % block_size), (0, 0), (0, 0)))
    return jnp.moveaxis(a_BSKH, 2, 1).reshape(B * K, -1, H)


def query_range(options, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns, each `[B S]`, the first and the last place that a query there sees, and the place of a key there.

    Documents are in order, so what a query sees is a range of the places that real tokens have in the row.
    """
    ids_BS, places_BS = tokens(segment_ids)
    is_first_BS = jnp.diff(jax.lax.cummax(ids_BS, axis=1), axis=1, prepend=0) > 0
    first_BS = jax.lax.cummax(jnp.where(is_first_BS, places_BS, 0), axis=1)
    if options.window_size is not None:
        first_BS = jnp.maximum(first_BS, places_BS - options.window_size + 1)
    real_or = lambda a_BS, other: jnp.where(ids_BS > 0, a_BS, other)
    return real_or(first_BS, NOWHERE), real_or(places_BS, NOWHERE), real_or(places_BS, NEVER)


def places(options, rows: Rows, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the first and the last place that each query sees, `[X U 1 R]`, and the places of keys, `[B 1 S]`."""
    *of_queries, keys_BS = query_range(options, segment_ids)
    to_heads = lambda a_BS: jnp.broadcast_to(a_BS[:, -rows.T :, None], (rows.B, rows.T, rows.N))
    first, last = (rows.numbers(to_heads(a_BS), NOWHERE) for a_BS in of_queries)
    keys_BS = jnp.pad(keys_BS, ((0, 0), (0, -keys_BS.shape[1] % options.block_size)), constant_values=NEVER)
    return first, last, keys_BS[:, None]


def lanes(width: int) -> int:
    """Returns how many numbers of VMEM a row takes."""
    return pl.cdiv(width, LANES) * LANES


def widen(a_RL: jax.Array, width: int) -> jax.Array:
    """Returns `[R width]` of an array whose lanes are all the same."""
    return jnp.concatenate([a_RL] * pl.cdiv(width, LANES), axis=1)[:, :width]


def wrap(distance):
    """Returns distances such that `wrap(place) - first <= wrap(span)` where `0 <= place - first <= span`.

    That is a comparison without signs: what is before the first wraps around to the largest distances.
    """
    return distance ^ jnp.iinfo(jnp.int32).min


def store(pairs, done) -> None:
    """Copies, of each pair, the first to the second; `done` has a semaphore for each."""
    copies = [pltpu.make_async_copy(of, to, done.at[i]) for i, (of, to) in enumerate(pairs)]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()


def by_head(fn, K: int, *arrays: jax.Array):
    """Returns `fn(*arrays)`, called for one row and one key/value head at a time.

    Arrays, and all that fn returns, are `[B . N ...]` or `[B . K ...]`; those of rank 2 are `[B S]`.
    """
    B = arrays[0].shape[0]

    def apart(a):
        if a.ndim == 2:
            return jnp.repeat(a, K, axis=0)[:, None]
        a_BKT = jnp.moveaxis(a.reshape(*a.shape[:2], K, -1, *a.shape[3:]), 2, 1)
        return a_BKT.reshape(B * K, 1, *a_BKT.shape[2:])

    def together(a):
        a_BTK = jnp.moveaxis(a.reshape(B, K, *a.shape[2:]), 1, 2)
        return a_BTK.reshape(*a_BTK.shape[:2], -1, *a_BTK.shape[4:])

    return jax.tree.map(together, jax.lax.map(lambda arrays: fn(*arrays), tuple(map(apart, arrays))))
