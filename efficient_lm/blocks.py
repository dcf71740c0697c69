"""Blocks of documents, wherever these stand in a row.

Borders count from a document's first token, so that packing moves none of them. The blocks of a row are its full ones,
side by side: they take no more room than its tokens, however many documents these are. A token's own block, full or
not, is to attention a document by itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Blocks(NamedTuple):
    """The full blocks of each row, in order; they may overlap."""

    tokens: Int[Array, "B C L"]
    """Where in the row their tokens stand; beyond its end where there is no block."""
    documents: Int[Array, "B C"]
    """The document of each, 0 where there is no block."""
    numbers: Int[Array, "B C"]
    """The place of each in its document, from 0."""

    @property
    def size(self) -> int:
        return self.tokens.shape[2]

    def take(self, x: Array) -> Array:
        """Returns `[B C L ...]` of `x [B T ...]`, zeros where there is no block."""
        return jax.vmap(lambda row, tokens: row.at[tokens].get(mode="fill", fill_value=0))(x, self.tokens)

    def before(self, segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Bool[Array, "B T C"]:
        """Returns which blocks lie before each token's own, in its document."""
        is_own_BTC = (self.documents[:, None] == segment_ids[..., None]) & (segment_ids[..., None] > 0)
        return is_own_BTC & (self.numbers[:, None] < positions[..., None] // self.size)


def full_blocks(
    segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"], size: int, stride: int | None = None
) -> Blocks:
    """Returns the full blocks of `size` tokens, of which one starts each `stride` tokens: C = T / stride, rounded up.

    `positions` are those in the document, as `document_positions` says. Without a stride, which is at most the size,
    blocks stand side by side. A block is never right of its tokens.
    """
    T, stride = segment_ids.shape[1], stride or size
    C = -(-T // stride)
    is_real_BT = segment_ids > 0
    numbers_BT = (positions - size + 1) // stride  # Of the last block that is full by then.
    is_last_BT = is_real_BT & (numbers_BT >= 0) & ((positions - size + 1) % stride == 0)
    (ends_BC,) = jax.vmap(lambda row: jnp.nonzero(row, size=C, fill_value=T))(is_last_BT)
    # With padding moved behind them, the tokens of a block stand side by side.
    order_BT = jnp.argsort(~is_real_BT, axis=1, stable=True)
    rank_BT = jnp.cumsum(is_real_BT, axis=1) - 1
    at_end = lambda x, fill: jax.vmap(lambda row, ends: row.at[ends].get(mode="fill", fill_value=fill))(x, ends_BC)
    ranks_BCL = at_end(rank_BT, 2 * T + size)[..., None] - jnp.arange(size)[::-1]
    tokens_BCL = jax.vmap(lambda row, ranks: row.at[ranks].get(mode="fill", fill_value=T))(order_BT, ranks_BCL)
    return Blocks(tokens_BCL, at_end(segment_ids, 0), at_end(numbers_BT, 0))


def own_block_ids(segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"], size: int) -> Int[Array, "B T"]:
    """Returns the number of each token's own block among all of the row, full or not, from 1; 0 at padding."""
    is_real_BT = segment_ids > 0
    starts_BT = is_real_BT & (positions % size == 0)
    return jnp.where(is_real_BT, jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32), 0)
