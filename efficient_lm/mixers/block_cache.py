"""What queries see in blocks, of a row or of a cache: `attend` of `mixers/cache.py` for attention to chosen blocks.

The cache is a full one, whose slots are the document's positions, and a summary of each block beside it.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from efficient_lm import context
from efficient_lm.blocks import Blocks, full_blocks, own_block_ids
from efficient_lm.mixers.base import Leaf
from efficient_lm.mixers.cache import Cache, init_cache, merge
from efficient_lm.sharding import per_shard, shard
from pallas_kernels.common.documents import first_document


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCache:
    tokens: Cache
    """Keys `[B S K H]` and values `[B S K P]`, S a multiple of the block size."""
    summaries: tuple[Leaf, ...]  # [B C K ...], as summary_dims say
    summary_dims: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def length(self) -> Leaf:
        return self.tokens.length


def init_block_cache(
    *summary_dims: str,
    batch_size: int,
    max_len: int,
    block_size: int,
    stride: int | None = None,
    dtype: DTypeLike,
    **sizes: int,
) -> BlockCache:
    """Returns an empty cache for `max_len` tokens, and for summaries with the dimensions given.

    There is one for each block, or for each `stride` tokens.
    """
    S = -(-max_len // block_size) * block_size
    arrays = ("BSKH", dtype), ("BSKP", dtype)
    tokens = init_cache(*arrays, batch_size=batch_size, max_len=S, **sizes)
    sizes |= {"B": batch_size, "C": S // (stride or block_size)}
    zeros = lambda dims: shard(jnp.zeros([sizes[d] for d in dims], dtype), dims)
    return BlockCache(tokens, tuple(zeros(dims) for dims in summary_dims), summary_dims)


def block_mean(a: Float[Array, "B C L ..."]) -> Float[Array, "B C ..."]:
    return jnp.mean(a, axis=2, dtype=jnp.float32).astype(a.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """How blocks of keys and values are summarized."""

    size: int
    stride: int
    """A block of `size` tokens starts each `stride`, which divides the size, and that of the blocks chosen from."""
    make: Callable[..., tuple[Array, ...]]
    """Makes `[B C K ...]` of keys and values `[B C L K ...]`, and of the weights."""
    weights: tuple[Array, ...] = ()
    weight_dims: tuple[str, ...] = ()


class View(NamedTuple):
    """What the queries, the last T of the tokens here, may see."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K P"]
    segment_ids: Int[Array, "B S"]
    own_ids: Int[Array, "B S"]
    """Ids of each token's own block."""
    positions: Int[Array, "B S"]
    blocks: Blocks
    block_k: Float[Array, "B C L K H"]
    block_v: Float[Array, "B C L K P"]
    summarized: Blocks
    """What the summaries are of: the blocks, or shorter ones that may overlap."""
    summaries: tuple[Array, ...]

    def of_queries(self, T: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """Returns the segment ids and positions of the last T tokens."""
        first = self.segment_ids.shape[1] - T
        return self.segment_ids[:, first:], self.positions[:, first:]

    def attend(self, q: Float[Array, "B T N H"], block_ids: Int[Array, "B T M J"]) -> Float[Array, "B T N P"]:
        """Returns attention to each query's own block and to those named, for M heads: those of the keys, or all."""
        (B, T, N, _), K, M = q.shape, self.k.shape[2], block_ids.shape[2]
        own = self.near(q, self.own_ids)
        if block_ids.shape[3] == 0:
            return own[0]
        if T == 1:
            return merge(own, self._one(q, block_ids))
        k_BSKH, v_BSKP = (a.reshape(B, -1, *a.shape[3:]) for a in (self.block_k, self.block_v))
        op = lambda q, ids: kernels.block_sparse_attention(q, k_BSKH, v_BSKP, ids, block_size=self.blocks.size)
        if M == K:
            return merge(own, op(q, block_ids))
        # One head of each group after the other, so that keys are not copied for each.
        split = lambda a: jnp.moveaxis(a.reshape(B, T, K, N // K, a.shape[3]), 3, 0)
        o_GBTKP, lse_GBKT = jax.lax.map(lambda xs: op(*xs), (split(q), split(block_ids)))
        o_BTNP = jnp.moveaxis(o_GBTKP, 0, 3).reshape(B, T, N, v_BSKP.shape[3])
        return merge(own, (o_BTNP, jnp.moveaxis(lse_GBKT, 0, 2).reshape(B, N, T)))

    def _one(self, q, block_ids):
        """Returns attention of one token to the blocks named, of which alone anything is read."""
        (B, _, N, _), K, (_, _, M, J), L = q.shape, self.k.shape[2], block_ids.shape, self.blocks.size
        head_M1, ids_BMJ = jnp.arange(M)[:, None] // (M // K), block_ids[:, 0]
        chosen = jax.vmap(lambda a_CLKH, ids_MJ: a_CLKH[jnp.maximum(ids_MJ, 0), :, head_M1])
        # Each list is a row of its own, with the heads that share it.
        k_RS1H, v_RS1P = (chosen(a, ids_BMJ).reshape(B * M, J * L, 1, -1) for a in (self.block_k, self.block_v))
        is_there_RS = jnp.repeat(ids_BMJ.reshape(B * M, J) >= 0, L, axis=1).astype(jnp.int32)
        ids_R1 = jnp.ones((B * M, 1), jnp.int32)
        q_R1GH = q.reshape(B * M, 1, N // M, q.shape[3])
        o_R1GP, lse_RG1 = kernels.attention(
            q_R1GH, k_RS1H, v_RS1P, causal=False, segment_ids=ids_R1, kv_segment_ids=is_there_RS
        )
        return o_R1GP.reshape(B, 1, N, -1), lse_RG1.reshape(B, N, 1)

    def near(
        self, q: Float[Array, "B T N H"], ids: Int[Array, "B S"], window_size: int | None = None
    ) -> tuple[Float[Array, "B T N P"], Float[Array, "B N T"]]:
        """Returns attention to the tokens of the same id, and the log of its denominator."""
        first = ids.shape[1] - q.shape[1]
        kv_ids = ids if first else None
        return kernels.attention(
            q, self.k, self.v, window_size=window_size, segment_ids=ids[:, first:], kv_segment_ids=kv_ids
        )


def attend_in_blocks(
    see: Callable[..., Array],
    summary: Summary,
    queries: tuple[Float[Array, "B T N ..."], ...],
    arrays: tuple[Array, Array],
    state: BlockCache | None,
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    block_size: int,
    num_near: int,
) -> tuple[Float[Array, "B T N P"], BlockCache | None]:
    """Returns what the tokens see, and the cache after them.

    `see(view, *queries)` is their attention, on each device's own rows and heads. Of what is near, a single token finds
    in its view its own block and the last `num_near` tokens.
    """
    weights, weight_dims = summary.weights, summary.weight_dims

    def see_row(k, v, ids, positions, *rest):
        queries, weights = rest[: len(rest) - len(weight_dims)], rest[len(rest) - len(weight_dims) :]
        blocks = full_blocks(ids, positions, block_size)
        block_k, block_v = blocks.take(k), blocks.take(v)
        summarized, summarized_k, summarized_v = blocks, block_k, block_v
        if (summary.size, summary.stride) != (block_size, block_size):
            summarized = full_blocks(ids, positions, summary.size, summary.stride)
            summarized_k, summarized_v = summarized.take(k), summarized.take(v)
        summaries = summary.make(summarized_k, summarized_v, *weights)
        own_ids = own_block_ids(ids, positions, block_size)
        view = View(k, v, ids, own_ids, positions, blocks, block_k, block_v, summarized, summaries)
        return see(view, *queries)

    def see_own(k, v, ids, positions, *rest):
        (k, v, positions), places = context.gather_keys((k, v, positions), ids)
        kv_ids = places["kv_segment_ids"]
        return see_row(k, v, ids if kv_ids is None else kv_ids, positions, *rest)

    rest_dims = [*["BTNH"] * len(queries), *weight_dims]
    row_dims = ",".join(["BSKH", "BSKP", "BS", "BS", *rest_dims])
    if state is None:
        run = per_shard(see_own, row_dims, "BTNP", split_tokens=True)
        return run(*arrays, segment_ids, positions, *queries, *weights), None
    see_row = per_shard(see_row, row_dims, "BTNP")
    past, written = state.tokens, state.tokens.write(arrays, segment_ids, positions, length)

    summary_dims = state.summary_dims
    if segment_ids.shape[1] != 1:
        past_ids_BS = jnp.where(past.positions() < 0, 0, first_document(segment_ids))
        # The cache and the tokens make one row.
        pairs = zip((*past.arrays, past_ids_BS, past.positions()), (*arrays, segment_ids, positions), strict=True)
        o_BTNP = see_row(*(jnp.concatenate(pair, axis=1) for pair in pairs), *queries, *weights)
        in_blocks = lambda a: _side_by_side(a, summary.size, summary.stride)
        renew = lambda k, v, *weights: summary.make(in_blocks(k), in_blocks(v), *weights)
        run = per_shard(renew, ",".join(["BSKH", "BSKP", *weight_dims]), ",".join(summary_dims))
        return o_BTNP, BlockCache(written, run(*written.arrays, *weights), summary_dims)

    def see_cache(k, v, ids_B1, positions_B1, *rest):
        n, m = len(summary_dims), len(weight_dims)
        old, queries, weights = rest[:n], rest[n : len(rest) - m], rest[len(rest) - m :]
        summaries = _renew_last(summary, old, k, v, positions_B1[:, 0], weights)
        block_k, block_v = (_side_by_side(a, block_size, block_size) for a in (k, v))

        near_BS = positions_B1 - jnp.arange(max(block_size, num_near))[::-1]
        ids_BS = jnp.where(near_BS >= 0, ids_B1, 0)
        own_ids_BS = jnp.where(ids_BS > 0, near_BS // block_size + 1, 0)
        at_near = jax.vmap(lambda row, near: row.at[jnp.maximum(near, 0)].get(mode="clip"))
        near_k, near_v = at_near(k, near_BS), at_near(v, near_BS)
        blocks = _blocks_of_cache(ids_B1, k.shape[1], block_size, block_size)
        summarized = _blocks_of_cache(ids_B1, k.shape[1], summary.size, summary.stride)
        view = View(near_k, near_v, ids_BS, own_ids_BS, near_BS, blocks, block_k, block_v, summarized, summaries)
        return see(view, *queries), *summaries

    dims = ",".join(["BSKH", "BSKP", "BT", "BT", *summary_dims, *rest_dims])
    run = per_shard(see_cache, dims, ",".join(["BTNP", *summary_dims]))
    o_BTNP, *summaries = run(*written.arrays, segment_ids, positions, *state.summaries, *queries, *weights)
    return o_BTNP, BlockCache(written, tuple(summaries), summary_dims)


def _side_by_side(a: Float[Array, "B S ..."], size: int, stride: int) -> Float[Array, "B C L ..."]:
    """Returns the blocks of a cache, of which one starts each `stride` slots. The last are not full, and never seen."""
    strides = a.reshape(a.shape[0], -1, stride, *a.shape[2:])
    return jnp.concatenate([jnp.roll(strides, -n, axis=1) for n in range(size // stride)], axis=2)


def _blocks_of_cache(ids: Int[Array, "B 1"], num_slots: int, size: int, stride: int) -> Blocks:
    B, C = len(ids), num_slots // stride
    tokens_CL = stride * jnp.arange(C)[:, None] + jnp.arange(size)
    return Blocks(
        jnp.broadcast_to(tokens_CL, (B, C, size)),
        jnp.broadcast_to(ids, (B, C)),
        jnp.broadcast_to(jnp.arange(C), (B, C)),
    )


def _renew_last(summary, old, k, v, positions_B, weights):
    """Returns the summaries of a cache, that of the last full block made anew if one of the rows has just filled it."""
    ahead_B = positions_B - summary.size + 1
    last_B = jnp.maximum(ahead_B, 0) // summary.stride  # Before any is full, what is written is never seen.
    is_filled_B = (ahead_B >= 0) & (ahead_B % summary.stride == 0)

    def make():
        block = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, summary.size))
        made = summary.make(*(block(a, last_B * summary.stride)[:, None] for a in (k, v)), *weights)
        return tuple(new[:, 0].astype(a.dtype) for new, a in zip(made, old, strict=True))

    at_last = jax.vmap(lambda row, c: row[c])
    new = jax.lax.cond(jnp.any(is_filled_B), make, lambda: tuple(at_last(a, last_B) for a in old))
    put = jax.vmap(lambda row, x, c: row.at[c].set(x))
    return tuple(put(a, x, last_B) for a, x in zip(old, new, strict=True))
