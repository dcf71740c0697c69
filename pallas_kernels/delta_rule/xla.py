"""The delta rule in chunks of matmuls; https://arxiv.org/abs/2406.06484, https://arxiv.org/abs/2412.06464.

Token i finds in what the state, decayed, holds for k_i an error d_i, and writes beta_i d_i. The state holds what the
tokens before it wrote: with the decays of `common/decays.py` (KK strictly lower scores of k and k, QK the scores of q
and k, S the state before the chunk) these are L linear equations, whose matrix is unit lower triangular:

    (I + KK beta) D = V - reads (K S) =: X        U = beta D
    O  = QK U + reads (Q S)
    S' = keep S + K^T (writes U)

and D = M X with M = (I + KK beta)^-1. Backward, dS and dS' being the gradients of S and S':

    dU = QK^T dO + writes (K dS')
    dS = keep dS' + Q^T (reads dO) - K^T (reads dX)
    dX = M^T (beta dU) = dV        from D = M X; and d(KK beta) = -dX D^T, as dM^-1 = -M^T dM M^T
    dQK = dO U^T                   d(reads K S) = -dX, which gives dK its share, as dO gives dQ
                                   d(K^T (writes U)) = dS', which gives dK its share writes (U dS'^T)

Residuals are the inputs, the state before each chunk and the inverses M.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import blocks, chunks, decays
from pallas_kernels.common.accurate import accurate
from pallas_kernels.common.decays import ChannelDecay, HeadDecay
from pallas_kernels.common.documents import clear_padding, fill_padding

# Tokens of a chunk: as many as keys have channels, in these limits. The more tokens are alike in fewer channels, the
# more of what they write cancels, and the errors with it do not. A state is then as large as the values of its chunk.
_SHORTEST, _LONGEST = 16, 64


def _length(k):
    return chunks.length(k.shape[1], min(_LONGEST, max(_SHORTEST, chunks.length(k.shape[3], _LONGEST))))


def _chunked(q, k, v, beta, g, segment_ids, scale):
    beta, g = clear_padding(beta, segment_ids), clear_padding(g, segment_ids)
    K, L, dtype = k.shape[2], _length(k), jnp.promote_types(v.dtype, jnp.float32)
    q_CBKLH = chunks.split(q, K, L, dtype)[:, :, :, 0] * scale
    k_CBKLH = chunks.split(k, K, L, dtype)[:, :, :, 0]
    v_CBKGLP, beta_CBKGL1 = (chunks.split(x, K, L, dtype) for x in (v, beta[..., None]))
    g_CBKGLX = chunks.split(g[..., None] if g.ndim == 3 else g, K, L, dtype)
    decay = (HeadDecay if g.ndim == 3 else ChannelDecay)(g_CBKGLX, chunks.Segments(fill_padding(segment_ids), L))
    return jnp.stack([q_CBKLH, k_CBKLH], axis=3), k_CBKLH, v_CBKGLP, beta_CBKGL1, decay


def _system(qk_CBKRLH, k_CBKLH, beta_CBKGL1, decay, exactly_q, exactly_k):
    """Returns the scores QK and KK and the matrix KK beta, whose errors are those of the result, ten times over."""
    qk_CBKGLS = decay.scores(qk_CBKRLH[:, :, :, :1], k_CBKLH, exactly_q)[:, :, :, 0]
    kk_CBKGLS = decay.scores(qk_CBKRLH[:, :, :, 1:], k_CBKLH, exactly_k)[:, :, :, 0]
    earlier_CBKGLL = decays.lower(k_CBKLH.shape[3], -1)[:, :, :, 0]
    kk_CBKGLS = jnp.where(earlier_CBKGLL, kk_CBKGLS, 0)
    return qk_CBKGLS, kk_CBKGLS, kk_CBKGLS * beta_CBKGL1.mT


def _solve(system_XLL, inverse_XLL, x_XLP, is_exact):
    """Returns d of (I + system) d = x."""
    d_XLP = jnp.matmul(inverse_XLL, x_XLP)
    if is_exact:  # the inverse has errors of its own, which this corrects
        found_XLP = accurate(jnp.matmul, system_XLL, d_XLP, axes=(-1, -2), y_sizes=jnp.abs(d_XLP))
        d_XLP += jnp.matmul(inverse_XLL, x_XLP - d_XLP - found_XLP)
    return d_XLP


def _is_exact(*operands):
    """Whether float32 is asked for; operands of bfloat16 are off by more than any sum of theirs."""
    return any(x.dtype == jnp.float32 for x in operands)


def forward(keep, scale, q, k, v, beta, g, state, segment_ids):
    """Returns (o, state), and residuals if they are to be kept.

    g is BTN or BTNH; 0 of segment_ids is padding, where beta and g may be anything.
    """
    qk_CBKRLH, k_CBKLH, v_CBKGLP, beta_CBKGL1, decay = _chunked(q, k, v, beta, g, segment_ids, scale)
    q_CBKLH = qk_CBKRLH[:, :, :, 0]
    k_CBKGLH, is_exact = k_CBKLH[:, :, :, None], _is_exact(q, k, v)
    # 1. The systems.
    qk_CBKGLS, _, system_CBKGLL = _system(qk_CBKRLH, k_CBKLH, beta_CBKGL1, decay, False, is_exact)
    inverse_CBKGLL = blocks.inverse(system_CBKGLL)

    # 2. Chunk by chunk: what its tokens write, and the state after it.
    def step(S_BKGHP, chunk):
        v_BKGLP, beta_BKGL1, system_BKGLL, inverse_BKGLL, read_BKGLH, put_BKGLH, keep_BKGX1 = chunk
        x_BKGLP = v_BKGLP - jnp.matmul(read_BKGLH, S_BKGHP)
        u_BKGLP = beta_BKGL1 * _solve(system_BKGLL, inverse_BKGLL, x_BKGLP, is_exact)
        after_BKGHP = keep_BKGX1 * S_BKGHP + jnp.einsum("BKGLH,BKGLP->BKGHP", put_BKGLH, u_BKGLP)
        return after_BKGHP, (S_BKGHP, u_BKGLP)

    *_, H, P = state.shape
    put_CBKGLH, read_CBKGLH = decay.writes_CBKGLX * k_CBKGLH, decay.reads_CBKGLX * k_CBKGLH
    last_BKGHP, (states_CBKGHP, u_CBKGLP) = jax.lax.scan(
        step,
        state.reshape(*v_CBKGLP.shape[1:4], H, P),
        (v_CBKGLP, beta_CBKGL1, system_CBKGLL, inverse_CBKGLL, read_CBKGLH, put_CBKGLH, decay.keep_CBKGX1),
    )
    # 3. Within the chunk, and from the chunks before.
    o_CBKGLP = jnp.matmul(qk_CBKGLS, u_CBKGLP)
    o_CBKGLP += decay.apply(q_CBKLH, decay.reads_CBKGLX, states_CBKGHP)
    o_BTNP = clear_padding(chunks.join(o_CBKGLP, v.shape[1], v.dtype), segment_ids)
    outputs = o_BTNP, last_BKGHP.reshape(state.shape)
    return outputs, (states_CBKGHP, inverse_CBKGLL) if keep else ()


def backward(scale, residuals, cotangents):
    """Returns the gradients of q, k, v, beta, g and state."""
    q, k, v, beta, g, _, segment_ids, states_CBKGHP, inverse_CBKGLL = residuals
    do, dlast = cotangents
    qk_CBKRLH, k_CBKLH, v_CBKGLP, beta_CBKGL1, decay = _chunked(q, k, v, beta, g, segment_ids, scale)
    q_CBKLH = qk_CBKRLH[:, :, :, 0]
    do_CBKGLP = chunks.split(clear_padding(do, segment_ids), k.shape[2], v_CBKGLP.shape[4], v_CBKGLP.dtype)
    k_CBKGLH, q_CBKGLH, is_exact = k_CBKLH[:, :, :, None], q_CBKLH[:, :, :, None], _is_exact(q, k, v)
    # 1. What the forward pass knew.
    qk_CBKGLS, kk_CBKGLS, system_CBKGLL = _system(qk_CBKRLH, k_CBKLH, beta_CBKGL1, decay, is_exact, is_exact)
    read_CBKGLH, put_CBKGLH = decay.reads_CBKGLX * k_CBKGLH, decay.writes_CBKGLX * k_CBKGLH
    x_CBKGLP = v_CBKGLP - decay.apply(k_CBKLH, decay.reads_CBKGLX, states_CBKGHP)
    d_CBKGLP = _solve(system_CBKGLL, inverse_CBKGLL, x_CBKGLP, is_exact)
    u_CBKGLP = beta_CBKGL1 * d_CBKGLP
    # 2. The gradients of the state after each chunk and of what its tokens write, from the last chunk to the first.
    du_CBKGLP = jnp.einsum("CBKGLS,CBKGLP->CBKGSP", qk_CBKGLS, do_CBKGLP)
    dread_CBKGHP = decay.outer(q_CBKLH, decay.reads_CBKGLX, do_CBKGLP)

    def step(dS_BKGHP, chunk):
        du_BKGLP, dread_BKGHP, beta_BKGL1, system_BKGLL, inverse_BKGLL, read_BKGLH, put_BKGLH, keep_BKGX1 = chunk
        du_BKGLP += jnp.matmul(put_BKGLH, dS_BKGHP)
        dx_BKGLP = _solve(system_BKGLL.mT, inverse_BKGLL.mT, beta_BKGL1 * du_BKGLP, is_exact)
        before_BKGHP = keep_BKGX1 * dS_BKGHP + dread_BKGHP - jnp.einsum("BKGLH,BKGLP->BKGHP", read_BKGLH, dx_BKGLP)
        return before_BKGHP, (dS_BKGHP, du_BKGLP, dx_BKGLP)

    dstate_BKGHP, (dstates_CBKGHP, du_CBKGLP, dv_CBKGLP) = jax.lax.scan(
        step,
        dlast.reshape(states_CBKGHP.shape[1:]),
        (
            *(du_CBKGLP, dread_CBKGHP, beta_CBKGL1, system_CBKGLL, inverse_CBKGLL),
            *(read_CBKGLH, put_CBKGLH, decay.keep_CBKGX1),
        ),
        reverse=True,
    )
    # 3. The system, and beta: of what is written, less what tokens of the chunk found of it.
    earlier_CBKGLL = decays.lower(k_CBKLH.shape[3], -1)[:, :, :, 0]
    # The gradient of g is a sum of many of these that cancel.
    outer = functools.partial(jnp.einsum, "CBKGLP,CBKGSP->CBKGLS")
    outer = functools.partial(accurate, outer) if is_exact else outer
    dsystem_CBKGLS = jnp.where(earlier_CBKGLL, -outer(dv_CBKGLP, d_CBKGLP), 0)
    du_CBKGLP -= jnp.einsum("CBKGLS,CBKGLP->CBKGSP", kk_CBKGLS, dv_CBKGLP)
    dbeta_CBKGL = jnp.sum(d_CBKGLP * du_CBKGLP, axis=-1)
    # 4. Within the chunk.
    dqk_CBKGLS = outer(do_CBKGLP, u_CBKGLP)
    scores_CBKRGLS = jnp.stack([qk_CBKGLS, kk_CBKGLS], axis=3)
    dscores_CBKRGLS = jnp.stack([dqk_CBKGLS, dsystem_CBKGLS * beta_CBKGL1.mT], axis=3)
    dqk_CBKRLH, dk_CBKLH, pairs = decay.scores_backward(dscores_CBKRGLS, scores_CBKRGLS, qk_CBKRLH, k_CBKLH)
    # 5. Through the states at the chunk's borders.
    dread_q_CBKGLH = decay.reads_CBKGLX * jnp.einsum("CBKGLP,CBKGHP->CBKGLH", do_CBKGLP, states_CBKGHP)
    dread_k_CBKGLH = -decay.reads_CBKGLX * jnp.einsum("CBKGLP,CBKGHP->CBKGLH", dv_CBKGLP, states_CBKGHP)
    dput_CBKGLH = decay.writes_CBKGLX * jnp.einsum("CBKGLP,CBKGHP->CBKGLH", u_CBKGLP, dstates_CBKGHP)
    dq_CBKLH = dqk_CBKRLH[:, :, :, 0] + jnp.sum(dread_q_CBKGLH, axis=3)
    dk_CBKLH += dqk_CBKRLH[:, :, :, 1] + jnp.sum(dread_k_CBKGLH + dput_CBKGLH, axis=3)
    # 6. The decays.
    rows = decay.log_sum(q_CBKGLH * dread_q_CBKGLH + k_CBKGLH * dread_k_CBKGLH)
    puts = decay.log_sum(k_CBKGLH * dput_CBKGLH)
    whole = decay.keep_CBKGX1[..., 0] * decay.log_sum(jnp.sum(states_CBKGHP * dstates_CBKGHP, axis=-1))
    dg_CBKGLX = decay.gradient(pairs, rows, puts, whole)
    T = v.shape[1]
    dbeta_BTN, dg_BTNX = chunks.join(dbeta_CBKGL, T, beta.dtype), chunks.join(dg_CBKGLX, T, g.dtype)
    return (
        chunks.join(scale * dq_CBKLH[:, :, :, None], T, q.dtype),
        chunks.join(dk_CBKLH[:, :, :, None], T, k.dtype),
        chunks.join(dv_CBKGLP, T, v.dtype),
        clear_padding(dbeta_BTN, segment_ids),
        clear_padding(dg_BTNX, segment_ids).reshape(g.shape),
        dstate_BKGHP.reshape(dlast.shape),
    )
