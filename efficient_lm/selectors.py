"""Which blocks a token attends to beside its own: pure functions that return ids for `kernels.block_sparse_attention`.

Ids `[B T K J]` count the full blocks of a row (`efficient_lm.blocks`), -1 is none. All of them lie before the token's
own block and in its document: `Blocks.before` says which ones do.

The first four choose by what blocks hold. Patterns are numbers of blocks in the document, which depend on the number of
the token's own alone; `in_row` says where in the row these are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from efficient_lm.blocks import Blocks


def top_blocks(scores: Float[Array, "B T K C"], before: Bool[Array, "B T C"], count: int) -> Int[Array, "B T K J"]:
    """Returns the `count` blocks with the largest scores."""
    scores_BTKC = jnp.where(before[:, :, None], scores, -jnp.inf)
    values_BTKJ, ids_BTKJ = jax.lax.top_k(scores_BTKC, min(count, scores.shape[3]))
    return jnp.where(values_BTKJ > -jnp.inf, ids_BTKJ, -1)


def moba(
    q: Float[Array, "B T N H"], means: Float[Array, "B C K H"], before: Bool[Array, "B T C"], count: int
) -> Int[Array, "B T N J"]:
    """Returns the blocks whose mean key is most like the query, for each head (https://arxiv.org/abs/2502.13189)."""
    scores_BTKGC = _scores(q, means)
    return top_blocks(scores_BTKGC.reshape(*q.shape[:3], means.shape[1]), before, count)


def native_sparse(
    shares: Float[Array, "B T K C"], before: Bool[Array, "B T C"], is_fixed: Bool[Array, "B T C"], count: int
) -> Int[Array, "B T K J"]:
    """Returns those that are fixed, then those to which attention to compressed keys gives most (arXiv 2502.11089)."""
    return top_blocks(jnp.where(is_fixed[:, :, None], jnp.inf, shares), before, count)


def compressed_shares(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B C K H"],
    lse: Float[Array, "B T N"],
    seen: Bool[Array, "B T C"],
    *,
    scale: float,
) -> Float[Array, "B T K C"]:
    """Returns what attention gives to each key, summed over the heads of a group, which share a choice.

    `lse` are the logs of that softmax's denominators.
    """
    K = keys.shape[2]
    lse_BTKG1 = lse.reshape(*q.shape[:2], K, q.shape[2] // K, 1)
    # Of keys that a query does not see, the scores are without a bound; they take no part.
    scores_BTKGC = jnp.where(seen[:, :, None, None], scale * _scores(q, keys) - lse_BTKG1, -jnp.inf)
    return jnp.sum(jnp.exp(jnp.minimum(scores_BTKGC, 0)), axis=3)


def in_larger_blocks(
    shares: Float[Array, "B T K X"], small: Blocks, large: Blocks, stride: int
) -> Float[Array, "B T K C"]:
    """Returns the shares of large blocks, given those of small ones that overlap (arXiv 2502.11089, equation 9).

    One of the small blocks starts each `stride` tokens, which divides both sizes. It counts as often as there are
    strides of it in the large one: the paper's double sum, where blocks are counted from 1.
    """
    in_small, in_large = small.size // stride, large.size // stride
    starts_W = jnp.arange(1 - in_small, in_large)  # Of small blocks, in strides from the start of a large one.
    common_W = jnp.minimum(starts_W + in_small, in_large) - jnp.maximum(starts_W, 0)
    numbers_BCW = in_large * large.numbers[..., None] + starts_W
    is_earlier_BCX = (small.documents[:, None] > 0) & (small.documents[:, None] < large.documents[..., None])
    at_BCW = jnp.sum(is_earlier_BCX, axis=2, dtype=jnp.int32)[..., None] + numbers_BCW
    take = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))
    is_own_BCW = (take(small.documents, at_BCW) == large.documents[..., None]) & (large.documents > 0)[..., None]
    shares_BCWTK = take(jnp.moveaxis(shares, 3, 1), at_BCW)
    weights_BCW = jnp.where(is_own_BCW & (numbers_BCW >= 0), common_W, 0).astype(shares.dtype)
    return jnp.einsum("BCWTK,BCW->BTKC", shares_BCWTK, weights_BCW)


def quest(
    q: Float[Array, "B T N H"],
    smallest: Float[Array, "B C K H"],
    largest: Float[Array, "B C K H"],
    before: Bool[Array, "B T C"],
    count: int,
) -> Int[Array, "B T N J"]:
    """Returns the blocks whose scores may be largest, by the bounds of their keys (https://arxiv.org/abs/2406.10774)."""
    # A channel's product is largest at one of its bounds: at the larger if the query is positive there.
    bounds_BTKGC = _scores(jnp.maximum(q, 0), largest) + _scores(jnp.minimum(q, 0), smallest)
    return top_blocks(bounds_BTKGC.reshape(*q.shape[:3], largest.shape[1]), before, count)


def window(own: Int[Array, "B T"], count: int) -> Int[Array, "B T J"]:
    """Returns the `count` blocks before a token's own."""
    return own[..., None] - 1 - jnp.arange(count)


def first(own: Int[Array, "B T"], count: int) -> Int[Array, "B T J"]:
    """Returns the first blocks of a document: StreamingLLM's sinks (arXiv 2309.17453), global blocks."""
    return jnp.broadcast_to(jnp.arange(count), (*own.shape, count))


def strided(own: Int[Array, "B T"], stride: int, count: int) -> Int[Array, "B T J"]:
    """Returns every `stride`-th block before a token's own, at most `count` (https://arxiv.org/abs/1904.10509)."""
    return own[..., None] - stride * (1 + jnp.arange(count))


def random(own: Int[Array, "B T"], count: int, *, num_blocks: int, seed: int) -> Int[Array, "B T J"]:
    """Returns `count` different blocks before a token's own, the same for all tokens of one (arXiv 2007.14062).

    `num_blocks` is the largest number that a token's own block may have, plus one. It changes no choice.
    """
    key = jax.random.key(seed)
    draws_CJ = jax.vmap(lambda n: jax.random.uniform(jax.random.fold_in(key, n), (count,)))(jnp.arange(num_blocks))
    draws_BTJ = draws_CJ[own]
    # Floyd's way to draw without repetition: one of the first j + 1, or j itself if that one was drawn before.
    chosen = jnp.full((*own.shape, 0), -1)
    for i in range(count):
        j_BT = own - count + i
        drawn_BT = jnp.floor(draws_BTJ[..., i] * (j_BT + 1)).astype(jnp.int32)
        taken_BT = jnp.any(chosen == drawn_BT[..., None], axis=2)
        number_BT = jnp.where(j_BT < 0, -1, jnp.where(taken_BT, j_BT, drawn_BT))
        chosen = jnp.concatenate([chosen, number_BT[..., None]], axis=2)
    return chosen


def in_row(
    blocks: Blocks, segment_ids: Int[Array, "B T"], own: Int[Array, "B T"], *patterns: Int[Array, "B T _"]
) -> Int[Array, "B T 1 J"]:
    """Returns the ids of blocks that any of the patterns names, for all heads."""
    numbers_BTJ = jnp.concatenate(patterns, axis=2)
    is_before_BTJ = (numbers_BTJ >= 0) & (numbers_BTJ < own[..., None]) & (segment_ids[..., None] > 0)
    is_earlier_BTC = (blocks.documents[:, None] > 0) & (blocks.documents[:, None] < segment_ids[..., None])
    ids_BTJ = numbers_BTJ + jnp.sum(is_earlier_BTC, axis=2, dtype=jnp.int32)[..., None]
    return jnp.where(is_before_BTJ, ids_BTJ, -1)[:, :, None]


def a_few_tokens_at_a_time(select, *arrays: Array, batch_size: int = 512) -> Int[Array, "B T K J"]:
    """Returns `select(*arrays)` of arrays `[B T ...]`, such that scores of all tokens are never held at once."""
    arrays = jax.lax.stop_gradient(arrays)
    if arrays[0].shape[1] <= batch_size:
        return select(*arrays)
    tokens_first = [jnp.moveaxis(a, 1, 0)[:, :, None] for a in arrays]
    ids_TB1KJ = jax.lax.map(lambda xs: select(*xs), tokens_first, batch_size=batch_size)
    return jnp.moveaxis(ids_TB1KJ[:, :, 0], 0, 1)


def _scores(q_BTNH, keys_BCKH):
    """Returns `[B T K G C]` in float32."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, keys_BCKH.shape[2], N // keys_BCKH.shape[2], H)
    return jnp.einsum("BTKGH,BCKH->BTKGC", q_BTKGH, keys_BCKH, preferred_element_type=jnp.float32)
