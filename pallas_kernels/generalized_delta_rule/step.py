"""One token of the generalized delta rule, as decoding takes it: no chunk, no loop, the state written once.

A single token starts no document: the given state is its own. Padding has a decay of 1 and writes nothing.
"""

import jax.numpy as jnp

from pallas_kernels.common.documents import clear_padding


def generalized_delta_rule(q, k, v, a, b, g, state, segment_ids, scale):
    """Arguments as in `ref.generalized_delta_rule`, of one token."""
    dtype, G = state.dtype, v.shape[2] // k.shape[2]
    k, v, a, b, g = (clear_padding(x, segment_ids) for x in (k, v, a, b, g))
    q_BNH, k_BNH, a_BNH, b_BNH = (jnp.repeat(x[:, 0], G, axis=1).astype(dtype) for x in (q, k, a, b))
    decay_BNX = jnp.exp(g[:, 0] if g.ndim == 4 else g[:, 0, :, None]).astype(dtype)
    read_BNP = jnp.einsum("BNH,BNHP->BNP", a_BNH, state)  # before the decay
    written_BNHP = b_BNH[..., None] * read_BNP[..., None, :] + k_BNH[..., None] * v[:, 0].astype(dtype)[..., None, :]
    new_BNHP = decay_BNX[..., None] * state + written_BNHP
    o_BNP = jnp.einsum("BNH,BNHP->BNP", q_BNH, new_BNHP)
    return clear_padding(scale * o_BNP[:, None], segment_ids).astype(v.dtype), new_BNHP
