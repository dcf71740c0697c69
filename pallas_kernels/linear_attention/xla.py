"""Linear attention in chunks of matmuls; https://arxiv.org/abs/2312.06635, https://arxiv.org/abs/2405.21060.

Within a chunk, with the decays of `common/decays.py` (A for the scores of q and k, S for the state before the chunk):

    O  = A V + reads (Q S)
    S' = keep S + K^T (writes V)

The states alone are walked chunk by chunk; all the rest is matmuls over all chunks at once. Backward, dS and dS' being
the gradients of S and S':

    dA = dO V^T                      dQ = dA's share + reads (dO S^T)
    dS = keep dS' + Q^T (reads dO)   dK = dA's share + writes (V dS'^T)
                                     dV = A^T dO + writes (K dS')

The backward pass walks the states once more rather than keep them: they are larger than all the inputs.
"""

import jax.numpy as jnp

from pallas_kernels.common import chunks
from pallas_kernels.common.decays import ChannelDecay, HeadDecay
from pallas_kernels.common.documents import clear_padding, fill_padding

# 32 is as fast on a CPU but keeps twice the states; 128 is slower.
CHUNK = 64


def _chunked(scale, before, q, k, v, g, state, segment_ids):
    """Returns the arguments in chunks, their decays, what each chunk writes, the states before each, and the last."""
    v, g = clear_padding(v, segment_ids), clear_padding(g, segment_ids)
    K, L, dtype = k.shape[2], chunks.length(v.shape[1], CHUNK), jnp.promote_types(v.dtype, jnp.float32)
    q_CBKLH = chunks.split(q, K, L, dtype)[:, :, :, 0] * scale
    k_CBKLH = chunks.split(k, K, L, dtype)[:, :, :, 0]
    v_CBKGLP, g_CBKGLX = (chunks.split(x, K, L, dtype) for x in (v, g[..., None] if g.ndim == 3 else g))
    decay = (HeadDecay if g.ndim == 3 else ChannelDecay)(
        g_CBKGLX, chunks.Segments(fill_padding(segment_ids), L), before
    )
    writes_CBKGHP = decay.outer(k_CBKLH, decay.writes_CBKGLX, v_CBKGLP)
    states = chunks.scan_states(decay.keep_CBKGX1, writes_CBKGHP, state.reshape(writes_CBKGHP.shape[1:]))
    return q_CBKLH, k_CBKLH, v_CBKGLP, decay, *states


def forward(scale, before, q, k, v, g, state, segment_ids):
    """Returns (o, state). `before`: tokens read the state before their own decay and write. g is BTN or BTNH."""
    inputs = q, k, v, g, state, segment_ids
    q_CBKLH, k_CBKLH, v_CBKGLP, decay, states_CBKGHP, last_BKGHP = _chunked(scale, before, *inputs)
    scores_CBKGLS = decay.scores(q_CBKLH[:, :, :, None], k_CBKLH)[:, :, :, 0]
    o_CBKGLP = jnp.matmul(scores_CBKGLS, v_CBKGLP) + decay.apply(q_CBKLH, decay.reads_CBKGLX, states_CBKGHP)
    o_BTNP = chunks.join(o_CBKGLP, v.shape[1], v.dtype)
    return clear_padding(o_BTNP, segment_ids), last_BKGHP.reshape(state.shape)


def backward(scale, before, inputs, cotangents):
    """Returns the gradients of q, k, v, g and state."""
    q, k, v, g, _, segment_ids = inputs
    do, dlast = cotangents
    do = clear_padding(do, segment_ids)
    q_CBKLH, k_CBKLH, v_CBKGLP, decay, states_CBKGHP, _ = _chunked(scale, before, *inputs)
    do_CBKGLP = chunks.split(do, k.shape[2], v_CBKGLP.shape[4], v_CBKGLP.dtype)
    # 1. The gradient of the state after each chunk, from the last to the first.
    dwrites_CBKGHP = decay.outer(q_CBKLH, decay.reads_CBKGLX, do_CBKGLP)
    dstates_CBKGHP, dstate_BKGHP = chunks.scan_states(
        decay.keep_CBKGX1, dwrites_CBKGHP, dlast.reshape(dwrites_CBKGHP.shape[1:]), reverse=True
    )
    # 2. Within the chunk.
    q_CBKRLH = q_CBKLH[:, :, :, None]
    scores_CBKRGLS = decay.scores(q_CBKRLH, k_CBKLH)
    dscores_CBKRGLS = jnp.einsum("CBKGLP,CBKGSP->CBKGLS", do_CBKGLP, v_CBKGLP)[:, :, :, None]
    dv_CBKGLP = jnp.einsum("CBKGLS,CBKGLP->CBKGSP", scores_CBKRGLS[:, :, :, 0], do_CBKGLP)
    dq_CBKRLH, dk_CBKLH, pairs = decay.scores_backward(dscores_CBKRGLS, scores_CBKRGLS, q_CBKRLH, k_CBKLH)
    # 3. Through the states at the chunk's borders.
    dread_CBKGLH = decay.reads_CBKGLX * jnp.einsum("CBKGLP,CBKGHP->CBKGLH", do_CBKGLP, states_CBKGHP)
    dput_CBKGLH = decay.writes_CBKGLX * jnp.einsum("CBKGLP,CBKGHP->CBKGLH", v_CBKGLP, dstates_CBKGHP)
    dv_CBKGLP += decay.apply(k_CBKLH, decay.writes_CBKGLX, dstates_CBKGHP)
    dq_CBKLH = dq_CBKRLH[:, :, :, 0] + jnp.sum(dread_CBKGLH, axis=3)
    dk_CBKLH += jnp.sum(dput_CBKGLH, axis=3)
    # 4. The decays.
    rows = decay.log_sum(q_CBKLH[:, :, :, None] * dread_CBKGLH)
    puts = decay.log_sum(k_CBKLH[:, :, :, None] * dput_CBKGLH)
    whole = decay.keep_CBKGX1[..., 0] * decay.log_sum(jnp.sum(states_CBKGHP * dstates_CBKGHP, axis=-1))
    dg_CBKGLX = decay.gradient(pairs, rows, puts, whole)
    T = v.shape[1]
    return (
        chunks.join(scale * dq_CBKLH[:, :, :, None], T, q.dtype),
        chunks.join(dk_CBKLH[:, :, :, None], T, k.dtype),
        clear_padding(chunks.join(dv_CBKGLP, T, v.dtype), segment_ids),
        clear_padding(chunks.join(dg_CBKGLX, T, g.dtype).reshape(g.shape), segment_ids),
        dstate_BKGHP.reshape(dlast.shape),
    )
