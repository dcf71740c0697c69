"""`block_sparse_attention` on TPU for queries with blocks of their own: walks blocks, gathers who chose them.

A tile of queries stays in VMEM, with what its softmaxes have summed up so far, while the keys pass by. Those that chose
a block are gathered, some at a time, multiplied with it, and their sums taken on: HBM sees nothing but q, k, v and o.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention import xla
from pallas_kernels.block_sparse_attention.tpu_layout import LANES, NEVER, NOWHERE, key_blocks, query_range, widen, wrap

_LOG2_E = math.log2(math.e)
_MASKED, _START = -2e30, -1e30
# Queries of a tile, keys of a tile, and rows that are gathered at a time.
_QUERIES, _KEYS, _GATHERED = 1024, 2048, 512
_TOGETHER = 8
_TILE = 16  # Rows of bfloat16.
_VMEM = 64 * 2**20


def forward(options, q, k, v, block_ids, segment_ids):
    """Returns `(o, lse)` and the same residuals as `xla.forward`."""
    (B, T, N, H), K, P, L = q.shape, k.shape[2], v.shape[3], options.block_size
    G = N // K + -(N // K) % _TILE
    lists = _Lists(options, q, k, block_ids, G)
    first, span, places = _places(options, lists, T, segment_ids)
    C = lists.blocks_per_tile
    of_queries = lambda width: pl.BlockSpec(
        (None, lists.queries, G, width), lambda x, i, c: (jax.lax.div(x, K), i, jax.lax.rem(x, K), 0)
    )
    of_keys = lambda width: pl.BlockSpec((None, C, L, width), lambda x, i, c: (x, c, 0, 0))
    scalars = lambda a, row: pl.BlockSpec(
        (None, None, 1, a.shape[3]), lambda x, i, c: (row(x), i, 0, 0), memory_space=pltpu.SMEM
    )
    x_of, b_of = (lambda x: x), (lambda x: jax.lax.div(x, K))
    rows = (lists.queries + 1) * G
    o, lse = pl.pallas_call(
        functools.partial(_forward_kernel, options.scale * _LOG2_E, lists),
        name="block_sparse_attention_tokens_forward",
        grid=lists.grid,
        in_specs=[
            scalars(lists.tokens, x_of),
            scalars(lists.starts, x_of),
            scalars(first, b_of),
            scalars(span, b_of),
            of_queries(H),
            of_keys(H),
            of_keys(P),
            pl.BlockSpec((None, C, 1, L), lambda x, i, c: (jax.lax.div(x, K), c, 0, 0)),
        ],
        out_specs=[of_queries(P), pl.BlockSpec((None, None, 1, rows - G), lambda x, i, c: (x, i, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((B, T, K * G, P), v.dtype),
            jax.ShapeDtypeStruct((B * K, lists.grid[1], 1, rows - G), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (LANES, L, P)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
    )(
        lists.tokens,
        lists.starts,
        first,
        span,
        _fill_heads(q, K, G),
        *(key_blocks(a, L * C).reshape(B * K, -1, L, a.shape[3]) for a in (k, v)),
        places,
    )
    o = o.reshape(B, T, K, G, P)[:, :, :, : N // K].reshape(B, T, N, P)
    lse_BKTG = lse.reshape(B, K, -1, G)[:, :, :T, : N // K]
    lse = jnp.moveaxis(lse_BKTG, 3, 2).reshape(B, N, T)
    return (o, lse), (q, k, v, block_ids, segment_ids, o, lse)


def backward(options, residuals, cotangents):
    """Returns the gradients of q, k and v."""
    return xla.backward(options, residuals, cotangents)


def _forward_kernel(scale, lists, tokens, starts, first, span, q, k, v, places, o, lse_1R, max_RL, sum_RL, o_RP):
    G, L, tile = q.shape[1], k.shape[1], pl.program_id(2)

    @pl.when(tile == 0)
    def _():
        max_RL[...] = jnp.full_like(max_RL, _START)
        sum_RL[...] = jnp.zeros_like(sum_RL)
        o_RP[...] = jnp.zeros_like(o_RP)

    @pl.loop(0, lists.blocks_per_tile)
    def _(c):
        block = tile * lists.blocks_per_tile + c
        start, end = starts[0, block], starts[0, block + 1]
        k_LH, v_LP = k[c], v[c]
        places_GL = jnp.broadcast_to(places[c], (G, L))

        @pl.loop(0, pl.cdiv(end - start, lists.gathered))
        def _(n):
            parts = [
                _Part(lists, start + n * lists.gathered + w, end, tokens, G)
                for w in range(0, lists.gathered, _TOGETHER)
            ]

            # What softmaxes have summed up is read before the part before writes: a store holds up all later loads.
            def read(part):
                part.scores_RL = scale * lists.dot(part.gather(q), k_LH, (1, 1))
                part.max, part.sum = part.read(max_RL), part.read(sum_RL)

            def weigh(part):
                part.shrink, p = [], []
                for w, (t, old_GL, sum_GL) in enumerate(zip(part.real, part.max, part.sum, strict=True)):
                    is_seen_GL = places_GL - first[0, t] <= span[0, t]
                    scores_GL = jnp.where(is_seen_GL, part.scores_RL[w * G : (w + 1) * G], _MASKED)
                    new_GL = jnp.maximum(old_GL, jnp.max(scores_GL, axis=1, keepdims=True))
                    p.append(jnp.exp2(scores_GL - widen(new_GL, L)))
                    part.shrink.append(jnp.exp2(old_GL - new_GL))
                    max_RL[part.rows[w]] = new_GL
                    sum_RL[part.rows[w]] = widen(part.shrink[w], L) * sum_GL + p[w]
                part.o = part.read(o_RP)
                part.values_RP = lists.dot(jnp.concatenate(p, axis=0).astype(v_LP.dtype), v_LP, (1, 0))

            def add(part):
                for w, (o_GP, shrink_GL) in enumerate(zip(part.o, part.shrink, strict=True)):
                    o_RP[part.rows[w]] = widen(shrink_GL, o_GP.shape[1]) * o_GP + part.values_RP[w * G : (w + 1) * G]

            for i in range(len(parts) + 2):
                for stage, late in ((read, 0), (weigh, 1), (add, 2)):
                    if 0 <= i - late < len(parts):
                        stage(parts[i - late])

    @pl.when(tile == pl.num_programs(2) - 1)
    def _():
        @pl.loop(0, lists.queries // 8)
        def _(n):
            rows = pl.ds(pl.multiple_of(n * 8 * G, 8 * G), 8 * G)
            sums_R1 = jnp.sum(sum_RL[rows], axis=1, keepdims=True)
            sums_RL = jnp.broadcast_to(sums_R1, (8 * G, LANES))
            is_blind_RL = sums_RL == 0
            sums_RL = jnp.where(is_blind_RL, 1, sums_RL)
            o_8GP = (o_RP[rows] / widen(sums_RL, o_RP.shape[1])).reshape(8, G, -1)
            o[pl.ds(pl.multiple_of(n * 8, 8), 8)] = o_8GP.astype(o.dtype)
            lse_RL = jnp.where(is_blind_RL, -jnp.inf, (max_RL[rows] + jnp.log2(sums_RL)) / _LOG2_E)
            lse_1R[:, rows] = lse_RL.T[:1]


class _Part:
    """Some queries that chose a block; in the place of those of other blocks is one whose results nothing reads."""

    def __init__(self, lists, start, end, tokens, G):
        chosen = [jnp.where(at < end, tokens[0, at], lists.queries) for at in (start + w for w in range(_TOGETHER))]
        self.real = [jnp.minimum(t, lists.queries - 1) for t in chosen]
        self.rows = [pl.ds(pl.multiple_of(t * G, G), G) for t in chosen]

    def gather(self, ref):
        return jnp.concatenate([ref[t] for t in self.real], axis=0)

    def read(self, ref):
        return [ref[rows] for rows in self.rows]


class _Lists:
    """For each tile of queries and each block of keys, the queries that chose it."""

    def __init__(self, options, q, k, block_ids, G):
        (B, T, K, J), S = block_ids.shape, k.shape[1]
        self.queries = min(_QUERIES, T + -T % 8)
        self.gathered = _GATHERED // G
        self.blocks_per_tile = C = max(1, min(_KEYS, S) // options.block_size)
        num_tiles, num_key_tiles = pl.cdiv(T, self.queries), pl.cdiv(S, C * options.block_size)
        self.grid = B * K, num_tiles, num_key_tiles
        num_blocks = num_key_tiles * C
        missing = num_tiles * self.queries - T
        ids_BTKJ = jnp.pad(block_ids, ((0, 0), (0, missing), (0, 0), (0, 0)), constant_values=-1)
        ids_XITJ = jnp.moveaxis(ids_BTKJ, 2, 1).reshape(B * K, num_tiles, self.queries, J)
        ids_XITJ = jnp.where(ids_XITJ < 0, num_blocks, ids_XITJ)
        pairs_XITJ = ids_XITJ * self.queries + jnp.arange(self.queries, dtype=jnp.int32)[:, None]
        pairs_XI1L = jnp.sort(pairs_XITJ.reshape(B * K, num_tiles, 1, -1), axis=3) % self.queries
        # Whole batches are read.
        self.tokens = jnp.pad(pairs_XI1L, ((0, 0), (0, 0), (0, 0), (0, self.gathered)))
        is_before = ids_XITJ.reshape(B * K, num_tiles, 1, -1) < jnp.arange(num_blocks + 1, dtype=jnp.int32)[:, None]
        self.starts = jnp.sum(is_before, axis=3, dtype=jnp.int32)[:, :, None]
        self._precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def dot(self, a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
        dims = (((contracted[0],), (contracted[1],)), ((), ()))
        return jax.lax.dot_general(a, b, dims, precision=self._precision, preferred_element_type=jnp.float32)


def _places(options, lists, T, segment_ids):
    """Returns the first place that each query sees and how far it sees from there, and the places of keys."""
    first_BS, last_BS, keys_BS = query_range(options, segment_ids)
    B, num_tiles, L = segment_ids.shape[0], lists.grid[1], options.block_size
    missing = num_tiles * lists.queries - T
    of_queries = lambda a_BS, fill: jnp.pad(a_BS[:, -T:], ((0, 0), (0, missing)), constant_values=fill).reshape(
        B, num_tiles, 1, -1
    )
    num_keys = lists.grid[2] * lists.blocks_per_tile * L
    keys_BS = jnp.pad(keys_BS, ((0, 0), (0, num_keys - keys_BS.shape[1])), constant_values=NEVER)
    return (
        of_queries(first_BS, NOWHERE),
        of_queries(wrap(last_BS - first_BS), wrap(0)),
        wrap(keys_BS.reshape(B, -1, 1, L)),
    )


def _fill_heads(q, K, G):
    B, T, N, H = q.shape
    q_BTKGH = q.reshape(B, T, K, N // K, H)
    return jnp.pad(q_BTKGH, ((0, 0),) * 3 + ((0, G - N // K), (0, 0))).reshape(B, T, K * G, H)
