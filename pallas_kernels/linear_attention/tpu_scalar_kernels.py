"""The TPU kernels with one decay per head and token; `tpu_scalar.py` says how they divide the work.

What lies along lanes and what along sublanes decides what a kernel costs. Logs come as tiles [heads, L], a row per
head. Forward, pairs are [reader, written]: a reader's log is needed as a column, which takes one transposition for all
heads and a broadcast over lanes for each. Backward, pairs are [written, reader] and dq is computed transposed: but for
one transposition of q, k and dq per key head, all products are of the kinds that the matrix unit takes, and sums over
what a token reads run over sublanes.

N counts the value heads of a block, G those that share a key head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.tpu_layout import CHUNK, TILE, Block


class Gates:
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


def _exp(parts: list[jax.Array], limit: jax.Array | float = 0.0) -> jax.Array:
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


def _advance_all(new_NHP, old_NHP, k, v, rows, gates):
    G = v.num_heads // k.num_heads
    for j in range(k.num_heads):
        k_HL = k.get(rows, j).T
        for n in range(j * G, j * G + G):
            new_NHP[n] = _advance(old_NHP[n], k_HL, v.get(rows, n), gates, n)


def forward(scale, before, q_ref, k_ref, v_ref, logs_ref, ids_ref, start_NHP, o_ref, S_NHP, document_11):
    @pl.when(pl.program_id(2) == 0)
    def _first_step():
        S_NHP[...] = start_NHP[...]
        document_11[...] = jnp.zeros_like(document_11)

    q, k, v, o = (Block(ref) for ref in (q_ref, k_ref, v_ref, o_ref))
    N, _, P = S_NHP.shape
    G, dtype = N // q.num_heads, q_ref.dtype
    for rows in _chunks(ids_ref.shape[-1]):
        gates = Gates(logs_ref, ids_ref, rows, document_11[...], before)
        document_11[...] = gates.document_11
        limit_LL, _ = gates.limits_LL(readers_first=True)
        limit_LP = jnp.broadcast_to(gates.limits_L1("before"), (CHUNK, P))
        columns = [x.T for x in gates.rows]
        # First the products that need no decay: they keep the matrix units busy while the decays are made.
        k_KHL, scores_KLL, reads_NLP = [], [], []
        for j in range(N // G):
            q_LH, k_HL = q.get(rows, j), k.get(rows, j).T
            k_KHL.append(k_HL)
            scores_KLL.append(_dot(q_LH, k_HL))
            reads_NLP += [_dot(q_LH, S_NHP[n].astype(dtype)) for n in range(j * G, j * G + G)]
        for n in range(N):
            v_LP, column = v.get(rows, n), [x[:, n : n + 1] for x in columns]
            pairs_LL = _exp(_minus(_widen(column, CHUNK), [x[n : n + 1] for x in gates.cols]), limit_LL)
            scores_LL = (scores_KLL[n // G] * pairs_LL).astype(dtype)
            o.put(rows, n, scale * (_dot(scores_LL, v_LP) + _exp(_widen(column, P), limit_LP) * reads_NLP[n]))
            S_NHP[n] = _advance(S_NHP[n], k_KHL[n // G], v_LP, gates, n)


def states(before, k_ref, v_ref, logs_ref, ids_ref, start_NHP, states_NHP, documents_11, S_NHP, document_11):
    @pl.when(pl.program_id(2) == 0)
    def _first_step():
        S_NHP[...] = start_NHP[...]
        document_11[...] = jnp.zeros_like(document_11)

    states_NHP[...] = S_NHP[...]
    documents_11[...] = document_11[...]
    k, v = Block(k_ref), Block(v_ref)
    for rows in _chunks(ids_ref.shape[-1]):
        gates = Gates(logs_ref, ids_ref, rows, document_11[...], before)
        document_11[...] = gates.document_11
        _advance_all(S_NHP, S_NHP, k, v, rows, gates)


def backward(
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
    def _first_step():
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
        gates = Gates(logs_ref, ids_ref, rows, documents[-1], before)
        documents.append(gates.document_11)
        _advance_all(new_NHP, old_NHP, k, v, rows, gates)

    lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    for rows, S_NHP, document_11 in reversed(list(zip(chunks, befores, documents, strict=True))):
        gates = Gates(logs_ref, ids_ref, rows, document_11, before)
        limit_LL, decayed_LL = gates.limits_LL(readers_first=False)
        limit_L1 = gates.limits_L1("after")
        columns = [x.T for x in gates.cols]
        columns_LL = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        keys, dkeys = {}, {}
        for some in (range(n, min(n + 2, N)) for n in range(0, N, 2)):  # Two heads at a time, as they lie in words.
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
                dkeys[j] = [x + y for x, y in zip(dkeys[j], (dq_HL, dk_LH), strict=True)] if n % G else (dq_HL, dk_LH)
                if n % G == G - 1:
                    dq.put(rows, j, dkeys[j][0].T)
                    dk.put(rows, j, dkeys[j][1])
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
