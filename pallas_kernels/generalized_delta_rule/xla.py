"""The generalized delta rule in chunks of matmuls; the algebra of https://arxiv.org/abs/2406.06484, with two keys.

Token i reads u_i = S^T a_i of the state that the tokens before it left, and writes b_i u_i^T and k_i v_i^T. With the
decays of `common/decays.py` (AB and AK scores of a, which reads before its own decay, QB and QK those of q, S the state
before the chunk) these are L linear equations, whose matrix is unit lower triangular:

    (I - AB) U = AK V + reads_a (A S) =: X
    O  = QB U + QK V + reads_q (Q S)
    S' = keep S + B^T (writes U) + K^T (writes V)

With M = (I - AB)^-1, U = M X. Backward, dS and dS' being the gradients of S and S':

    dU = QB^T dO + writes (B dS')
    dX = M^T dU                    from U = M X; and dAB = dX U^T, as dM = M dAB M
    dS = keep dS' + Q^T (reads_q dO) + A^T (reads_a dX)
    dV = QK^T dO + AK^T dX + writes (K dS')
    dAK = dX V^T, dQB = dO U^T, dQK = dO V^T

In float32 AB U and AK V, which are large and cancel where keys are alike, are made by `accurate` products.

Residuals are the inputs, the state before each chunk of `CHUNK` tokens and the inverses M.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import blocks, chunks
from pallas_kernels.common.accurate import accurate
from pallas_kernels.common.decays import ChannelDecay, HeadDecay
from pallas_kernels.common.documents import clear_padding, fill_padding

CHUNK = 64


class _Chunks:
    """The arguments in chunks, the decays that q and a see, and what follows from them alone."""

    def __init__(self, scale, q, k, v, a, b, g, segment_ids):
        q, k, v, a, b, g = (clear_padding(x, segment_ids) for x in (q, k, v, a, b, g))
        K, L = k.shape[2], chunks.length(v.shape[1], CHUNK)
        dtype = jnp.promote_types(v.dtype, jnp.float32)
        q_CBKLH, self.k_CBKLH, self.a_CBKLH, self.b_CBKLH = (
            chunks.split(x, K, L, dtype)[:, :, :, 0] for x in (q, k, a, b)
        )
        self.q_CBKLH = q_CBKLH * scale
        self.v_CBKGLP = chunks.split(v, K, L, dtype)
        g_CBKGLX = chunks.split(g[..., None] if g.ndim == 3 else g, K, L, dtype)
        segments, kind = chunks.Segments(fill_padding(segment_ids), L), HeadDecay if g.ndim == 3 else ChannelDecay
        self.for_q, self.for_a = kind(g_CBKGLX, segments), kind(g_CBKGLX, segments, before=True)
        self.read_a_CBKGLH = self.for_a.reads_CBKGLX * self.a_CBKLH[:, :, :, None]
        self.put_b_CBKGLH = self.for_q.writes_CBKGLX * self.b_CBKLH[:, :, :, None]
        self.put_k_CBKGLH = self.for_q.writes_CBKGLX * self.k_CBKLH[:, :, :, None]
        self.is_exact = any(x.dtype == jnp.float32 for x in (q, k, v, a, b))

    def scores(self):
        """Returns QB, QK, AB and AK. The errors of the last two are those of U, ten times over where keys are alike."""
        q_CBK1LH, a_CBK1LH = self.q_CBKLH[:, :, :, None], self.a_CBKLH[:, :, :, None]
        return [
            decay.scores(x_CBK1LH, k_CBKLH, exactly=self.is_exact)
            for decay, x_CBK1LH in ((self.for_q, q_CBK1LH), (self.for_a, a_CBK1LH))
            for k_CBKLH in (self.b_CBKLH, self.k_CBKLH)
        ]

    def solve(self, ab_XLL, ak_XLL, inverse_XLL, v_XLP, own_XLP, held_XLP):
        """Returns U, given own = AK V and what the state holds for a.

        Where keys are alike AB U and AK V are large and cancel, all but a hundredth: the errors that both bring into U
        are corrected with a sum of both that has none.
        """
        u_XLP = jnp.matmul(inverse_XLL, own_XLP + held_XLP)
        if self.is_exact:
            scores_XLS, written_XSP = jnp.concatenate([ab_XLL, ak_XLL], -1), jnp.concatenate([u_XLP, v_XLP], -2)
            sizes_XSP = jnp.abs(written_XSP)
            read_XLP = held_XLP + accurate(jnp.matmul, scores_XLS, written_XSP, axes=(-1, -2), y_sizes=sizes_XSP)
            u_XLP += jnp.matmul(inverse_XLL, read_XLP - u_XLP)
        return u_XLP

    def solve_backward(self, ab_XLL, inverse_XLL, du_XLP):
        """Returns dX."""
        dx_XLP = jnp.matmul(inverse_XLL.mT, du_XLP)
        if self.is_exact:
            read_XLP = accurate(jnp.matmul, ab_XLL.mT, dx_XLP, axes=(-1, -2), y_sizes=jnp.abs(dx_XLP))
            dx_XLP += jnp.matmul(inverse_XLL.mT, du_XLP - dx_XLP + read_XLP)
        return dx_XLP


def forward(keep, scale, q, k, v, a, b, g, state, segment_ids):
    """Returns (o, state) and, if `keep`, residuals. g is BTN or BTNH; at padding, id 0, arguments may be anything."""
    x = _Chunks(scale, q, k, v, a, b, g, segment_ids)
    # 1. What each token reads, save for what depends on the state before its chunk.
    qb_CBKGLS, qk_CBKGLS, ab_CBKGLS, ak_CBKGLS = (s_CBKRGLS[:, :, :, 0] for s_CBKRGLS in x.scores())
    inverse_CBKGLL = blocks.inverse(-ab_CBKGLS)
    own_CBKGLP = jnp.matmul(ak_CBKGLS, x.v_CBKGLP)
    written_CBKGHP = jnp.einsum("CBKGLH,CBKGLP->CBKGHP", x.put_k_CBKGLH, x.v_CBKGLP)

    # 2. Chunk by chunk: what its tokens read in truth, and the state after it.
    def step(S_BKGHP, chunk):
        system, read_BKGLH, put_BKGLH, written_BKGHP, keep_BKGX1 = chunk
        u_BKGLP = x.solve(*system, held_XLP=jnp.matmul(read_BKGLH, S_BKGHP))
        after_BKGHP = keep_BKGX1 * S_BKGHP + written_BKGHP + jnp.einsum("BKGLH,BKGLP->BKGHP", put_BKGLH, u_BKGLP)
        return after_BKGHP, (S_BKGHP, u_BKGLP)

    *_, H, P = state.shape
    last_BKGHP, (states_CBKGHP, u_CBKGLP) = jax.lax.scan(
        step,
        state.reshape(*x.v_CBKGLP.shape[1:4], H, P),
        (
            (ab_CBKGLS, ak_CBKGLS, inverse_CBKGLL, x.v_CBKGLP, own_CBKGLP),
            *(x.read_a_CBKGLH, x.put_b_CBKGLH, written_CBKGHP, x.for_q.keep_CBKGX1),
        ),
    )
    # 3. Within the chunk, and from the chunks before.
    o_CBKGLP = jnp.matmul(qb_CBKGLS, u_CBKGLP) + jnp.matmul(qk_CBKGLS, x.v_CBKGLP)
    o_CBKGLP += x.for_q.apply(x.q_CBKLH, x.for_q.reads_CBKGLX, states_CBKGHP)
    o_BTNP = clear_padding(chunks.join(o_CBKGLP, v.shape[1], v.dtype), segment_ids)
    outputs = o_BTNP, last_BKGHP.reshape(state.shape)
    return outputs, (states_CBKGHP, inverse_CBKGLL) if keep else ()


def backward(scale, residuals, cotangents):
    """Returns the gradients of q, k, v, a, b, g and state."""
    q, k, v, a, b, g, _, segment_ids, states_CBKGHP, inverse_CBKGLL = residuals
    do, dlast = cotangents
    x = _Chunks(scale, q, k, v, a, b, g, segment_ids)
    do_CBKGLP = chunks.split(clear_padding(do, segment_ids), k.shape[2], x.v_CBKGLP.shape[4], x.v_CBKGLP.dtype)
    # 1. What the forward pass knew.
    scores = x.scores()
    qb_CBKGLS, qk_CBKGLS, ab_CBKGLS, ak_CBKGLS = (s_CBKRGLS[:, :, :, 0] for s_CBKRGLS in scores)
    own_CBKGLP = jnp.matmul(ak_CBKGLS, x.v_CBKGLP)
    held_CBKGLP = x.for_a.apply(x.a_CBKLH, x.for_a.reads_CBKGLX, states_CBKGHP)
    u_CBKGLP = x.solve(ab_CBKGLS, ak_CBKGLS, inverse_CBKGLL, x.v_CBKGLP, own_CBKGLP, held_CBKGLP)
    # 2. The gradients of the state after each chunk and of what its tokens read and, through the triangular system, of
    # what that is made of; from the last chunk to the first.
    du_CBKGLP = jnp.einsum("CBKGLS,CBKGLP->CBKGSP", qb_CBKGLS, do_CBKGLP)
    dread_CBKGHP = x.for_q.outer(x.q_CBKLH, x.for_q.reads_CBKGLX, do_CBKGLP)

    def step(dS_BKGHP, chunk):
        du_BKGLP, dread_BKGHP, read_BKGLH, system, put_BKGLH, keep_BKGX1 = chunk
        dx_BKGLP = x.solve_backward(*system, du_XLP=du_BKGLP + jnp.matmul(put_BKGLH, dS_BKGHP))
        before_BKGHP = keep_BKGX1 * dS_BKGHP + dread_BKGHP + jnp.einsum("BKGLH,BKGLP->BKGHP", read_BKGLH, dx_BKGLP)
        return before_BKGHP, (dS_BKGHP, dx_BKGLP)

    dstate_BKGHP, (dstates_CBKGHP, dx_CBKGLP) = jax.lax.scan(
        step,
        dlast.reshape(states_CBKGHP.shape[1:]),
        (
            *(du_CBKGLP, dread_CBKGHP, x.read_a_CBKGLH),
            (ab_CBKGLS, inverse_CBKGLL),
            *(x.put_b_CBKGLH, x.for_q.keep_CBKGX1),
        ),
        reverse=True,
    )
    # 3. What is written as it comes.
    dv_CBKGLP = jnp.einsum("CBKGLS,CBKGLP->CBKGSP", qk_CBKGLS, do_CBKGLP) + jnp.matmul(x.put_k_CBKGLH, dstates_CBKGHP)
    dv_CBKGLP += jnp.einsum("CBKGLS,CBKGLP->CBKGSP", ak_CBKGLS, dx_CBKGLP)
    # 4. What q and a read, of b and k: within the chunk, and through the state before it.
    dstate_CBKGLH = lambda d_CBKGLP, S_CBKGHP: jnp.einsum("CBKGLP,CBKGHP->CBKGLH", d_CBKGLP, S_CBKGHP)
    readers = (x.for_q, x.q_CBKLH, do_CBKGLP), (x.for_a, x.a_CBKLH, dx_CBKGLP)
    written = (x.b_CBKLH, u_CBKGLP), (x.k_CBKLH, x.v_CBKGLP)
    dreaders, dkeys = [], [jnp.zeros_like(x.b_CBKLH), jnp.zeros_like(x.k_CBKLH)]
    rows, pairs, puts = [], jnp.zeros(()), jnp.zeros(())
    # The gradient of g is a sum of many of these that cancel.
    outer = functools.partial(jnp.einsum, "CBKGLP,CBKGSP->CBKGLS")
    outer = functools.partial(accurate, outer) if x.is_exact else outer
    for i, (decay, x_CBKLH, d_CBKGLP) in enumerate(readers):
        border_CBKGLH = decay.reads_CBKGLX * dstate_CBKGLH(d_CBKGLP, states_CBKGHP)
        dreaders.append(jnp.sum(border_CBKGLH, axis=3))
        rows.append(decay.log_sum(x_CBKLH[:, :, :, None] * border_CBKGLH))
        for j, (k_CBKLH, y_CBKGLP) in enumerate(written):
            d_CBKRGLS = outer(d_CBKGLP, y_CBKGLP)[:, :, :, None]
            dx_CBKRLH, dk_CBKLH, more_pairs = decay.scores_backward(
                d_CBKRGLS, scores[2 * i + j], x_CBKLH[:, :, :, None], k_CBKLH
            )
            dreaders[i] += dx_CBKRLH[:, :, :, 0]
            dkeys[j] += dk_CBKLH
            pairs += more_pairs
    # 5. What b and k leave in the state after the chunk.
    for j, (k_CBKLH, y_CBKGLP) in enumerate(written):
        dput_CBKGLH = x.for_q.writes_CBKGLX * dstate_CBKGLH(y_CBKGLP, dstates_CBKGHP)
        dkeys[j] += jnp.sum(dput_CBKGLH, axis=3)
        puts += x.for_q.log_sum(k_CBKLH[:, :, :, None] * dput_CBKGLH)
    # 6. The decays. What a reads has decayed as what q reads a token earlier.
    rows = rows[0] + jnp.pad(rows[1][..., 1:, :], [(0, 0)] * 4 + [(0, 1), (0, 0)])
    whole = x.for_q.keep_CBKGX1[..., 0] * x.for_q.log_sum(jnp.sum(states_CBKGHP * dstates_CBKGHP, axis=-1))
    dg_CBKGLX = x.for_q.gradient(pairs, rows, puts, whole)
    T, (dq_CBKLH, da_CBKLH), (db_CBKLH, dk_CBKLH) = v.shape[1], dreaders, dkeys
    return (
        chunks.join(scale * dq_CBKLH[:, :, :, None], T, q.dtype),
        chunks.join(dk_CBKLH[:, :, :, None], T, k.dtype),
        chunks.join(dv_CBKGLP, T, v.dtype),
        chunks.join(da_CBKLH[:, :, :, None], T, a.dtype),
        chunks.join(db_CBKLH[:, :, :, None], T, b.dtype),
        clear_padding(chunks.join(dg_CBKGLX, T, g.dtype).reshape(g.shape), segment_ids),
        dstate_BKGHP.reshape(dlast.shape),
    )
