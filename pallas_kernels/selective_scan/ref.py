"""The definition of `selective_scan`, one token at a time. Every other implementation must agree with it."""

import jax
import jax.numpy as jnp


def selective_scan(x, dt, A, B, C, state, segment_ids):
    """Arguments as in `op.selective_scan`, but none of them is optional; without the skip."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    A_DH = A.astype(dtype)

    def step(carry, token):
        h_BDH, document_B = carry
        *arrays, id_B = token
        x_BD, dt_BD, B_BH, C_BH = (a.astype(dtype) for a in arrays)
        # The state belongs to the first document; each later one starts from zero.
        starts_B = (id_B > 0) & (document_B > 0) & (id_B != document_B)
        old_BDH = jnp.where(starts_B[:, None, None], 0, h_BDH)
        new_BDH = jnp.exp(dt_BD[..., None] * A_DH) * old_BDH + (dt_BD * x_BD)[..., None] * B_BH[:, None]
        y_BD = jnp.einsum("BDH,BH->BD", new_BDH, C_BH)
        # Padding neither reads nor writes.
        real_B = id_B > 0
        h_BDH = jnp.where(real_B[:, None, None], new_BDH, h_BDH)
        return (h_BDH, jnp.where(real_B, id_B, document_B)), jnp.where(real_B[:, None], y_BD, 0)

    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x, dt, B, C, segment_ids))
    carry = state.astype(dtype), jnp.zeros_like(segment_ids, shape=segment_ids.shape[:1])
    (h_BDH, _), y_TBD = jax.lax.scan(step, carry, tokens)
    return jnp.moveaxis(y_TBD, 0, 1).astype(x.dtype), h_BDH
