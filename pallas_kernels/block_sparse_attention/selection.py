"""What `block_sparse_attention` is asked for, and which of the chosen keys a query sees."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments that are no arrays."""

    block_size: int
    query_block: int
    window_size: int | None
    scale: float


class Tokens(NamedTuple):
    """What decides whether a query sees a key that was chosen."""

    ids: jax.Array
    """[B S], documents."""
    places: jax.Array
    """[B S], real tokens of the row so far: padding is as if removed."""


def tokens(segment_ids: jax.Array) -> Tokens:
    return Tokens(segment_ids, jnp.cumsum(segment_ids > 0, axis=1, dtype=jnp.int32))


def sees(options: Options, queries: Tokens, keys: Tokens) -> jax.Array:
    """Returns `[... L S]`, for queries `[... L]` and keys `[... S]`."""
    behind = queries.places[..., :, None] - keys.places[..., None, :]
    seen = (queries.ids[..., :, None] == keys.ids[..., None, :]) & (keys.ids > 0)[..., None, :] & (behind >= 0)
    return seen if options.window_size is None else seen & (behind < options.window_size)


def of_softmax(o: jax.Array, lse: jax.Array, do: jax.Array, dlse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what the gradient of a score p takes, `p (dp - shift)` with `p = exp(score - lse)`: shift and lse, `BTN`.

    Both are 0 for a query that sees nothing.
    """
    shift_BTN = jnp.sum(o.astype(lse.dtype) * do.astype(lse.dtype), axis=3) - jnp.moveaxis(dlse, 1, 2)
    lse_BTN = jnp.moveaxis(lse, 1, 2)
    is_blind_BTN = lse_BTN == -jnp.inf
    return jnp.where(is_blind_BTN, 0, shift_BTN), jnp.where(is_blind_BTN, 0, lse_BTN)


def canonical(block_ids: jax.Array, num_blocks: int) -> jax.Array:
    """Returns the ids in order, each once, and -1 after them."""
    largest = jnp.iinfo(block_ids.dtype).max
    is_block = (block_ids >= 0) & (block_ids < num_blocks)
    ordered = jnp.sort(jnp.where(is_block, block_ids, largest), axis=-1, stable=False)
    is_new = jnp.diff(ordered, axis=-1, prepend=-1) != 0
    ordered = jnp.sort(jnp.where(is_new, ordered, largest), axis=-1, stable=False)
    return jnp.where(ordered < largest, ordered, -1)
