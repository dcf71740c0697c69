"""`block_sparse_attention` on TPU for groups of queries that share their blocks: a step takes some of a group's keys.

The ids, fetched ahead, say which blocks are copied. Forward, the rows of a step are queries times heads and the lanes
keys; backward it is the other way round. The gradients of all keys and values of a head stay in VMEM while its groups
pass by, so that each pair of a query and a key is visited once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention.selection import canonical
from pallas_kernels.block_sparse_attention.tpu_layout import LANES, NEVER, Rows, key_blocks, places

_LOG2_E = math.log2(math.e)
# Scores are taken in base 2. The softmax starts above what masked ones are, so that their exponentials are always 0.
_MASKED, _START = -2e30, -1e30
_MAX_ROWS = 1024
_FORWARD_KEYS, _BACKWARD_KEYS = 512, 256
# Ids that are fetched ahead lie in SMEM, of which there is 1 MB.
_MAX_IDS = 2**17
# Keys whose gradients stay in VMEM, and bytes that they may take.
_MAX_GRADIENT_BYTES = 32 * 2**20
_VMEM = 64 * 2**20


def unsupported(options, q, k, v, block_ids):
    """Returns why these arguments need another implementation, or None."""
    G = q.shape[2] // k.shape[2]
    if q.dtype not in (jnp.float32, jnp.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q {q.dtype}, k {k.dtype} and v {v.dtype}; they have to be float32 or bfloat16, all the same"
    if options.query_block * G < LANES:
        return f"groups of {options.query_block} queries times {G} heads; they need at least {LANES} rows"
    M = _split(options, G)
    if M * G < LANES:
        return f"{options.query_block} queries that share ids, which are cut into no equal parts"
    num_ids = block_ids.size * (options.query_block // M)
    if num_ids > _MAX_IDS:
        return f"more than {_MAX_IDS} ids at once, and here are {num_ids}"
    if options.block_size % 16 or options.block_size > 512:
        return f"blocks of {options.block_size} keys; they have to be a multiple of 16, at most 512"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"heads wider than 256, and here keys have {q.shape[3]} and values {v.shape[3]}"
    return None


def forward(options, q, k, v, block_ids, segment_ids):
    """Returns `(o, lse)` and the same residuals as `xla.forward`."""
    rows, ids = _groups(options, q, k, block_ids)
    steps = _Steps(options, ids, _FORWARD_KEYS, q)
    first, last, of_keys = places(options, rows, segment_ids)
    K, H, P = k.shape[2], q.shape[3], v.shape[3]
    R, numbers = rows.size, jax.ShapeDtypeStruct(first.shape, jnp.float32)
    o, lse = pl.pallas_call(
        functools.partial(_forward_kernel, options.scale * _LOG2_E, rows, steps),
        name="block_sparse_attention_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=steps.grid,
            in_specs=[rows.spec(H), _numbers(R), _numbers(R), *steps.specs(K, H, P)],
            out_specs=[rows.spec(P), _numbers(R)],
            scratch_shapes=[
                *[pltpu.VMEM((R, LANES), jnp.int32)] * 2,
                *[pltpu.VMEM((R, LANES), jnp.float32)] * 2,
                pltpu.VMEM((R, P), jnp.float32),
            ],
        ),
        out_shape=[rows.shape(P, v.dtype), numbers],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
    )(steps.ids, rows.to_kernel(q), first, last, *steps.blocks(k, v, of_keys))
    o, lse = rows.from_kernel(o), jnp.moveaxis(rows.undo_numbers(lse), 1, 2)
    return (o, lse), (q, k, v, block_ids, segment_ids, o, lse)


def _forward_kernel(scale, rows, steps, ids, q, first_1R, last_1R, *refs):
    keys, values, places, (o, lse_1R, first_RL, span_RL, max_RL, sum_RL, o_RP) = steps.split(refs)
    chosen = steps.chosen(ids)

    @pl.when(pl.program_id(2) == 0)
    def _():
        first_RL[...] = _columns(first_1R[...])
        span_RL[...] = _columns(last_1R[...]) - first_RL[...]
        max_RL[...] = jnp.full_like(max_RL, _START)
        sum_RL[...] = jnp.zeros_like(sum_RL)
        o_RP[...] = jnp.zeros_like(o_RP)

    @pl.when(chosen[0] >= 0)
    def _():
        scores_RX = scale * steps.dot(rows.read(q), steps.join(keys), (1, 1))
        wide = lambda a_RL: _widen(a_RL, scores_RX.shape[1])
        # How far behind the first that is seen stand a key, and the last? What is before the first wraps around.
        is_seen_RX = _unsigned(steps.places(places, chosen) - wide(first_RL[...])) <= _unsigned(wide(span_RL[...]))
        scores_RX = jnp.where(is_seen_RX, scores_RX, _MASKED)
        new_RL = jnp.maximum(max_RL[...], jnp.max(scores_RX, axis=1, keepdims=True))
        p_RX = jnp.exp2(scores_RX - wide(new_RL))
        shrink_RL = jnp.exp2(max_RL[...] - new_RL)
        max_RL[...] = new_RL
        sum_RL[...] = shrink_RL * sum_RL[...] + jnp.sum(p_RX, axis=1, keepdims=True)
        new_RP = steps.dot(p_RX.astype(o.dtype), steps.join(values), (1, 0))
        o_RP[...] = _widen(shrink_RL, o_RP.shape[1]) * o_RP[...] + new_RP

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        sums_RL = sum_RL[...]
        is_blind_RL = sums_RL == 0
        sums_RL = jnp.where(is_blind_RL, 1, sums_RL)
        rows.write(o, o_RP[...] / _widen(sums_RL, o_RP.shape[1]))
        lse_RL = jnp.where(is_blind_RL, -jnp.inf, (max_RL[...] + jnp.log2(sums_RL)) / _LOG2_E)
        lse_1R[...] = lse_RL.T[:1]


def backward(options, residuals, cotangents):
    """Returns the gradients of q, k and v."""
    q, k, v, block_ids, segment_ids, o, lse = residuals
    do, dlse = cotangents
    # d score = p (dp - shift)
    shift_BTN = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=3) - jnp.moveaxis(dlse, 1, 2)
    lse_BTN = jnp.moveaxis(lse, 1, 2)
    shift_BTN = jnp.where(lse_BTN == -jnp.inf, 0, shift_BTN)
    lse_BTN = jnp.where(lse_BTN == -jnp.inf, 0, lse_BTN)
    L, width = options.block_size, k.shape[3] + v.shape[3]
    most = max(_MAX_GRADIENT_BYTES // (4 * width) // L, 1) * L
    num_parts = pl.cdiv(k.shape[1], most)
    dq, dk, dv = jnp.zeros(q.shape, jnp.float32), [], []
    for part in range(num_parts):
        at = slice(part * most, (part + 1) * most)
        ids = canonical(block_ids - part * (most // L), pl.cdiv(k[:, at].shape[1], L))
        args = q, k[:, at], v[:, at], ids, segment_ids, at, lse_BTN, do, shift_BTN
        dq_part, dk_part, dv_part = _backward(options, jnp.float32 if num_parts > 1 else q.dtype, *args)
        dq = dq_part if num_parts == 1 else dq + dq_part
        dk.append(dk_part)
        dv.append(dv_part)
    return dq.astype(q.dtype), jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1)


def _backward(options, dq_dtype, q, k, v, block_ids, segment_ids, at, lse_BTN, do, shift_BTN):
    """Takes the keys `at` their place in the row; returns the gradients of q, of k and of v by what is between them."""
    rows, ids = _groups(options, q, k, block_ids)
    steps = _Steps(options, ids, _BACKWARD_KEYS, q)
    first, last, of_keys = places(options, rows, segment_ids)
    (B, S, K, H), P, R, L = k.shape, v.shape[3], rows.size, options.block_size
    S += -S % L
    of_keys = of_keys[..., at.start : at.start + S]
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, options.scale, rows, steps),
        name="block_sparse_attention_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=steps.grid,
            in_specs=[rows.spec(H), rows.spec(P), *[_numbers(R)] * 4, *steps.specs(K, H, P)],
            out_specs=[rows.spec(H), pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[
                pltpu.VMEM((H, R), jnp.float32),
                pltpu.VMEM((S, H), jnp.float32),
                pltpu.VMEM((S, P), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            rows.shape(H, dq_dtype),
            jax.ShapeDtypeStruct((B * K, S, H), jnp.float32),
            jax.ShapeDtypeStruct((B * K, S, P), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
    )(
        steps.ids,
        rows.to_kernel(q),
        rows.to_kernel(do),
        *(rows.numbers(a) for a in (_LOG2_E * lse_BTN, shift_BTN)),
        first,
        last,
        *steps.blocks(k, v, of_keys),
    )
    undo = lambda a_XSH, like: jnp.moveaxis(a_XSH.reshape(B, K, S, -1), 1, 2)[:, : like.shape[1]]
    return rows.from_kernel(dq), (options.scale * undo(dk, k)).astype(k.dtype), undo(dv, v).astype(v.dtype)


def _backward_kernel(scale, rows, steps, ids, q, do, lse_1R, shift_1R, first_1R, last_1R, *refs):
    keys, values, places, (dq, dk, dv, dq_HR, dk_SH, dv_SP, done) = steps.split(refs)
    chosen = steps.chosen(ids)
    x, u, step = (pl.program_id(axis) for axis in range(3))

    @pl.when(step == 0)
    def _():
        dq_HR[...] = jnp.zeros_like(dq_HR)

        @pl.when(u == 0)
        def _():
            dk_SH[...] = jnp.zeros_like(dk_SH)
            dv_SP[...] = jnp.zeros_like(dv_SP)

    @pl.when(chosen[0] >= 0)
    def _():
        q_RH, do_RP, k_XH = rows.read(q), rows.read(do), steps.join(keys)
        scores_XR = scale * _LOG2_E * steps.dot(k_XH, q_RH, (1, 1))
        places_XR = _widen(_columns(steps.places(places, chosen)), rows.size)
        is_seen_XR = _unsigned(places_XR - first_1R[...]) <= _unsigned(last_1R[...] - first_1R[...])
        p_XR = jnp.exp2(jnp.where(is_seen_XR, scores_XR, _MASKED) - lse_1R[...])
        dp_XR = steps.dot(steps.join(values), do_RP, (1, 1))
        ds_XR = (p_XR * (dp_XR - shift_1R[...])).astype(q_RH.dtype)
        dv_XP = steps.dot(p_XR.astype(do_RP.dtype), do_RP, (1, 0))
        dk_XH = steps.dot(ds_XR, q_RH, (1, 0))
        dq_HR[...] += steps.dot(k_XH, ds_XR, (0, 0))
        L = steps.block_size
        for i, block in enumerate(chosen):
            at = pl.ds(pl.multiple_of(jnp.maximum(block, 0) * L, L), L)  # Of a block that nothing chose, zeros.
            dk_SH[at] += dk_XH[i * L : (i + 1) * L]
            dv_SP[at] += dv_XP[i * L : (i + 1) * L]

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        rows.write(dq, scale * dq_HR[...].T)

        @pl.when(u == pl.num_programs(1) - 1)
        def _():
            copies = [
                pltpu.make_async_copy(of_keys, out.at[x], done.at[i])
                for i, (of_keys, out) in enumerate([(dk_SH, dk), (dv_SP, dv)])
            ]
            for copy in copies:
                copy.start()
            for copy in copies:
                copy.wait()


class _Steps:
    """The steps in which a group's blocks come by, some at a time, each as a block of its own."""

    def __init__(self, options, block_ids: jax.Array, num_keys: int, q: jax.Array):
        B, U, K, J = block_ids.shape
        self.block_size = options.block_size
        tile = LANES // math.gcd(self.block_size, LANES)  # Blocks that fill the lanes.
        self._n = n = tile * max(1, min(num_keys // (self.block_size * tile), pl.cdiv(J, tile)))
        self._U, self._J = U, J + -J % n
        ids_BUKJ = jnp.pad(block_ids, ((0, 0), (0, 0), (0, 0), (0, -J % n)), constant_values=-1)
        self.ids = jnp.moveaxis(ids_BUKJ, 2, 1).reshape(-1)
        self.grid = (B * K, U, self._J // n)
        self._precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def specs(self, K: int, H: int, P: int) -> list[pl.BlockSpec]:
        """Returns the blocks of k, of v and of places."""
        L, each = self.block_size, range(self._n)
        block = lambda i, x, u, s, ids: jnp.maximum(ids[self._at(x, u, s) + i], 0)
        of_head = lambda i, width: pl.BlockSpec((None, L, width), lambda x, *at: (x, block(i, x, *at), 0))
        of_row = lambda i: pl.BlockSpec((None, None, 1, L), lambda x, *at: (jax.lax.div(x, K), block(i, x, *at), 0, 0))
        return [*(of_head(i, H) for i in each), *(of_head(i, P) for i in each), *(of_row(i) for i in each)]

    def blocks(self, k: jax.Array, v: jax.Array, places_B1S: jax.Array) -> list[jax.Array]:
        """Returns the arrays of `specs`."""
        k_XSH, v_XSP = key_blocks(k, self.block_size), key_blocks(v, self.block_size)
        places_BC1L = places_B1S.reshape(places_B1S.shape[0], -1, 1, self.block_size)
        return [*[k_XSH] * self._n, *[v_XSP] * self._n, *[places_BC1L] * self._n]

    def split(self, refs):
        n = self._n
        return refs[:n], refs[n : 2 * n], refs[2 * n : 3 * n], refs[3 * n :]

    def chosen(self, ids) -> list[jax.Array]:
        """Returns the ids of this step's blocks."""
        at = self._at(*(pl.program_id(axis) for axis in range(3)))
        return [ids[at + i] for i in range(self._n)]

    def places(self, refs, chosen) -> jax.Array:
        """Returns the places of this step's keys in a row."""
        return jnp.concatenate(
            [jnp.where(i >= 0, ref[...], NEVER) for ref, i in zip(refs, chosen, strict=True)], axis=1
        )

    def join(self, refs) -> jax.Array:
        return jnp.concatenate([ref[...] for ref in refs], axis=0)

    def dot(self, a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
        dims = (((contracted[0],), (contracted[1],)), ((), ()))
        return jax.lax.dot_general(a, b, dims, precision=self._precision, preferred_element_type=jnp.float32)

    def _at(self, x, u, s):
        return (x * self._U + u) * self._J + s * self._n


def _numbers(R):
    return pl.BlockSpec((None, None, 1, R), lambda x, u, *_: (x, u, 0, 0))


def _split(options, G):
    """Returns how many queries a step takes of those that share ids: as many as fit."""
    M = options.query_block
    return next((M // n for n in range(1, M + 1) if M % n == 0 and M // n * G <= _MAX_ROWS), 0)


def _groups(options, q, k, block_ids):
    """Returns the groups that steps take, and their ids."""
    M = _split(options, q.shape[2] // k.shape[2])
    rows = Rows(q, k.shape[2], M)
    return rows, jnp.repeat(block_ids, options.query_block // M, axis=1)[:, : rows.num_groups]


def _columns(a_1R):
    """Returns `[R LANES]`, all lanes the same."""
    return jnp.broadcast_to(a_1R, (LANES, a_1R.shape[1])).T


def _widen(a_RL, width):
    """Returns `[R width]` of an array whose lanes are all the same."""
    return jnp.concatenate([a_RL] * pl.cdiv(width, LANES), axis=1)[:, :width]


def _unsigned(a):
    return jax.lax.bitcast_convert_type(a, jnp.uint32)
