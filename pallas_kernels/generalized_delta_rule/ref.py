"""The definition of the generalized delta rule, one token at a time. Every other implementation must agree with it."""

import jax
import jax.numpy as jnp


def generalized_delta_rule(q, k, v, a, b, g, state, segment_ids, scale):
    """Arguments as in `op.generalized_delta_rule`, but none of them is optional; g is BTN or BTNH."""
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    G = v.shape[2] // k.shape[2]

    def step(carry, token):
        S_BNHP, document_B = carry
        *keys_BKH, v_BNP, g_BNH, id_B = token
        q_BNH, k_BNH, a_BNH, b_BNH = (jnp.repeat(x_BKH, G, axis=1).astype(dtype) for x_BKH in keys_BKH)
        v_BNP, g_BNH = v_BNP.astype(dtype), g_BNH.astype(dtype)
        # The state belongs to the first document; each later one starts from zero.
        starts_B = (id_B > 0) & (document_B > 0) & (id_B != document_B)
        old_BNHP = jnp.where(starts_B[:, None, None, None], 0, S_BNHP)
        read_BNP = jnp.einsum("BNH,BNHP->BNP", a_BNH, old_BNHP)  # before the decay
        new_BNHP = jnp.exp(g_BNH)[..., None] * old_BNHP
        new_BNHP += b_BNH[..., None] * read_BNP[..., None, :] + k_BNH[..., None] * v_BNP[..., None, :]
        o_BNP = jnp.einsum("BNH,BNHP->BNP", q_BNH, new_BNHP)
        # Padding neither reads nor writes.
        real_B = id_B > 0
        S_BNHP = jnp.where(real_B[:, None, None, None], new_BNHP, S_BNHP)
        o_BNP = jnp.where(real_B[:, None, None], scale * o_BNP, 0)
        return (S_BNHP, jnp.where(real_B, id_B, document_B)), o_BNP

    if g.ndim == 3:
        g = g[..., None]
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, a, b, v, g, segment_ids))
    carry = state.astype(dtype), jnp.zeros_like(segment_ids, shape=segment_ids.shape[:1])
    (S_BNHP, _), o_TBNP = jax.lax.scan(step, carry, tokens)
    return jnp.moveaxis(o_TBNP, 0, 1).astype(v.dtype), S_BNHP
