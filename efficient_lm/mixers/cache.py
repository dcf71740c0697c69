"""What attention remembers of past tokens: one cache that is full, a ring, or sinks and a ring, of any arrays.

A row's cache holds the document that goes on, and a token's position in it says which slot it takes; padding takes
none. With a slot for every token the cache is full. With fewer it is a ring, which holds the last ones, and the first
`sink_tokens` of the document in slots of their own.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm.mixers.base import Leaf
from efficient_lm.sharding import per_shard, shard
from pallas_kernels.common.documents import first_document


class Places(NamedTuple):
    """Where queries and keys stand, as `kernels.attention` takes it; without the last three, keys are the queries' own
    tokens."""

    segment_ids: Int[Array, "B T"]
    kv_segment_ids: Int[Array, "B S"] | None = None
    positions: Int[Array, "B T"] | None = None
    kv_positions: Int[Array, "B S"] | None = None

    dims = "BT,BS,BT,BS"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    arrays: tuple[Leaf, ...]  # [B S ...], as dims say
    length: Leaf  # B
    """Tokens so far of the document that goes on."""
    dims: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    sink_tokens: int = dataclasses.field(metadata={"static": True})

    def positions(self) -> Int[Array, "B S"]:
        """Returns the position of the token in each slot, -1 where there is none."""
        slots_S, last_B1 = jnp.arange(self._num_slots), self.length[:, None] - 1
        rounds_BS = jnp.where(slots_S < self.sink_tokens, 0, (last_B1 - slots_S) // self._ring)
        return jnp.where(slots_S <= last_B1, slots_S + rounds_BS * self._ring, -1)

    def write(
        self,
        arrays: tuple[Array, ...],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        length: Int[Array, "B"],
    ) -> "Cache":
        """Returns the cache after these tokens; of the row's last document, which has `length` tokens by then."""
        size, sinks = self._num_slots, self.sink_tokens
        goes_on_BT = (segment_ids > 0) & (segment_ids == jnp.max(segment_ids, axis=1, keepdims=True, initial=0))
        stays_BT = goes_on_BT & ((positions < sinks) | (positions >= length[:, None] - self._ring))
        slots_BT = jnp.where(positions < size, positions, sinks + (positions - sinks) % self._ring)
        # Tokens that leave no trace get slots beyond the last, each its own, which are dropped.
        slots_BT = jnp.where(stays_BT, slots_BT, size + jnp.arange(positions.shape[1]))
        set_rows = jax.vmap(lambda old, new, slots: old.at[slots].set(new, mode="drop", unique_indices=True))
        written = [
            per_shard(set_rows, f"{dims},{dims.replace('S', 'T', 1)},BT", dims)(old, new.astype(old.dtype), slots_BT)
            for dims, old, new in zip(self.dims, self.arrays, arrays, strict=True)
        ]
        return dataclasses.replace(self, arrays=tuple(written), length=length)

    @property
    def _num_slots(self) -> int:
        return self.arrays[0].shape[1]

    @property
    def _ring(self) -> int:
        return max(self._num_slots - self.sink_tokens, 1)


def init_cache(
    *arrays: tuple[str, DTypeLike],
    batch_size: int,
    max_len: int,
    window: int | None = None,
    sinks: int = 0,
    **sizes: int,
) -> Cache:
    """Returns an empty cache: `init_cache(("BSKH", dtype), ("BSKP", dtype), batch_size=2, max_len=99, K=4, H=8, P=8)`.

    It has a slot for each of `max_len` tokens, or for the first `sinks` and the last `window` of them.
    """
    sizes |= {"B": batch_size, "S": max_len if window is None else min(max_len, sinks + window)}
    zeros = lambda dims, dtype: shard(jnp.zeros([sizes[d] for d in dims], dtype), dims)
    return Cache(
        arrays=tuple(zeros(dims, dtype) for dims, dtype in arrays),
        length=zeros("B", jnp.int32),
        dims=tuple(dims for dims, _ in arrays),
        sink_tokens=sinks,
    )


type Read = Callable[[tuple[Array, ...], Places, bool], tuple[Float[Array, "B T N P"], Float[Array, "B N T"]]]
"""`read(arrays, places, is_cache)`: what tokens see of arrays `[B S ...]`, and the logs of the softmaxes' sums."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What tokens may attend to: one another, and those that a cache holds."""

    arrays: tuple[Leaf, ...]  # [B T ...]
    cache: Cache | None
    """As it was before the tokens; of one token, with it."""
    segment_ids: Leaf  # BT
    positions: Leaf  # BT
    kv_segment_ids: Leaf = None  # BS
    """Of the arrays, if these have other tokens as well."""

    def attend(self, read: Read) -> Float[Array, "B T N P"]:
        """Returns what the tokens see.

        They read each other as in training, by the same kernels, and the cache by itself; one token reads the cache
        that it is in.
        """
        arrays, cache, ids_BT, positions_BT = self.arrays, self.cache, self.segment_ids, self.positions
        if cache is None:
            return read(arrays, Places(ids_BT, self.kv_segment_ids), False)[0]
        kv_positions_BS = cache.positions()
        kv_ids_BS = jnp.where(kv_positions_BS < 0, 0, first_document(ids_BT))
        past = read(cache.arrays, Places(ids_BT, kv_ids_BS, positions_BT, kv_positions_BS), True)
        if ids_BT.shape[1] == 1:
            return past[0]
        # Sinks are the first tokens of the document, not of these.
        own = Places(ids_BT, ids_BT, positions_BT, positions_BT) if cache.sink_tokens else Places(ids_BT)
        return merge(read(arrays, own, False), past)


def remember(
    arrays: tuple[Array, ...],
    cache: Cache | None,
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    length: Int[Array, "B"],
) -> tuple[Memory, Cache | None]:
    """Returns what the tokens may attend to, and the cache after them.

    `positions` and `length` are what `document_positions` says.
    """
    written = cache and cache.write(arrays, segment_ids, positions, length)
    return Memory(arrays, written if segment_ids.shape[1] == 1 else cache, segment_ids, positions), written


def attend(
    read: Read,
    arrays: tuple[Array, ...],
    cache: Cache | None,
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    length: Int[Array, "B"],
) -> tuple[Float[Array, "B T N P"], Cache | None]:
    """Returns what the tokens see of each other and of the cache, and the cache after them, as `remember` has it."""
    memory, cache = remember(arrays, cache, segment_ids, positions, length)
    return memory.attend(read), cache


def merge(own, past):
    """Returns the outputs of one softmax over two sets of keys, from those of each."""
    (own_BTNP, own_BNT), (past_BTNP, past_BNT) = own, past
    # A query that sees nothing of the past may see nothing at all: padding.
    ahead_BNT = jnp.where(past_BNT > -jnp.inf, past_BNT - own_BNT, -jnp.inf)
    share_BTN1 = jnp.moveaxis(jax.nn.sigmoid(ahead_BNT), 1, 2)[..., None]
    wide_BTNP = own_BTNP.astype(jnp.float32)
    return (wide_BTNP + share_BTN1 * (past_BTNP - wide_BTNP)).astype(own_BTNP.dtype)
