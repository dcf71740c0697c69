"""One token of the gated delta rule, as decoding takes it: no chunk, no loop, the state written once.

What the state holds for k has to be known before anything is written. That read decays k instead of the state, which
would otherwise be written twice.

A single token starts no document: the given state is its own. Padding has a decay of 1 and writes nothing.
"""

import jax.numpy as jnp

from pallas_kernels.common.documents import clear_padding


def delta_rule(q, k, v, beta, g, state, segment_ids, scale):
    """Arguments as in `ref.delta_rule`, of one token."""
    dtype, G = state.dtype, v.shape[2] // k.shape[2]
    k, v, beta, g = (clear_padding(x, segment_ids) for x in (k, v, beta, g))
    q_BNH, k_BNH = (jnp.repeat(x[:, 0], G, axis=1).astype(dtype) for x in (q, k))
    v_BNP, beta_BN1 = v[:, 0].astype(dtype), beta[:, 0, :, None].astype(dtype)
    decay_BNX = jnp.exp(g[:, 0] if g.ndim == 4 else g[:, 0, :, None]).astype(dtype)
    held_BNP = jnp.einsum("BNH,BNHP->BNP", decay_BNX * k_BNH, state)
    delta_BNP = beta_BN1 * (v_BNP - held_BNP)
    new_BNHP = decay_BNX[..., None] * state + k_BNH[..., None] * delta_BNP[..., None, :]
    o_BNP = jnp.einsum("BNH,BNHP->BNP", q_BNH, new_BNHP)
    return clear_padding(scale * o_BNP[:, None], segment_ids).astype(v.dtype), new_BNHP
