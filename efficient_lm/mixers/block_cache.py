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
    *summary_dims: str, batch_size: int, max_len: int, block_size: int, dtype: DTypeLike, **sizes: int
) -> BlockCache:
    """Returns an empty cache for `max_len` tokens, and for summaries of their blocks with the dimensions given."""
    C = -(-max_len // block_size)
    arrays = ("BSKH", dtype), ("BSKP", dtype)
    tokens = init_cache(*arrays, batch_size=batch_size, max_len=C * block_size, **sizes)
    sizes |= {"B": batch_size, "C": C}
    zeros = lambda dims: shard(jnp.zeros([sizes[d] for d in dims], dtype), dims)
    return BlockCache(tokens, tuple(zeros(dims) for dims in summary_dims), summary_dims)


def block_mean(a: Float[Array, "B C L ..."]) -> Float[Array, "B C ..."]:
    return jnp.mean(a, axis=2, dtype=jnp.float32).astype(a.dtype)


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
    summarize: Callable[[Array, Array], tuple[Array, ...]],
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

    `see(view, *queries)` is their attention, on each device's own rows and heads; `summarize` makes `[B C K ...]` of
    keys and values `[B C L K ...]` of blocks. Of what is near, a single token finds in its view its own block and the
    last `num_near` tokens.
    """
    query_dims = ",".join(["BTNH"] * len(queries))

    def see_row(k, v, ids, positions, *queries):
        blocks = full_blocks(ids, positions, block_size)
        block_k, block_v = blocks.take(k), blocks.take(v)
        own_ids = own_block_ids(ids, positions, block_size)
        view = View(k, v, ids, own_ids, positions, blocks, block_k, block_v, summarize(block_k, block_v))
        return see(view, *queries)

    def see_own(k, v, ids, positions, *queries):
        (k, v, positions), places = context.gather_keys((k, v, positions), ids)
        kv_ids = places["kv_segment_ids"]
        return see_row(k, v, ids if kv_ids is None else kv_ids, positions, *queries)

    row_dims = f"BSKH,BSKP,BS,BS,{query_dims}"
    if state is None:
        run = per_shard(see_own, row_dims, "BTNP", split_tokens=True)
        return run(*arrays, segment_ids, positions, *queries), None
    see_row = per_shard(see_row, row_dims, "BTNP")
    past, written = state.tokens, state.tokens.write(arrays, segment_ids, positions, length)
    in_blocks = lambda a: a.reshape(a.shape[0], -1, block_size, *a.shape[2:])

    summary_dims = ",".join(state.summary_dims)
    if segment_ids.shape[1] != 1:
        past_ids_BS = jnp.where(past.positions() < 0, 0, first_document(segment_ids))
        # The cache and the tokens make one row.
        pairs = zip((*past.arrays, past_ids_BS, past.positions()), (*arrays, segment_ids, positions), strict=True)
        o_BTNP = see_row(*(jnp.concatenate(pair, axis=1) for pair in pairs), *queries)
        renew = lambda k, v: summarize(in_blocks(k), in_blocks(v))
        summaries = per_shard(renew, "BSKH,BSKP", summary_dims)(*written.arrays)
        return o_BTNP, BlockCache(written, summaries, state.summary_dims)

    def see_cache(k, v, ids_B1, positions_B1, *summaries_and_queries):
        n = len(state.summaries)
        summaries, queries = summaries_and_queries[:n], summaries_and_queries[n:]
        B = len(ids_B1)
        block_k, block_v = in_blocks(k), in_blocks(v)
        own_B = positions_B1[:, 0] // block_size
        at_own = jax.vmap(lambda row, c: row[c])
        new = summarize(*(at_own(a, own_B)[:, None] for a in (block_k, block_v)))
        put = jax.vmap(lambda row, x, c: row.at[c].set(x[0]))
        summaries = tuple(put(old, x.astype(old.dtype), own_B) for old, x in zip(summaries, new, strict=True))

        near_BS = positions_B1 - jnp.arange(max(block_size, num_near))[::-1]
        ids_BS = jnp.where(near_BS >= 0, ids_B1, 0)
        own_ids_BS = jnp.where(ids_BS > 0, near_BS // block_size + 1, 0)
        at_near = jax.vmap(lambda row, near: row.at[jnp.maximum(near, 0)].get(mode="clip"))
        C = block_k.shape[1]
        places_CL = jnp.arange(C * block_size).reshape(C, block_size)
        blocks = Blocks(
            jnp.broadcast_to(places_CL, (B, C, block_size)),
            jnp.broadcast_to(ids_B1, (B, C)),
            jnp.broadcast_to(jnp.arange(C), (B, C)),
        )
        near_k, near_v = at_near(k, near_BS), at_near(v, near_BS)
        view = View(near_k, near_v, ids_BS, own_ids_BS, near_BS, blocks, block_k, block_v, summaries)
        return see(view, *queries), *summaries

    run = per_shard(see_cache, f"BSKH,BSKP,BT,BT,{summary_dims},{query_dims}", f"BTNP,{summary_dims}")
    o_BTNP, *summaries = run(*written.arrays, segment_ids, positions, *state.summaries, *queries)
    return o_BTNP, BlockCache(written, tuple(summaries), state.summary_dims)
