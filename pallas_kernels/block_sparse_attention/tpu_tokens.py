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

from pallas_kernels.block_sparse_attention.tpu_layout import (
    LANES,
    NEVER,
    NOWHERE,
    key_blocks,
    lanes,
    query_range,
    store,
    widen,
    wrap,
)

_LOG2_E = math.log2(math.e)
_MASKED, _START = -2e30, -1e30
# Queries of a tile, keys of a tile, and rows that are gathered at a time.
_FORWARD_QUERIES, _BACKWARD_QUERIES, _KEYS, _GATHERED = 1024, 512, 4096, 4096
# Queries of a part, which all chose the same block; and those whose results are written at once.
_TOGETHER, _AT_ONCE = 8, 32
# Scores between which powers of two, their sums and their products with values stay far from the ends of float32.
_SMALL = 64
# Of VMEM for the queries of a tile, the gradients of keys beside them; and ids of a tile, which lie in SMEM.
_FORWARD_BYTES, _BACKWARD_BYTES, _MAX_IDS = 44 * 2**20, 26 * 2**20, 2**15
_TILE = 16  # Rows of bfloat16.
_VMEM = 64 * 2**20


def forward(options, q, k, v, block_ids, segment_ids):
    """Returns o and lse, `[B T N]`."""
    (B, T, N, H), K, P = q.shape, k.shape[2], v.shape[3]
    # Blocks of q and o, of which there are two each, and what the softmaxes have summed up.
    row_bytes = 2 * q.dtype.itemsize * (lanes(H) + lanes(P)) + 4 * (2 * LANES + lanes(P))
    lists = _Lists(options, q, k, block_ids, _FORWARD_QUERIES, _FORWARD_BYTES // row_bytes)
    o, lse = pl.pallas_call(
        functools.partial(_forward_kernel, options.scale * _LOG2_E, lists),
        name="block_sparse_attention_tokens_forward",
        grid=lists.grid,
        in_specs=[*lists.specs(H, P), lists.of_queries(H), lists.of_longest_key()],
        out_specs=[lists.of_queries(P), lists.numbers()],
        out_shape=[lists.shape(P, v.dtype), lists.numbers_shape()],
        scratch_shapes=[
            pltpu.VMEM((lists.queries, 1 + lanes(P) // LANES, lists.G, LANES), jnp.float32),
            pltpu.VMEM((lists.queries, lists.G, LANES), jnp.float32),
            pltpu.SMEM((1,), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
    )(*lists.arrays(k, v, segment_ids), lists.fill_heads(q), lists.longest_key(k))
    o = o.reshape(B, T, K, -1, P)[:, :, :, : N // K].reshape(B, T, N, P)
    lse_BKTG = lse.reshape(B, K, -1, lists.G)[:, :, :T, : N // K]
    return o, jnp.moveaxis(lse_BKTG, 1, 2).reshape(B, T, N)


def backward(options, dq_dtype, at, q, k, v, block_ids, segment_ids, lse_BTN, do, shift_BTN):
    """Takes the keys `at` their place in the row; returns the gradients of q, of k and of v by what is between them."""
    (B, T, N, H), K, P, L = q.shape, k.shape[2], v.shape[3], options.block_size
    row_bytes = 2 * (q.dtype.itemsize * (lanes(H) + lanes(P)) + dq_dtype.itemsize * lanes(H)) + 4 * (
        2 * LANES + lanes(H)
    )
    lists = _Lists(options, q, k, block_ids, _BACKWARD_QUERIES, _BACKWARD_BYTES // row_bytes)
    S = lists.num_blocks * L
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, options.scale, lists),
        name="block_sparse_attention_tokens_backward",
        grid=lists.grid,
        in_specs=[*lists.specs(H, P), lists.of_queries(H), lists.of_queries(P), lists.numbers(), lists.numbers()],
        out_specs=[lists.of_queries(H), pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=[
            lists.shape(H, dq_dtype),
            jax.ShapeDtypeStruct((B * K, S, H), jnp.float32),
            jax.ShapeDtypeStruct((B * K, S, P), jnp.float32),
        ],
        scratch_shapes=[
            *(pltpu.VMEM((lists.queries, lists.G, width), jnp.float32) for width in (LANES, LANES, H)),
            pltpu.VMEM((S, H), jnp.float32),
            pltpu.VMEM((S, P), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
    )(
        *lists.arrays(k, v, segment_ids, at),
        lists.fill_heads(q),
        lists.fill_heads(do),
        lists.to_numbers(_LOG2_E * lse_BTN),
        lists.to_numbers(shift_BTN),
    )
    dq = dq.reshape(B, T, K, -1, H)[:, :, :, : N // K].reshape(q.shape)
    undo = lambda a_XSH, like: jnp.moveaxis(a_XSH.reshape(B, K, S, -1), 1, 2)[:, : like.shape[1]]
    return dq, (options.scale * undo(dk, k)).astype(k.dtype), undo(dv, v).astype(v.dtype)


def _forward_kernel(
    scale, lists, tokens, starts, chosen, first, span, k, v, places, q, k_length, o, lse_1R, sums_QCGL, max_QGL, bound
):
    L, tile = k.shape[1], pl.program_id(2)

    @pl.when(tile == 0)
    def _():
        sums_QCGL[...] = jnp.zeros_like(sums_QCGL)
        bound[0] = abs(scale) * k_length[0, 0] * lists.longest_query(q)
        # That of small scores stays 0.
        max_QGL[...] = jnp.full_like(max_QGL, jnp.where(bound[0] <= _SMALL, 0, _START))

    def score(part):
        part.scores_RL = scale * lists.dot(part.gather(q), k[part.block], (1, 1))

    def weigh_small(part):
        part.p = [jnp.exp2(scores_GL) for scores_GL in part.visible(part.scores_RL, first, span, places)]
        part.values_RP = lists.dot(jnp.concatenate(part.p, axis=0).astype(v.dtype), v[part.block], (1, 0))

    def add_small(part):
        part.add(sums_QCGL, part.p, part.values_RP)

    def find_max(part):
        score(part)
        part.scores = part.visible(part.scores_RL, first, span, places)
        part.max = [jnp.max(scores_GL, axis=1, keepdims=True) for scores_GL in part.scores]

    def weigh(part):
        old = part.read(max_QGL)
        new = [jnp.maximum(old_GL, max_G1) for old_GL, max_G1 in zip(old, part.max, strict=True)]
        part.write(max_QGL, new)
        part.shrink = [jnp.exp2(old_GL - new_GL) for old_GL, new_GL in zip(old, new, strict=True)]
        part.p = [jnp.exp2(scores_GL - widen(new_GL, L)) for scores_GL, new_GL in zip(part.scores, new, strict=True)]
        part.values_RP = lists.dot(jnp.concatenate(part.p, axis=0).astype(v.dtype), v[part.block], (1, 0))

    def add(part):
        part.add(sums_QCGL, part.p, part.values_RP, part.shrink)

    # Nothing has to know the largest of small scores, or wait for it.
    is_small = bound[0] <= _SMALL
    for_parts = functools.partial(lists.for_parts, tile, starts, chosen, tokens)
    pl.when(is_small)(lambda: for_parts(score, weigh_small, add_small))
    pl.when(jnp.logical_not(is_small))(lambda: for_parts(find_max, weigh, add))

    @pl.when(tile == pl.num_programs(2) - 1)
    def _():
        lists.for_queries(lambda queries: _divide(queries, sums_QCGL, max_QGL, o, lse_1R))


def _divide(queries, sums_QCGL, max_QGL, o, lse_1R) -> None:
    """Writes the outputs of some queries, and the logarithms of what they are divided by."""
    Q, G, P = queries.size, o.shape[1], o.shape[2]
    sums_QG1 = jnp.sum(sums_QCGL[queries, 0], axis=2, keepdims=True)
    sums_QGL = jnp.broadcast_to(sums_QG1, (Q, G, LANES))
    is_blind_QGL = sums_QGL == 0
    sums_QGL = jnp.where(is_blind_QGL, 1, sums_QGL)
    for c in range(sums_QCGL.shape[1] - 1):
        column = slice(c * LANES, min((c + 1) * LANES, P))
        o_QGL = sums_QCGL[queries, 1 + c] / sums_QGL
        o[queries, :, column] = o_QGL[:, :, : column.stop - column.start].astype(o.dtype)
    lse_QGL = jnp.where(is_blind_QGL, -jnp.inf, (max_QGL[queries] + jnp.log2(sums_QGL)) / _LOG2_E)
    rows = pl.ds(pl.multiple_of(queries.start * G, Q * G), Q * G)
    lse_1R[:, rows] = lse_QGL.reshape(Q * G, LANES).T[:1]


def _backward_kernel(
    scale, lists, tokens, starts, chosen, first, span, k, v, places, q, do, lse_1R, shift_1R, dq, dk, dv, *scratch
):
    lse_QGL, shift_QGL, dq_QGH, dk_SH, dv_SP, done = scratch
    G, L, (x, i, tile) = q.shape[1], k.shape[1], (pl.program_id(axis) for axis in range(3))

    @pl.when(tile == 0)
    def _():
        dq_QGH[...] = jnp.zeros_like(dq_QGH)

        def broadcast(queries):
            rows = pl.ds(pl.multiple_of(queries.start * G, queries.size * G), queries.size * G)
            for numbers_1R, columns_QGL in ((lse_1R, lse_QGL), (shift_1R, shift_QGL)):
                columns_RL = jnp.broadcast_to(numbers_1R[:, rows], (LANES, rows.size)).T
                columns_QGL[queries] = columns_RL.reshape(-1, G, LANES)

        lists.for_queries(broadcast)

        @pl.when(i == 0)
        def _():
            dk_SH[...] = jnp.zeros_like(dk_SH)
            dv_SP[...] = jnp.zeros_like(dv_SP)

    def score(part):
        part.q_RH, part.do_RP = part.gather(q), part.gather(do)
        part.scores_RL = scale * _LOG2_E * lists.dot(part.q_RH, k[part.block], (1, 1))
        part.dp_RL = lists.dot(part.do_RP, v[part.block], (1, 1))

    def weigh(part):
        p, ds = [], []
        for scores_GL, dp_GL, lse_GL, shift_GL in zip(
            part.visible(part.scores_RL, first, span, places),
            part.split(part.dp_RL),
            part.read(lse_QGL),
            part.read(shift_QGL),
            strict=True,
        ):
            p.append(jnp.exp2(scores_GL - widen(lse_GL, L)))
            ds.append(p[-1] * (dp_GL - widen(shift_GL, L)))
        p_RL, ds_RL = (jnp.concatenate(a, axis=0).astype(k.dtype) for a in (p, ds))
        part.dq = part.split(lists.dot(ds_RL, k[part.block], (1, 0)))
        part.dk_LH = lists.dot(ds_RL, part.q_RH, (0, 0))
        part.dv_LP = lists.dot(p_RL, part.do_RP, (0, 0))

    def add(part):
        part.write(dq_QGH, [a + b for a, b in zip(part.read(dq_QGH), part.dq, strict=True)])
        of_block = pl.ds(pl.multiple_of((tile * lists.blocks_per_tile + part.block) * L, L), L)
        dk_SH[of_block] += part.dk_LH
        dv_SP[of_block] += part.dv_LP

    lists.for_parts(tile, starts, chosen, tokens, score, weigh, add)

    @pl.when(tile == pl.num_programs(2) - 1)
    def _():
        def write(queries):
            dq[queries] = (scale * dq_QGH[queries]).astype(dq.dtype)

        lists.for_queries(write)

        @pl.when(i == pl.num_programs(1) - 1)
        def _():
            store([(dk_SH, dk.at[x]), (dv_SP, dv.at[x])], done)


class _Part:
    """Some queries that chose a block, G rows each; behind the last of them, ones that chose the next, blind here."""

    def __init__(self, G, block, start, num_left, tokens):
        self.block, self._G, self._num_left = block, G, num_left
        tokens = tokens.at[0, pl.ds(start, _TOGETHER)]
        self._queries = [tokens[w] for w in range(_TOGETHER)]

    def gather(self, ref) -> jax.Array:
        return jnp.concatenate(self.read(ref), axis=0)

    def split(self, a_RX: jax.Array) -> list[jax.Array]:
        return [a_RX[w * self._G : (w + 1) * self._G] for w in range(_TOGETHER)]

    def read(self, ref, *at) -> list[jax.Array]:
        return [ref[t, *at] for t in self._queries]

    def write(self, ref, values: list[jax.Array], *at) -> None:
        # The last first: a blind one, which writes what it read, may be one of those that see as well.
        for t, value in reversed(list(zip(self._queries, values, strict=True))):
            ref[t, *at] = value

    def add(self, sums_QCGL, p: list[jax.Array], values_RP: jax.Array, shrink: list[jax.Array] | None = None) -> None:
        """Adds weights, lane upon lane, and values to sums, which are first scaled."""
        cut = lambda a_RX: [self.split(a_RX[:, c : c + LANES]) for c in range(0, a_RX.shape[1], LANES)]
        weights = functools.reduce(lambda a, b: [x + y for x, y in zip(a, b, strict=True)], cut(jnp.concatenate(p)))
        columns = [weights, *cut(values_RP)]
        places = [(c, slice(None), slice(0, column[0].shape[1])) for c, column in enumerate(columns)]
        old = [self.read(sums_QCGL, *at) for at in places]
        if shrink is not None:
            old = [[x_GL[:, : a.shape[1]] * a for x_GL, a in zip(shrink, o, strict=True)] for o in old]
        for at, o, column in zip(places, old, columns, strict=True):
            self.write(sums_QCGL, [a + b for a, b in zip(o, column, strict=True)], *at)

    def visible(self, scores_RL: jax.Array, first, span, places) -> list[jax.Array]:
        """Returns the scores of each query; those of keys that it does not see are as small as can be."""
        places_1L = places[self.block]
        num_left_1L = jnp.full(places_1L.shape, self._num_left)
        visible = []
        for w, (t, scores_GL) in enumerate(zip(self._queries, self.split(scores_RL), strict=True)):
            is_seen_1L = (places_1L - first[0, t] <= span[0, t]) & (w < num_left_1L)
            visible.append(jnp.where(jnp.broadcast_to(is_seen_1L, scores_GL.shape), scores_GL, _MASKED))
        return visible


class _Lists:
    """For each tile of queries and each block of keys, the queries that chose it."""

    def __init__(self, options, q, k, block_ids, most_queries, most_rows):
        (B, T, K, J), S, L = block_ids.shape, k.shape[1], options.block_size
        self._options, self.B, self.T, self.K, self.N = options, B, T, K, q.shape[2]
        self.G = self.N // K + -(self.N // K) % _TILE
        most_queries = min(most_queries, most_rows // self.G, _MAX_IDS // J)
        self.queries = min(max(most_queries // 8, 1) * 8, T + -T % 8)
        self.parts = max(1, _GATHERED // self.G // _TOGETHER)
        self.rows = self.queries * self.G
        self.blocks_per_tile = max(1, min(_KEYS, S) // L)
        num_tiles, num_key_tiles = pl.cdiv(T, self.queries), pl.cdiv(S, self.blocks_per_tile * L)
        self.grid = B * K, num_tiles, num_key_tiles
        self.num_blocks = num_key_tiles * self.blocks_per_tile
        self._missing = num_tiles * self.queries - T
        ids_BTKJ = jnp.pad(block_ids, ((0, 0), (0, self._missing), (0, 0), (0, 0)), constant_values=-1)
        ids_XITJ = jnp.moveaxis(ids_BTKJ, 2, 1).reshape(B * K, num_tiles, self.queries, J)
        is_block_XITJ, places_QJ = ids_XITJ >= 0, jnp.arange(self.queries, dtype=jnp.int32)[:, None]
        ids_XITJ = jnp.where(is_block_XITJ, ids_XITJ, self.num_blocks)
        # Behind the last list stands a tile's first query, which, unlike its last one, is never beyond the row.
        pairs_XITJ = ids_XITJ * self.queries + jnp.where(is_block_XITJ, places_QJ, 0)
        pairs_XI1L = jnp.sort(pairs_XITJ.reshape(B * K, num_tiles, 1, -1), axis=3, stable=False) % self.queries
        # Whole parts are read.
        self._tokens = jnp.pad(pairs_XI1L, ((0, 0), (0, 0), (0, 0), (0, _TOGETHER)))
        counts_XIC = _counts(ids_XITJ.reshape(B * K, num_tiles, -1), self.num_blocks)
        self._starts = jnp.pad(jnp.cumsum(counts_XIC, axis=2), ((0, 0), (0, 0), (1, 0)))[:, :, None]
        # From each block on, the first that any query chose.
        is_chosen_XI1C = jnp.diff(self._starts, axis=3, append=self._starts[..., -1:] + 1) > 0
        blocks = jnp.arange(self.num_blocks + 1, dtype=jnp.int32)
        self._chosen = jax.lax.cummin(jnp.where(is_chosen_XI1C, blocks, self.num_blocks), axis=3, reverse=True)
        self._precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def specs(self, H: int, P: int) -> list[pl.BlockSpec]:
        """Returns the blocks of lists, of what queries see, of k, v and the places of keys."""
        C, L, row = self.blocks_per_tile, self._options.block_size, lambda x: jax.lax.div(x, self.K)
        scalars = lambda width, x_of: pl.BlockSpec(
            (None, None, 1, width), lambda x, i, c: (x_of(x), i, 0, 0), memory_space=pltpu.SMEM
        )
        of_keys = lambda width: pl.BlockSpec((None, C, L, width), lambda x, i, c: (x, c, 0, 0))
        return [
            *(scalars(a.shape[3], lambda x: x) for a in (self._tokens, self._starts, self._chosen)),
            *[scalars(self.queries, row)] * 2,
            of_keys(H),
            of_keys(P),
            pl.BlockSpec((None, C, 1, L), lambda x, i, c: (row(x), c, 0, 0)),
        ]

    def arrays(self, k, v, segment_ids, at: slice = slice(0, None)) -> list[jax.Array]:
        """Returns the arrays of `specs`; the keys are those `at` their place in the row."""
        L = self._options.block_size
        first_BS, last_BS, keys_BS = query_range(self._options, segment_ids)
        keys_BS = keys_BS[:, at][:, : k.shape[1]]
        num_keys = self.num_blocks * L
        keys_BS = jnp.pad(keys_BS, ((0, 0), (0, num_keys - keys_BS.shape[1])), constant_values=NEVER)

        def of_queries(a_BS, fill):
            a_BT = jnp.pad(a_BS[:, -self.T :], ((0, 0), (0, self._missing)), constant_values=fill)
            return a_BT.reshape(self.B, self.grid[1], 1, -1)

        blocks = (key_blocks(a, self.blocks_per_tile * L) for a in (k, v))
        return [
            self._tokens,
            self._starts,
            self._chosen,
            of_queries(first_BS, NOWHERE),
            of_queries(wrap(last_BS - first_BS), wrap(0)),
            *(a.reshape(a.shape[0], -1, L, a.shape[2]) for a in blocks),
            wrap(keys_BS.reshape(self.B, -1, 1, L)),
        ]

    def of_queries(self, width: int) -> pl.BlockSpec:
        shape = (None, self.queries, self.G, width)
        return pl.BlockSpec(shape, lambda x, i, c: (jax.lax.div(x, self.K), i, jax.lax.rem(x, self.K), 0))

    def shape(self, width: int, dtype) -> jax.ShapeDtypeStruct:
        """Returns the shape of an array of `of_queries`."""
        return jax.ShapeDtypeStruct((self.B, self.T, self.K * self.G, width), dtype)

    def fill_heads(self, a_BTNH: jax.Array) -> jax.Array:
        """Returns the array with G heads for each of the K, a multiple of a tile."""
        a_BTKGH = a_BTNH.reshape(self.B, self.T, self.K, self.N // self.K, -1)
        missing = self.G - self.N // self.K
        return jnp.pad(a_BTKGH, ((0, 0),) * 3 + ((0, missing), (0, 0))).reshape(self.B, self.T, self.K * self.G, -1)

    def numbers(self) -> pl.BlockSpec:
        """Returns the blocks of an array with a number for each query and head."""
        return pl.BlockSpec((None, None, 1, self.rows), lambda x, i, c: (x, i, 0, 0))

    def numbers_shape(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*self.grid[:2], 1, self.rows), jnp.float32)

    def to_numbers(self, a_BTN: jax.Array) -> jax.Array:
        a_BTKG = self.fill_heads(a_BTN[..., None]).reshape(self.B, self.T, self.K, self.G)
        a_BTKG = jnp.pad(a_BTKG, ((0, 0), (0, self._missing), (0, 0), (0, 0)))
        return jnp.moveaxis(a_BTKG, 2, 1).reshape(self.numbers_shape().shape)

    def of_longest_key(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, 1), lambda x, i, c: (x, 0, 0), memory_space=pltpu.SMEM)

    def longest_key(self, k: jax.Array) -> jax.Array:
        """Returns, `[X 1 1]`, the length of the longest key. No product of two vectors is more than their lengths'."""
        squares_BSK = jnp.sum(jnp.square(k.astype(jnp.float32)), axis=3)
        return jnp.sqrt(jnp.max(squares_BSK, axis=1, initial=0)).reshape(-1, 1, 1)

    def longest_query(self, q) -> jax.Array:
        """Returns the length of the longest query of a tile."""
        size = math.gcd(self.queries, _AT_ONCE)

        def longer(n, most_8L):
            q_RH = q[pl.ds(pl.multiple_of(n * size, size), size)].reshape(size * self.G, -1).astype(jnp.float32)
            squares_R1 = jnp.sum(jnp.square(q_RH), axis=1, keepdims=True)
            squares_R8L = jnp.broadcast_to(squares_R1, (size * self.G, LANES)).reshape(-1, 8, LANES)
            return jnp.maximum(most_8L, jnp.max(squares_R8L, axis=0))

        most_8L = jax.lax.fori_loop(0, self.queries // size, longer, jnp.zeros((8, LANES), jnp.float32))
        return jnp.sqrt(jnp.max(most_8L, keepdims=True))[0, 0]

    def for_queries(self, write) -> None:
        """Calls it for all queries of a tile, some at a time."""
        size = math.gcd(self.queries, _AT_ONCE)

        @pl.loop(0, self.queries // size)
        def _(n):
            write(pl.ds(pl.multiple_of(n * size, size), size))

    def for_parts(self, key_tile, starts, chosen, tokens, *stages) -> None:
        """Takes all who chose a block of a tile of keys, part by part, through the stages.

        Many parts are taken at a time, of all blocks that they come from, each a stage behind the one before, so that
        one waits while others compute. A query may be in several of them: what a stage writes, no other stage touches,
        and the parts pass a stage in order.
        """
        first = key_tile * self.blocks_per_tile
        beyond = first + self.blocks_per_tile

        def next_part(block, start):
            known = jnp.minimum(block, beyond - 1)
            end = jnp.where(block < beyond, starts[0, known + 1], 0)
            part = _Part(self.G, known - first, start, end - start, tokens)
            is_last = start + _TOGETHER >= end
            return part, jnp.where(is_last, chosen[0, known + 1], block), jnp.where(is_last, end, start + _TOGETHER)

        def take(at):
            parts = []
            for _ in range(self.parts):
                part, *at = next_part(*at)
                parts.append(part)
            for i in range(len(parts) + len(stages) - 1):
                for late, stage in enumerate(stages):
                    if 0 <= i - late < len(parts):
                        stage(parts[i - late])
            return tuple(at)

        jax.lax.while_loop(lambda at: at[0] < beyond, take, (chosen[0, first], starts[0, first]))

    def dot(self, a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
        dims = (((contracted[0],), (contracted[1],)), ((), ()))
        return jax.lax.dot_general(a, b, dims, precision=self._precision, preferred_element_type=jnp.float32)


def _counts(ids_XIM: jax.Array, num_blocks: int) -> jax.Array:
    """Returns how often each block is in a list, `[X I num_blocks]`.

    By the two digits of its id, as a product of matrices: comparing each id with each block takes three times as long
    as all else around the kernels.
    """
    base = math.isqrt(num_blocks) + 1
    is_digit = lambda digits_XIM: (digits_XIM[..., None] == jnp.arange(base)).astype(jnp.bfloat16)
    high, low = is_digit(ids_XIM // base), is_digit(ids_XIM % base)
    counts = jnp.einsum("ximh,ximl->xihl", high, low, preferred_element_type=jnp.float32)
    return counts.reshape(*ids_XIM.shape[:2], -1)[..., :num_blocks].astype(jnp.int32)
