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
_FORWARD_QUERIES, _BACKWARD_QUERIES, _KEYS, _GATHERED = 1024, 512, 4096, 2048
# Queries of a part, which all chose the same block.
_TOGETHER = 8
# Of VMEM for the queries of a tile, the gradients of keys beside them; and ids of a tile, which lie in SMEM.
_FORWARD_BYTES, _BACKWARD_BYTES, _MAX_IDS = 44 * 2**20, 26 * 2**20, 2**15
_TILE = 16  # Rows of bfloat16.
_VMEM = 64 * 2**20


def forward(options, q, k, v, block_ids, segment_ids):
    """Returns o and lse, `[B T N]`."""
    (B, T, N, H), K, P, L = q.shape, k.shape[2], v.shape[3], options.block_size
    # Blocks of q and o, of which there are two each, and what the softmaxes have summed up.
    row_bytes = 2 * q.dtype.itemsize * (lanes(H) + lanes(P)) + 4 * (LANES + lanes(L) + lanes(P))
    lists = _Lists(options, q, k, block_ids, _FORWARD_QUERIES, _FORWARD_BYTES // row_bytes)
    o, lse = pl.pallas_call(
        functools.partial(_forward_kernel, options.scale * _LOG2_E, lists),
        name="block_sparse_attention_tokens_forward",
        grid=lists.grid,
        in_specs=[*lists.specs(H, P), lists.of_queries(H)],
        out_specs=[lists.of_queries(P), lists.numbers()],
        out_shape=[lists.shape(P, v.dtype), lists.numbers_shape()],
        scratch_shapes=[pltpu.VMEM((lists.rows, width), jnp.float32) for width in (LANES, L, P)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
    )(*lists.arrays(k, v, segment_ids), lists.fill_heads(q))
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
            pltpu.VMEM((lists.rows, LANES), jnp.float32),
            pltpu.VMEM((lists.rows, LANES), jnp.float32),
            pltpu.VMEM((lists.rows, H), jnp.float32),
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


def _forward_kernel(scale, lists, tokens, starts, chosen, first, span, k, v, places, q, o, lse_1R, max_RL, sum_RL, o_RP):
    G, L, tile = q.shape[1], k.shape[1], pl.program_id(2)

    @pl.when(tile == 0)
    def _():
        max_RL[...] = jnp.full_like(max_RL, _START)
        sum_RL[...] = jnp.zeros_like(sum_RL)
        o_RP[...] = jnp.zeros_like(o_RP)

    def score(part):
        scores_RL = scale * lists.dot(part.gather(q), k[part.block], (1, 1))
        part.scores = [
            jnp.where(is_seen_GL, scores_RL[w * G : (w + 1) * G], _MASKED)
            for w, is_seen_GL in enumerate(part.sees(first, span, places[part.block]))
        ]
        part.max = [jnp.max(scores_GL, axis=1, keepdims=True) for scores_GL in part.scores]

    def weigh(part):
        old = part.read(max_RL)
        new = [jnp.maximum(old_GL, max_G1) for old_GL, max_G1 in zip(old, part.max, strict=True)]
        part.write(max_RL, new)
        part.shrink = [jnp.exp2(old_GL - new_GL) for old_GL, new_GL in zip(old, new, strict=True)]
        p = [jnp.exp2(scores_GL - widen(new_GL, L)) for scores_GL, new_GL in zip(part.scores, new, strict=True)]
        part.values = part.split(lists.dot(jnp.concatenate(p, axis=0).astype(v.dtype), v[part.block], (1, 0)))
        part.add(sum_RL, part.shrink, p)

    def add(part):
        part.add(o_RP, part.shrink, part.values)

    lists.for_parts(tile, starts, chosen, tokens, score, weigh, add)

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


def _backward_kernel(
    scale, lists, tokens, starts, chosen, first, span, k, v, places, q, do, lse_1R, shift_1R, dq, dk, dv, *scratch
):
    lse_RL, shift_RL, dq_RH, dk_SH, dv_SP, done = scratch
    G, L, (x, i, tile) = q.shape[1], k.shape[1], (pl.program_id(axis) for axis in range(3))

    @pl.when(tile == 0)
    def _():
        dq_RH[...] = jnp.zeros_like(dq_RH)
        for numbers_1R, columns_RL in ((lse_1R, lse_RL), (shift_1R, shift_RL)):
            @pl.loop(0, lists.queries // 8)
            def _(n, numbers_1R=numbers_1R, columns_RL=columns_RL):
                rows = pl.ds(pl.multiple_of(n * 8 * G, 8 * G), 8 * G)
                columns_RL[rows] = jnp.broadcast_to(numbers_1R[:, rows], (LANES, 8 * G)).T

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
        for is_seen_GL, scores_GL, dp_GL, lse_GL, shift_GL in zip(
            part.sees(first, span, places[part.block]),
            part.split(part.scores_RL),
            part.split(part.dp_RL),
            part.read(lse_RL),
            part.read(shift_RL),
            strict=True,
        ):
            p.append(jnp.exp2(jnp.where(is_seen_GL, scores_GL, _MASKED) - widen(lse_GL, L)))
            ds.append(p[-1] * (dp_GL - widen(shift_GL, L)))
        p_RL, ds_RL = (jnp.concatenate(a, axis=0).astype(k.dtype) for a in (p, ds))
        part.dq = part.split(lists.dot(ds_RL, k[part.block], (1, 0)))
        part.dk_LH = lists.dot(ds_RL, part.q_RH, (0, 0))
        part.dv_LP = lists.dot(p_RL, part.do_RP, (0, 0))

    def add(part):
        part.write(dq_RH, [a + b for a, b in zip(part.read(dq_RH), part.dq, strict=True)])
        of_block = pl.ds(pl.multiple_of((tile * lists.blocks_per_tile + part.block) * L, L), L)
        dk_SH[of_block] += part.dk_LH
        dv_SP[of_block] += part.dv_LP

    lists.for_parts(tile, starts, chosen, tokens, score, weigh, add)

    @pl.when(tile == pl.num_programs(2) - 1)
    def _():
        @pl.loop(0, lists.queries // 8)
        def _(n):
            rows = pl.ds(pl.multiple_of(n * 8 * G, 8 * G), 8 * G)
            dq_8GH = scale * dq_RH[rows].reshape(8, G, -1)
            dq[pl.ds(pl.multiple_of(n * 8, 8), 8)] = dq_8GH.astype(dq.dtype)

        @pl.when(i == pl.num_programs(1) - 1)
        def _():
            store([(dk_SH, dk.at[x]), (dv_SP, dv.at[x])], done)


class _Part:
    """Some queries that chose a block, G rows each; behind the last of them, ones that chose the next, blind here."""

    def __init__(self, G, block, start, num_left, tokens):
        self.block, self._G, self._num_left = block, G, num_left
        tokens = tokens.at[0, pl.ds(start, _TOGETHER)]
        self._queries = [tokens[w] for w in range(_TOGETHER)]
        self._rows = [pl.ds(pl.multiple_of(t * G, G), G) for t in self._queries]

    def gather(self, ref) -> jax.Array:
        return jnp.concatenate([ref[t] for t in self._queries], axis=0)

    def split(self, a_RX: jax.Array) -> list[jax.Array]:
        return [a_RX[w * self._G : (w + 1) * self._G] for w in range(_TOGETHER)]

    def read(self, ref) -> list[jax.Array]:
        return [ref[rows] for rows in self._rows]

    def write(self, ref, values: list[jax.Array]) -> None:
        # The last first: a blind one, which writes what it read, may be one of those that see as well.
        for rows, value in reversed(list(zip(self._rows, values, strict=True))):
            ref[rows] = value

    def add(self, ref, scale: list[jax.Array], more: list[jax.Array]) -> None:
        """Scales what a reference holds, by numbers that are the same in all lanes, and adds."""
        scale = [widen(a_GL, ref.shape[1]) for a_GL in scale]
        self.write(ref, [a * b + c for a, b, c in zip(scale, self.read(ref), more, strict=True)])

    def sees(self, first, span, places_1L: jax.Array) -> list[jax.Array]:
        num_left_1L = jnp.full(places_1L.shape, self._num_left)
        seen = [
            (places_1L - first[0, t] <= span[0, t]) & (w < num_left_1L) for w, t in enumerate(self._queries)
        ]
        return [jnp.broadcast_to(is_seen_1L, (self._G, places_1L.shape[1])) for is_seen_1L in seen]


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
        ids_XITJ = jnp.where(ids_XITJ < 0, self.num_blocks, ids_XITJ)
        pairs_XITJ = ids_XITJ * self.queries + jnp.arange(self.queries, dtype=jnp.int32)[:, None]
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

    def for_parts(self, key_tile, starts, chosen, tokens, *stages) -> None:
        """Takes all who chose a block of a tile of keys, part by part, through the stages.

        Several parts are taken at a time, each a stage behind the one before. A query may be in two of them, so an
        array that a stage writes is no other stage's: its parts then come one after the other.
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
