"""How TPU kernels of chunked recurrences see `BT.X` arrays: which heads, tokens and widths a grid step takes."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.documents import fill_padding
from pallas_kernels.common.heads import TILE, Heads

# Flags of a token: it is not padding; it is the first of a document that is not the row's first.
REAL, STARTS = 1, 2


@dataclasses.dataclass(frozen=True)
class Specs:
    """The blocks of a grid step; `dkeys` are the gradients of q and k; of `states` and `inverses` a chunk has one."""

    flags: pl.BlockSpec
    keys: pl.BlockSpec
    dkeys: pl.BlockSpec
    values: pl.BlockSpec
    decays: pl.BlockSpec
    state: pl.BlockSpec
    states: pl.BlockSpec
    inverses: pl.BlockSpec


class Blocks:
    """The grid (rows, groups of `size` value heads, chunks), and what its steps see of each argument.

    A step takes whole key heads with all the value heads that read them or, where a key head has many, a part of those:
    then `parts` steps share a key head, and each gives its part of the gradients of q and k, in float32.
    """

    def __init__(self, q: jax.Array, v: jax.Array, length: int):
        self.B, self.T, N, P = v.shape
        self.length = length
        self.N, self.K, G = N, q.shape[2], N // q.shape[2]
        self.size = _heads_per_step(self.K, G)
        self.parts = max(1, G // self.size)
        self.H, self.P = _width(q.shape[3]), _width(P)
        self.grid = self.B, N // self.size, pl.cdiv(self.T, length)
        keys = max(1, self.size // G)
        self.keys = Heads((self.B, self.T, self.K, self.H), keys, length, self.parts)
        self.dkeys = Heads((self.B, self.T, self.K * self.parts, self.H), keys, length)
        self.values = Heads((self.B, self.T, N, self.P), self.size, length)
        self.decays = Heads((self.B, self.T, N, self.H), self.size, length)
        # Key heads of a step, each with its value heads; in pairs if there are any, for so are bfloat16 heads written.
        readers = self.size // keys
        heads = [(key, range(key * readers, (key + 1) * readers)) for key in range(keys)]
        together = 1 if keys % 2 else 2
        self.units = [heads[key : key + together] for key in range(0, keys, together)]

    def specs(self, backwards: bool = False) -> Specs:
        num_chunks = self.grid[2]
        chunk = lambda c: num_chunks - 1 - c if backwards else c
        of_chunk = lambda *size: pl.BlockSpec((None, None, self.size, *size), lambda b, n, c: (b, chunk(c), n, 0, 0))
        return Specs(
            flags=pl.BlockSpec((None, 1, self.length), lambda b, n, c: (b, 0, chunk(c))),
            keys=self.keys.spec(chunk),
            dkeys=self.dkeys.spec(chunk),
            values=self.values.spec(chunk),
            decays=self.decays.spec(chunk),
            state=pl.BlockSpec((None, self.size, self.H, self.P), lambda b, n, c: (b, n, 0, 0)),
            states=of_chunk(self.P, self.H),
            inverses=of_chunk(self.length, self.length),
        )

    def kept(self, exact: bool) -> list[jax.ShapeDtypeStruct]:
        """Returns the shapes of what is kept for each chunk: the state before it, turned around, and an inverse."""
        of_head, dtype = (self.B, self.grid[2], self.N), jnp.float32 if exact else jnp.bfloat16
        sizes = (self.P, self.H), (self.length, self.length)
        return [jax.ShapeDtypeStruct(of_head + size, dtype) for size in sizes]

    def pack(self, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> list[jax.Array]:
        """Returns the arguments as the kernels take them."""
        heads = self.keys, self.keys, self.values, self.decays
        return [heads.to_kernel(widen(x, 3)) for heads, x in zip(heads, (q, k, v, g), strict=True)]

    def key_gradient(self, d: jax.Array, like: jax.Array) -> jax.Array:
        """Returns the gradient of q or k from what the kernel wrote."""
        d_BTKH = self.dkeys.from_kernel(d)
        if self.parts > 1:
            d_BTKH = jnp.sum(d_BTKH.reshape(self.B, self.T, self.K, self.parts, self.H), axis=3)
        return d_BTKH[..., : like.shape[3]].astype(like.dtype)


def flags(segment_ids: jax.Array, length: int) -> jax.Array:
    """Returns REAL and STARTS of each token, int32 `B1T`, filled up with zeros to whole chunks of `length`."""
    ids_BT = fill_padding(segment_ids)
    starts_BT = jnp.pad(ids_BT[:, 1:] != ids_BT[:, :-1], ((0, 0), (1, 0)))
    flags_BT = jnp.where(segment_ids > 0, REAL, 0) | jnp.where(starts_BT, STARTS, 0)
    return jnp.pad(flags_BT, ((0, 0), (0, -ids_BT.shape[1] % length)))[:, None]


def widen(x: jax.Array, *axes: int) -> jax.Array:
    """Fills axes up with zeros to a width that the kernels take."""
    missing = [(0, _width(size) - size if axis in axes else 0) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, missing) if any(after for _, after in missing) else x


def cut(x: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes `widen`: returns as much of each axis as `like` has."""
    return x[tuple(slice(size) for size in like.shape)]


def as_float32(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _width(size: int) -> int:
    return 64 if size <= 64 else size + -size % 128


def _heads_per_step(K: int, G: int) -> int:
    """Returns how many value heads a step takes: 8, a tile, where that fits key heads; otherwise as many up to 8."""
    if K * G % TILE == 0 and (TILE % G == 0 or G % TILE == 0):
        return TILE
    if G > TILE:
        return next(size for size in range(TILE, 0, -1) if G % size == 0)
    return next(G * keys for keys in range(TILE // G, 0, -1) if K % keys == 0)
