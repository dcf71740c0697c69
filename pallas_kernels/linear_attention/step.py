"""One token of linear attention, as decoding takes it: no chunk, no loop, the state written once.

A single token starts no document: the given state is its own. Padding has a decay of 1 and writes nothing.
"""

import jax.numpy as jnp

from pallas_kernels.common.documents import clear_padding


def linear_attention(q, k, v, g, bonus, state, segment_ids, scale):
    """Arguments as in `ref.linear_attention`, of one token."""
    dtype, G = state.dtype, v.shape[2] // k.shape[2]
    k, v, g = (clear_padding(x, segment_ids) for x in (k, v, g))
    q_BNH, k_BNH = (jnp.repeat(x[:, 0], G, axis=1).astype(dtype) for x in (q, k))
    v_BNP = v[:, 0].astype(dtype)
    decay_BNX = jnp.exp(g[:, 0] if g.ndim == 4 else g[:, 0, :, None]).astype(dtype)
    new_BNHP = decay_BNX[..., None] * state + k_BNH[..., None] * v_BNP[..., None, :]
    if bonus is None:
        o_BNP = jnp.einsum("BNH,BNHP->BNP", q_BNH, new_BNHP)
    else:
        own_BN1 = jnp.einsum("BNH,NH,BNH->BN", q_BNH, bonus.astype(dtype), k_BNH)[..., None]
        o_BNP = jnp.einsum("BNH,BNHP->BNP", q_BNH, state) + own_BN1 * v_BNP
    return clear_padding(scale * o_BNP[:, None], segment_ids).astype(v.dtype), new_BNHP
