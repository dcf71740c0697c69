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
from pallas_kernels.linear_attention.tpu_layout import CHUNK, TILE, Block, Heads, Tiles

_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * 1024 * 1024
)
# The document of the last real token so far.
_DOCUMENT = pltpu.VMEM((1, 1), jnp.float32)


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
        scratch_shapes=[_DOCUMENT],
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
    states, documents = pl.pallas_call(
        functools.partial(_states_kernel, before),
        name="linear_attention_states",
        grid=tiles.grid,
        in_specs=[call.keys, call.values, call.logs, call.ids, call.state],
        out_specs=[call.states, call.documents],
        out_shape=[
            jax.ShapeDtypeStruct((num_steps, *call.state_shape.shape), jnp.float32),
            jax.ShapeDtypeStruct((*tiles.grid, 1, 1), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((tiles.heads, *call.state_shape.shape[2:]), jnp.float32),
            _DOCUMENT,
        ],
        compiler_params=_PARAMS,
    )(k_packed, v_packed, logs, ids, call.pad_state(state))

    call = _Call(q, k, v, before, reverse=True)
    dq, dk, dv, sums, dstate = pl.pallas_call(
        functools.partial(_backward_kernel, scale, before),
        name="linear_attention_backward",
        grid=tiles.grid,
        in_specs=[
            call.keys,
            call.keys,
            call.values,
            call.values,
            call.logs,
            call.ids,
            call.states,
            call.documents,
            call.state,
        ],
        out_specs=[call.key_gradients, call.key_gradients, call.values, call.sums, call.state],
        out_shape=[
            call.key_gradient_heads.shape(*call.padded),
            call.key_gradient_heads.shape(*call.padded),
            call.value_heads.shape(*call.padded),
            jax.ShapeDtypeStruct((tiles.B, tiles.grid[1], 3, TILE, tiles.padded_T), jnp.float32),
            call.state_shape,
        ],
        scratch_shapes=[
            pltpu.VMEM((max(1, tiles.tokens // CHUNK - 1), tiles.heads, *call.state_shape.shape[2:]), jnp.float32),
        ],
        compiler_params=_PARAMS,
    )(
        q_packed,
        k_packed,
        v_packed,
        call.value_heads.pack(do, tiles.padded_T),
        logs,
        ids,
        states,
        documents,
        call.pad_state(dlast),
    )
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
        self.ids = pl.BlockSpec((None, 1, tiles.tokens), lambda b, n, c: (b, 0, step(c)))
        self.documents = pl.BlockSpec((None, None, None, 1, 1), lambda b, n, c: (b, n, step(c), 0, 0))
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
        """Returns the cumulative logs, and the documents `[B 1 T]` in float32, which kernels can take a maximum of."""
        tiles, num_parts = self.tiles, 1 if self.dtype == jnp.bfloat16 else 2
        ids_BT = jnp.pad(segment_ids, ((0, 0), (0, tiles.padded_T - tiles.T))).astype(jnp.float32)
        return tpu_layout.cumulative_logs(g, segment_ids, tiles, num_parts, self.before), ids_BT[:, None]

    def key_gradient(self, packed, like):
        d_BTKH = self.key_gradient_heads.unpack(packed, like.shape[1])
        if self.tiles.num_parts > 1:
            d_BTKH = jnp.sum(d_BTKH.reshape(*like.shape[:3], self.tiles.num_parts, like.shape[3]), axis=3)
        return d_BTKH.astype(like.dtype)


class _Gates:
    """The decays of one chunk of several heads, and which tokens are of one document.

    Logs are [8, L], a row per head; document_11 is that of the last real token before the chunk, 0 if there is none.
    """

    def __init__(self, logs, ids, rows, document_11, before):
        num_parts = logs.shape[0] // (1 + before)
        self.cols = [logs[x, :, rows] for x in range(num_parts)]
        self.rows = [logs[num_parts + x, :, rows] for x in range(num_parts)] if before else self.cols
        self.end = [col[:, -1:] for col in self.cols]
        self._before = before
        self._ids_1L = ids[:, rows]
        self._ids_L1 = jnp.broadcast_to(self._ids_1L, (TILE, CHUNK)).T[:, :1]
        # The state before the chunk belongs to the row's first document if none has begun.
        first_11 = jnp.min(jnp.where(self._ids_1L > 0, self._ids_1L, jnp.inf), axis=1, keepdims=True)
        self._state_11 = jnp.where(document_11 > 0, document_11, first_11)
        self.document_11 = jnp.maximum(document_11, jnp.max(self._ids_1L, axis=1, keepdims=True))
        self._next_state_11 = jnp.where(self.document_11 > 0, self.document_11, self._state_11)
        self._reads = jnp.where(self._ids_1L == self._state_11, _exp(self.rows), 0)
        self._writes = jnp.where(self._ids_1L == self._next_state_11, _exp(_minus(self.end, self.cols)), 0)
        self._keep = jnp.where(self._state_11 == self._next_state_11, _exp(self.end), 0)

    def reads_1L(self, n):
        return self._reads[n : n + 1]

    def writes_1L(self, n):
        return self._writes[n : n + 1]

    def keep_11(self, n):
        return self._keep[n : n + 1]

    def limits_LL(self, readers_first):
        """Returns 0 for the pairs that see each other and -inf for others; and which are apart by a decay."""
        first, second = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
        since = first - second if readers_first else second - first
        same = (self._ids_L1 == self._ids_1L) & (self._ids_1L > 0)
        return jnp.where(same & (since >= self._before), 0.0, -jnp.inf), since > self._before

    def limits_L1(self, state):
        """Returns 0 for the tokens that belong with the state before the chunk, or after it, and -inf for others."""
        document_11 = {"before": self._state_11, "after": self._next_state_11}[state]
        return jnp.where(self._ids_L1 == document_11, 0.0, -jnp.inf)


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
    written = (k_HL.astype(jnp.float32) * gates.writes_1L(n)).astype(v_LP.dtype)
    return gates.keep_11(n) * S_HP + _dot(written, v_LP)


def _forward_kernel(scale, before, q_ref, k_ref, v_ref, logs_ref, ids_ref, start_NHP, o_ref, S_NHP, document_11):
    @pl.when(pl.program_id(2) == 0)
    def _():
        S_NHP[...] = start_NHP[...]
        document_11[...] = jnp.zeros_like(document_11)

    q, k, v, o = (Block(ref) for ref in (q_ref, k_ref, v_ref, o_ref))
    N, _, P = S_NHP.shape
    G, dtype = N // q.num_heads, q_ref.dtype
    for rows in _chunks(ids_ref.shape[-1]):
        gates = _Gates(logs_ref, ids_ref, rows, document_11[...], before)
        document_11[...] = gates.document_11
        limit_LL, _ = gates.limits_LL(readers_first=True)
        limit_LP = jnp.broadcast_to(gates.limits_L1("before"), (CHUNK, P))
        columns = [x.T for x in gates.rows]
        # First the products that need no decay: they keep the matrix units busy while the decays are made.
        k_KHL, scores_KLL, reads_NLP = [], [], []
        for n in range(N):
            if n % G == 0:
                q_LH = q.get(rows, n // G)
                k_KHL.append(k.get(rows, n // G).T)
                scores_KLL.append(_dot(q_LH, k_KHL[-1]))
            reads_NLP.append(_dot(q_LH, S_NHP[n].astype(dtype)))
        for n in range(N):
            v_LP, column = v.get(rows, n), [x[:, n : n + 1] for x in columns]
            pairs_LL = _exp(_minus(_widen(column, CHUNK), [x[n : n + 1] for x in gates.cols]), limit_LL)
            scores_LL = (scores_KLL[n // G] * pairs_LL).astype(dtype)
            o.put(rows, n, scale * (_dot(scores_LL, v_LP) + _exp(_widen(column, P), limit_LP) * reads_NLP[n]))
            S_NHP[n] = _advance(S_NHP[n], k_KHL[n // G], v_LP, gates, n)


def _states_kernel(before, k_ref, v_ref, logs_ref, ids_ref, start_NHP, states_NHP, documents_11, S_NHP, document_11):
    @pl.when(pl.program_id(2) == 0)
    def _():
        S_NHP[...] = start_NHP[...]
        document_11[...] = jnp.zeros_like(document_11)

    states_NHP[...] = S_NHP[...]
    documents_11[...] = document_11[...]
    k, v = Block(k_ref), Block(v_ref)
    N = S_NHP.shape[0]
    G = N // k.num_heads
    for rows in _chunks(ids_ref.shape[-1]):
        gates = _Gates(logs_ref, ids_ref, rows, document_11[...], before)
        document_11[...] = gates.document_11
        for n in range(N):
            if n % G == 0:
                k_HL = k.get(rows, n // G).T
            S_NHP[n] = _advance(S_NHP[n], k_HL, v.get(rows, n), gates, n)


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
    documents_11,
    dlast_NHP,
    dq_ref,
    dk_ref,
    dv_ref,
    sums_ref,
    dS_NHP,
    between_CNHP,
):
    @pl.when(pl.program_id(2) == 0)
    def _():
        dS_NHP[...] = dlast_NHP[...]

    q, k, v, do = (Block(ref) for ref in (q_ref, k_ref, v_ref, do_ref))
    dq, dk, dv = (Block(ref) for ref in (dq_ref, dk_ref, dv_ref))
    N, H, P = dS_NHP.shape
    G, dtype = N // q.num_heads, q_ref.dtype
    chunks = _chunks(ids_ref.shape[-1])
    # The states before each chunk of the step.
    documents = [documents_11[...]]
    befores = [states_NHP, *(between_CNHP.at[c] for c in range(len(chunks) - 1))]
    for rows, old_NHP, new_NHP in zip(chunks[:-1], befores, befores[1:], strict=False):
        gates = _Gates(logs_ref, ids_ref, rows, documents[-1], before)
        documents.append(gates.document_11)
        for n in range(N):
            if n % G == 0:
                k_HL = k.get(rows, n // G).T
            new_NHP[n] = _advance(old_NHP[n], k_HL, v.get(rows, n), gates, n)

    lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    for rows, S_NHP, document_11 in reversed(list(zip(chunks, befores, documents, strict=True))):
        gates = _Gates(logs_ref, ids_ref, rows, document_11, before)
        limit_LL, decayed_LL = gates.limits_LL(readers_first=False)
        limit_L1 = gates.limits_L1("after")
        columns = [x.T for x in gates.cols]
        columns_LL = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        keys = {}
        for some in _pairs(N):
            dscores_NLL = {}
            for n in some:
                j = n // G
                if n % G == 0:
                    q_LH, k_LH = q.get(rows, j), k.get(rows, j)
                    q_HL, k_HL = (x_LH.astype(jnp.float32).T for x_LH in (q_LH, k_LH))
                    keys[j] = q_LH, k_LH, q_HL, k_HL, _dot(k_LH, q_HL.astype(dtype))
                dscores_NLL[n] = _dot(v.get(rows, n), do.get(rows, n), transposed=True)
            for n in some:
                j = n // G
                q_LH, k_LH, q_HL, k_HL, scores_LL = keys[j]
                v_LP, do_LP = v.get(rows, n), do.get(rows, n)
                S_HP, dS_HP = S_NHP[n], dS_NHP[n]
                column = [x[:, n : n + 1] for x in columns]
                # 1. Within the chunk.
                pairs_LL = scale * _exp(_minus([x[n : n + 1] for x in gates.rows], _widen(column, CHUNK)), limit_LL)
                dproduct_LL = dscores_NLL[n] * pairs_LL
                dlog_LL = jnp.where(decayed_LL, dproduct_LL * scores_LL, 0)
                dproduct_LL = dproduct_LL.astype(dtype)
                # 2. Through the states at the chunk's borders.
                writes_LP, writes_LH = (
                    _exp(_minus([x[n : n + 1] for x in gates.end], _widen(column, width)), limit_L1) for width in (P, H)
                )
                reads_1L = scale * gates.reads_1L(n)
                dread_HL = reads_1L * _dot(S_HP.astype(dtype), do_LP, transposed=True)
                put_LP = writes_LP * _dot(k_LH, dS_HP.astype(dtype))
                dq_HL = _dot(k_HL.astype(dtype), dproduct_LL) + dread_HL
                dk_LH = _dot(dproduct_LL, q_LH) + writes_LH * _dot(v_LP, dS_HP.astype(dtype), transposed=True)
                dv.put(rows, n, _dot((scores_LL * pairs_LL).astype(dtype), do_LP) + put_LP)
                dS_NHP[n] = gates.keep_11(n) * dS_HP + _dot((q_HL * reads_1L).astype(dtype), do_LP)
                dq_sum, dk_sum = (dq_HL, dk_LH) if n % G == 0 else (dq_sum + dq_HL, dk_sum + dk_LH)
                if n % G == G - 1:
                    dq.put(rows, j, dq_sum.T)
                    dk.put(rows, j, dk_sum)
                # 3. The decays.
                rows_1L = jnp.sum(dlog_LL, axis=0, keepdims=True) + jnp.sum(q_HL * dread_HL, axis=0, keepdims=True)
                whole_11 = gates.keep_11(n) * jnp.sum(S_HP * dS_HP, keepdims=True)
                cols_L1, puts_L1 = (jnp.sum(x, axis=1, keepdims=True) for x in (dlog_LL, v_LP * put_LP))
                columns_LL = jnp.where(lane == n, cols_L1, jnp.where(lane == TILE + n, puts_L1, columns_LL))
                sums_ref[0, n : n + 1, rows] = rows_1L
                sums_ref[1, n : n + 1, rows] = jnp.where(lane[:1] == CHUNK - 1, whole_11, 0)
        rows_LL = columns_LL.T
        sums_ref[1, :N, rows] = rows_LL[:N] - sums_ref[1, :N, rows]
        sums_ref[2, :, rows] = rows_LL[TILE : 2 * TILE]


def _pairs(N):
    return [range(n, min(N, n + 2)) for n in range(0, N, 2)]
