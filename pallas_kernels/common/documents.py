"""Packed rows: several documents in one row, told apart by `segment_ids_BT`.

Documents count from 1 in order and 0 is padding, wherever it stands. A state belongs to the first document of its row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def fill_padding(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns ids in which padding belongs to the document before it, or to the first one if none is before it.

    The ids never decrease, and one that equals the row's first id belongs to the document of the given state.
    Callers keep padding from being read or written by other means.
    """
    first_B1 = first_document(segment_ids)
    return jnp.maximum(jax.lax.cummax(segment_ids, axis=1), first_B1)


def first_document(segment_ids: Int[Array, "B T"]) -> Int[Array, "B 1"]:
    """Returns the id of each row's first document, which a given state belongs to; the largest integer if none is."""
    largest = jnp.iinfo(segment_ids.dtype).max
    return jnp.min(jnp.where(segment_ids > 0, segment_ids, largest), axis=1, keepdims=True, initial=largest)


def marks(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns what each token does to the state that comes to it: 0 passes it on, 1 goes on with it, 2 forgets it.

    That is 0 for padding, 2 for the first token of each document but the row's first, 1 for all other tokens.
    """
    seen_BT = jnp.pad(jax.lax.cummax(segment_ids, axis=1)[:, :-1], ((0, 0), (1, 0)))
    starts_BT = (seen_BT > 0) & (segment_ids > seen_BT)
    return jnp.where(segment_ids > 0, 1 + starts_BT, 0).astype(jnp.int32)


def clear_padding(x: Array, segment_ids: Int[Array, "B T"]) -> Array:
    """Returns `x [B T ...]` with zeros at padding."""
    is_real_BT = segment_ids > 0
    return jnp.where(is_real_BT.reshape(is_real_BT.shape + (1,) * (x.ndim - 2)), x, 0)
