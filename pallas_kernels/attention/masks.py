"""Who sees whom in `attention`: single tokens, and whole blocks that need no work."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.documents import fill_padding


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `attention` that are no arrays."""

    causal: bool
    window_size: int | None
    sink_tokens: int
    soft_cap: float | None
    scale: float


class Tokens(NamedTuple):
    """What decides whether a query sees a key."""

    ids: jax.Array  # [... L]
    places: jax.Array
    """[... L], in the document as the caller says, or the row's real tokens so far: padding is as if removed."""
    is_sink: jax.Array  # [... L], a key that every query of its document sees.


def tokens(options: Options, ids_BT, kv_ids_BS, positions_BT, kv_positions_BS) -> tuple[Tokens, Tokens]:
    """Returns the queries and the keys."""
    no_sinks = lambda ids: jnp.zeros(ids.shape, bool)
    if positions_BT is not None:
        keys = Tokens(kv_ids_BS, kv_positions_BS, kv_positions_BS < options.sink_tokens)
        return Tokens(ids_BT, positions_BT, no_sinks(ids_BT)), keys
    T, S = ids_BT.shape[1], kv_ids_BS.shape[1]
    places_BS = jnp.cumsum(kv_ids_BS > 0, axis=1, dtype=jnp.int32)
    # Without an order there may be more queries than keys, and their places mean nothing.
    slots_T = jnp.clip(S - T + jnp.arange(T), 0, S - 1)
    queries = Tokens(ids_BT, jnp.take(places_BS, slots_T, axis=1), no_sinks(ids_BT))
    if options.sink_tokens == 0:
        return queries, Tokens(kv_ids_BS, places_BS, no_sinks(kv_ids_BS))
    filled_BS = fill_padding(kv_ids_BS)
    is_first_BS = jnp.diff(filled_BS, axis=1, prepend=-1) != 0
    before_BS = jax.lax.cummax(jnp.where(is_first_BS, places_BS - (kv_ids_BS > 0), 0), axis=1)
    return queries, Tokens(kv_ids_BS, places_BS, places_BS - before_BS <= options.sink_tokens)


def sees(options: Options, queries: Tokens, keys: Tokens):
    """Returns `[... L S]`: which query sees which key."""
    pair = lambda name: (getattr(queries, name)[..., :, None], getattr(keys, name)[..., None, :])
    (q_ids, k_ids), (q_places, k_places) = pair("ids"), pair("places")
    seen = (q_ids == k_ids) & (k_ids > 0)
    if options.causal:
        seen &= k_places <= q_places
    if options.window_size is not None:
        is_near = q_places - k_places < options.window_size
        if not options.causal:
            is_near &= k_places - q_places < options.window_size
        seen &= is_near | pair("is_sink")[1]
    return seen


def blocks_that_see(options: Options, queries: Tokens, keys: Tokens):
    """Returns `[C C']` for queries `[C B L]` and keys `[C' B L']`: False where no query of a block sees any key."""

    def bounds(x, is_real):
        largest = jnp.iinfo(jnp.int32).max
        return jnp.min(jnp.where(is_real, x, largest), axis=2), jnp.max(jnp.where(is_real, x, -1), axis=2)

    rows = lambda x: [a[:, None] for a in bounds(x, queries.ids > 0)]
    columns = lambda x: [a[None] for a in bounds(x, keys.ids > 0)]
    (q_first, q_last), (k_first, k_last) = rows(queries.ids), columns(keys.ids)
    seen = (q_first <= k_last) & (k_first <= q_last)
    (q_first, q_last), (k_first, k_last) = rows(queries.places), columns(keys.places)
    if options.causal:
        seen &= k_first <= q_last
    if options.window_size is not None:
        # Compared as sums: blocks without a real token have the largest integer as their first place.
        is_near = q_first < k_last + options.window_size
        if not options.causal:
            is_near &= k_first < q_last + options.window_size
        seen &= is_near | jnp.any(keys.is_sink & (keys.ids > 0), axis=2)[None]
    return jnp.any(seen, axis=2)
