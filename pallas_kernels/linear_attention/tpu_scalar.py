"""Linear attention with one decay per head and token on TPU, as in Mamba-2: https://arxiv.org/abs/2405.21060.

The maths is that of `xla.py` and the decays those of `common/decays.py`, in chunks of 128 tokens: the side of a matrix
unit. A grid step takes one or two chunks of up to eight heads: while the products of one head are under way, those of
others are issued. The states stay in VMEM while a row is walked.

Three kernels. `forward` gives the outputs. The backward pass first runs `states`, which walks the row again and leaves
the state before each step in HBM, and then `backward`, from the last step to the first.

What lies along lanes and what along sublanes decides what a kernel costs. Logs come as tiles [heads, L], a row per
head. Forward, pairs are [reader, written]: a reader's log is needed as a column, which takes one transposition for all
heads and a broadcast over lanes for each. Backward, pairs are [written, reader] and dq is computed transposed: but for
one transposition of q, k and dq per key head, all products are of the kinds that the matrix unit takes, and sums over
what a reader reads run over sublanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention import tpu_layout
from pallas_kernels.linear_attention.tpu_layout import CHUNK, TILE, Heads, Tiles, load, store

_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * 1024 * 1024
)


def unsupported(q, k, v, g):
    """Returns why these arguments need another implementation, or None."""
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or q.dtype not in (jnp.float32, jnp.bfloat16) or g.dtype != jnp.float32:
        return f"q {q.dtype}, k {k.dtype}, v {v.dtype}; they have to be all float32, or all bfloat16"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"heads wider than 256, and here keys have {q.shape[3]} and values {v.shape[3]}"
    return None


def forward(scale, before, q, k, v, g, state, segment_ids):
    """Returns (o, state)."""
    call = _Call(q, k, v, before)
    logs, ids = call.gates(g, segment_ids)
    o, last = pl.pallas_call(
        functools.partial(_forward_kernel, scale, before),
        name="linear_attention_forward",
        grid=call.tiles.grid,
        in_specs=[call.keys, call.keys, call.values, call.logs, call.ids, call.state],
        out_specs=[call.values, call.state],
        out_shape=[call.value_heads.shape(*call.padded), call.state_shape],
        compiler_params=_PARAMS,
    )(*call.pack(q, k, v), logs, ids, call.pad_state(state))
    return call.value_heads.unpack(o, q.shape[1]), _cut(last, state)


def backward(scale, before, inputs, cotangents):
    """Returns the gradients of q, k, v, g and state."""
    q, k, v, g, state, segment_ids = inputs
    do, dlast = cotangents
    call = _Call(q, k, v, before)
    logs, ids = call.gates(g, segment_ids)
    q_packed, k_packed, v_packed = call.pack(q, k, v)
    tiles, num_steps = call.tiles, call.tiles.grid[2]
    states = pl.pallas_call(
        functools.partial(_states_kernel, before),
        name="linear_attention_states",
        grid=tiles.grid,
        in_specs=[call.keys, call.values, call.logs, call.ids, call.state],
        out_specs=call.states,
        out_shape=jax.ShapeDtypeStruct((num_steps, *call.state_shape.shape), jnp.float32),
        scratch_shapes=[pltpu.VMEM((tiles.heads, *call.state_shape.shape[2:]), jnp.float32)],
        compiler_params=_PARAMS,
    )(k_packed, v_packed, logs, ids, call.pad_state(state))

    call = _Call(q, k, v, before, reverse=True)
    dq, dk, dv, sums, dstate = pl.pallas_call(
        functools.partial(_backward_kernel, scale, before),
        name="linear_attention_backward",
        grid=tiles.grid,
        in_specs=[call.keys, call.keys, call.values, call.values, call.logs, call.ids, call.states, call.state],
        out_specs=[call.key_gradients, call.key_gradients, call.values, call.sums, call.state],
        out_shape=[
            call.key_gradient_heads.shape(*call.padded),
            call.key_gradient_heads.shape(*call.padded),
            call.value_heads.shape(*call.padded),
            jax.ShapeDtypeStruct((tiles.B, tiles.grid[1], 3, TILE, tiles.padded_T), jnp.float32),
            call.state_shape,
        ],
        compiler_params=_PARAMS,
    )(q_packed, k_packed, v_packed, call.value_heads.pack(do, tiles.padded_T), logs, ids, states, call.pad_state(dlast))
    T = q.shape[1]
    return (
        call.key_gradient(dq, q),
        call.key_gradient(dk, k),
        call.value_heads.unpack(dv, T),
        tpu_layout.gate_gradient(sums, segment_ids, tiles, before).astype(g.dtype),
        _cut(dstate, state),
    )


def _cut(state, like):
    return state[:, :, : like.shape[2], : like.shape[3]]


class _Call:
    """The blocks of the kernels' arguments. Grid: rows, blocks of heads, steps along the row, perhaps in reverse."""

    def __init__(self, q, k, v, before, reverse=False):
        (B, T, N, P), (K, H) = v.shape, k.shape[2:]
        self.tiles = tiles = Tiles(B, T, K, N, H, P)
        self.before, self.dtype = before, q.dtype
        self.padded = B, tiles.padded_T
        num_steps = tiles.grid[2]
        step = (lambda c: num_steps - 1 - c) if reverse else (lambda c: c)
        at = lambda b, n, c: (b, n, step(c))
        self.key_heads = Heads(tiles.key_heads, K, H, q.dtype)
        self.value_heads = Heads(tiles.heads, N, P, v.dtype)
        parts = tiles.num_parts
        self.key_gradient_heads = Heads(tiles.key_heads, K * parts, H, q.dtype if parts == 1 else jnp.dtype("float32"))
        self.keys = self.key_heads.spec(tiles.tokens, lambda b, n, c: (b, jax.lax.div(n, parts), step(c)))
        self.key_gradients = self.key_gradient_heads.spec(tiles.tokens, at)
        self.values = self.value_heads.spec(tiles.tokens, at)
        num_logs = (1 if q.dtype == jnp.bfloat16 else 2) * (1 + before)
        along = lambda X: pl.BlockSpec((None, None, X, TILE, tiles.tokens), lambda b, n, c: (b, n, 0, 0, step(c)))
        self.logs, self.sums = along(num_logs), along(3)
        self.ids = pl.BlockSpec((None, TILE, tiles.tokens), lambda b, n, c: (b, 0, step(c)))
        self.state_shape = jax.ShapeDtypeStruct(tiles.state_shape(), jnp.float32)
        block = (tiles.heads, *tiles.state_shape()[2:])
        self.state = pl.BlockSpec((None, *block), lambda b, n, c: (b, n, 0, 0))
        self.states = pl.BlockSpec((None, None, *block), lambda b, n, c: (step(c), b, n, 0, 0))

    def pack(self, q, k, v):
        T = self.tiles.padded_T
        return self.key_heads.pack(q, T), self.key_heads.pack(k, T), self.value_heads.pack(v, T)

    def pad_state(self, state):
        return jnp.pad(state, [(0, to - size) for to, size in zip(self.state_shape.shape, state.shape, strict=True)])

    def gates(self, g, segment_ids):
        num_parts = 1 if self.dtype == jnp.bfloat16 else 2
        return tpu_layout.gates(g, segment_ids, self.tiles, num_parts, self.before)

    def key_gradient(self, packed, like):
        d_BTKH = self.key_gradient_heads.unpack(packed, like.shape[1])
        if self.tiles.num_parts > 1:
            d_BTKH = jnp.sum(d_BTKH.reshape(*like.shape[:3], self.tiles.num_parts, like.shape[3]), axis=3)
        return d_BTKH.astype(like.dtype)


class _Gates:
    """The decays of one chunk of several heads. Rows are [1, L], columns [L, 1]."""

    def __init__(self, logs, ids, rows, before):
        num_parts = logs.shape[0] // (1 + before)
        self.cols = [logs[x, :, rows] for x in range(num_parts)]
        self.rows = [logs[num_parts + x, :, rows] for x in range(num_parts)] if before else self.cols
        self._before = before
        self._ids, self._ids_T = ids[:, rows], ids[:, rows].T
        self.end = [col[:, -1:] for col in self.cols]
        reads = jnp.where(self._ids[0:1] == self._ids[1:2], _exp(self.rows), 0)
        writes = jnp.where(self._ids[0:1] == self._ids[2:3], _exp(_minus(self.end, self.cols)), 0)
        keep = jnp.where(self._ids[1:2, :1] == self._ids[2:3, :1], _exp(self.end), 0)
        row = lambda x_NL, n: x_NL[n : n + 1]
        self.reads, self.writes, self.keep = (functools.partial(row, x) for x in (reads, writes, keep))

    def seen(self, readers_first):
        """Returns 0 for the pairs that see each other and -inf for others."""
        shape = CHUNK, CHUNK
        first, second = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        since = first - second if readers_first else second - first
        same = (self._ids_T[:, 0:1] == self._ids[0:1]) & (self._ids[0:1] > 0)
        return jnp.where(same & (since >= self._before), 0.0, -jnp.inf), since > self._before

    def border(self, which):
        own, other = self._ids_T[:, 0:1], self._ids_T[:, which : which + 1]
        return jnp.where(own == other, 0.0, -jnp.inf)


def _minus(later, earlier):
    return [x - y for x, y in zip(later, earlier, strict=True)]


def _widen(parts_L1, width):
    """Spreads logs over lanes before exp rather than after: the unit that takes exp is idle, that for lanes is not."""
    return [jnp.broadcast_to(x_L1, (CHUNK, width)) for x_L1 in parts_L1]


def _exp(parts, limit=0.0):
    """exp of a log in parts; it is at most `limit`, which is 0 or, for what is not to be seen, -inf."""
    return jnp.exp(jnp.minimum(functools.reduce(jnp.add, parts), limit))


def _dot(a, b, transposed=False):
    """a @ b, or a @ b^T."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _chunks(num_tokens):
    return [slice(start, start + CHUNK) for start in range(0, num_tokens, CHUNK)]


def _advance(S_HP, k_HL, v_LP, gates, n):
    """Returns the state after a chunk."""
    written = (k_HL * gates.writes(n)).astype(v_LP.dtype)
    return gates.keep(n) * S_HP + _dot(written, v_LP)


def _forward_kernel(scale, before, q_ref, k_ref, v_ref, logs_ref, ids_ref, start_NHP, o_ref, S_NHP):
    @pl.when(pl.program_id(2) == 0)
    def _():
        S_NHP[...] = start_NHP[...]

    N, _, P = S_NHP.shape
    for rows in _chunks(ids_ref.shape[-1]):
        gates = _Gates(logs_ref, ids_ref, rows, before)
        limit_LL, _ = gates.seen(readers_first=True)
        limit_LP = jnp.broadcast_to(gates.border(1), (CHUNK, P))
        columns = [x.T for x in gates.rows]
        q_KLH, k_KLH, v_NLP = (load(ref, rows) for ref in (q_ref, k_ref, v_ref))
        G = N // len(q_KLH)
        k_KHL = [k_LH.astype(jnp.float32).T for k_LH in k_KLH]
        # First the products that need no decay: they keep the matrix units busy while the decays are made.
        scores_KLL = [_dot(q, k.astype(q.dtype)) for q, k in zip(q_KLH, k_KHL, strict=True)]
        reads_NLP = [_dot(q_KLH[n // G], S_NHP[n].astype(q_KLH[0].dtype)) for n in range(N)]
        o_NLP = []
        for n in range(N):
            v_LP, column = v_NLP[n], [x[:, n : n + 1] for x in columns]
            pairs_LL = _exp(_minus(_widen(column, CHUNK), [x[n : n + 1] for x in gates.cols]), limit_LL)
            scores_LL = (scores_KLL[n // G] * pairs_LL).astype(v_LP.dtype)
            o_NLP.append(scale * (_dot(scores_LL, v_LP) + _exp(_widen(column, P), limit_LP) * reads_NLP[n]))
            S_NHP[n] = _advance(S_NHP[n], k_KHL[n // G], v_LP, gates, n)
        store(o_ref, rows, o_NLP)


def _states_kernel(before, k_ref, v_ref, logs_ref, ids_ref, start_NHP, states_NHP, S_NHP):
    @pl.when(pl.program_id(2) == 0)
    def _():
        S_NHP[...] = start_NHP[...]

    states_NHP[...] = S_NHP[...]
    N = S_NHP.shape[0]
    for rows in _chunks(ids_ref.shape[-1]):
        gates = _Gates(logs_ref, ids_ref, rows, before)
        k_KLH, v_NLP = load(k_ref, rows), load(v_ref, rows)
        k_KHL = [k_LH.astype(jnp.float32).T for k_LH in k_KLH]
        for n in range(N):
            S_NHP[n] = _advance(S_NHP[n], k_KHL[n // (N // len(k_KHL))], v_NLP[n], gates, n)


def _backward_kernel(
    scale,
    before,
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    logs_ref,
    ids_ref,
    states_NHP,
    dlast_NHP,
    dq_ref,
    dk_ref,
    dv_ref,
    sums_ref,
    dS_NHP,
):
    @pl.when(pl.program_id(2) == 0)
    def _():
        dS_NHP[...] = dlast_NHP[...]

    N, H, P = dS_NHP.shape
    chunks = _chunks(ids_ref.shape[-1])
    # The states before each chunk of the step.
    S_CNHP = [[states_NHP[n] for n in range(N)]]
    for rows in chunks[:-1]:
        gates = _Gates(logs_ref, ids_ref, rows, before)
        k_KHL = [k_LH.astype(jnp.float32).T for k_LH in load(k_ref, rows)]
        v_NLP = load(v_ref, rows)
        S_CNHP.append([_advance(S_CNHP[-1][n], k_KHL[n * len(k_KHL) // N], v_NLP[n], gates, n) for n in range(N)])

    lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    for rows, S_chunk in reversed(list(zip(chunks, S_CNHP, strict=True))):
        gates = _Gates(logs_ref, ids_ref, rows, before)
        limit_LL, decayed_LL = gates.seen(readers_first=False)
        limit_L1 = gates.border(2)
        columns = [x.T for x in gates.cols]
        q_KLH, k_KLH, v_NLP, do_NLP = (load(ref, rows) for ref in (q_ref, k_ref, v_ref, do_ref))
        K, dtype = len(q_KLH), q_KLH[0].dtype
        q_KHL, k_KHL = ([x.astype(jnp.float32).T for x in x_KLH] for x_KLH in (q_KLH, k_KLH))
        scores_KLL = [_dot(k, q.astype(dtype)) for k, q in zip(k_KLH, q_KHL, strict=True)]
        dscores_NLL = [_dot(v, do, transposed=True) for v, do in zip(v_NLP, do_NLP, strict=True)]
        dq_KHL, dk_KLH, dv_NLP = [0.0] * K, [0.0] * K, []
        columns_LL = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        for n in range(N):
            j = n * K // N
            q_LH, k_LH, v_LP, do_LP, S_HP = q_KLH[j], k_KLH[j], v_NLP[n], do_NLP[n], S_chunk[n]
            dS_HP = dS_NHP[n]
            column = [x[:, n : n + 1] for x in columns]
            # 1. Within the chunk.
            pairs_LL = scale * _exp(_minus([x[n : n + 1] for x in gates.rows], _widen(column, CHUNK)), limit_LL)
            dproduct_LL = dscores_NLL[n] * pairs_LL
            dlog_LL = jnp.where(decayed_LL, dproduct_LL * scores_KLL[j], 0)
            dproduct_LL = dproduct_LL.astype(dtype)
            # 2. Through the states at the chunk's borders.
            writes_LP, writes_LH = (
                _exp(_minus([x[n : n + 1] for x in gates.end], _widen(column, width)), limit_L1) for width in (P, H)
            )
            reads_1L = scale * gates.reads(n)
            dread_HL = reads_1L * _dot(S_HP.astype(dtype), do_LP, transposed=True)
            put_LP = writes_LP * _dot(k_LH, dS_HP.astype(dtype))
            dq_KHL[j] += _dot(k_KHL[j].astype(dtype), dproduct_LL) + dread_HL
            dk_KLH[j] += _dot(dproduct_LL, q_LH) + writes_LH * _dot(v_LP, dS_HP.astype(dtype), transposed=True)
            dv_NLP.append(_dot((scores_KLL[j] * pairs_LL).astype(dtype), do_LP) + put_LP)
            dS_NHP[n] = gates.keep(n) * dS_HP + _dot((q_KHL[j] * reads_1L).astype(dtype), do_LP)
            # 3. The decays.
            rows_1L = jnp.sum(dlog_LL, axis=0, keepdims=True) + jnp.sum(q_KHL[j] * dread_HL, axis=0, keepdims=True)
            whole_11 = gates.keep(n) * jnp.sum(S_HP * dS_HP, keepdims=True)
            columns_LL = jnp.where(lane == n, jnp.sum(dlog_LL, axis=1, keepdims=True), columns_LL)
            columns_LL = jnp.where(lane == TILE + n, jnp.sum(v_LP * put_LP, axis=1, keepdims=True), columns_LL)
            sums_ref[0, n : n + 1, rows] = rows_1L
            sums_ref[1, n : n + 1, rows] = jnp.where(lane[:1] == CHUNK - 1, whole_11, 0)
        rows_LL = columns_LL.T
        sums_ref[1, :N, rows] = rows_LL[:N] - sums_ref[1, :N, rows]
        sums_ref[2, :, rows] = rows_LL[TILE : 2 * TILE]
        store(dq_ref, rows, [dq_HL.T for dq_HL in dq_KHL])
        store(dk_ref, rows, dk_KLH)
        store(dv_ref, rows, dv_NLP)
