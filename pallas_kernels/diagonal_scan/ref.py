"""The definition of the diagonal scan, one token at a time. Every other implementation must agree with it."""

import jax
import jax.numpy as jnp


def diagonal_scan(reverse, a, x, state, segment_ids):
    """Arguments as in `op.diagonal_scan`, none of them optional; a and x are both real or both complex."""
    a = jnp.broadcast_to(a, x.shape)
    over_width = lambda flag_B: flag_B.reshape(flag_B.shape + (1,) * (x.ndim - 2))

    def step(carry, token):
        h, document_B = carry
        a, x, id_B = token
        # The state belongs to the first document; each later one starts from zero.
        starts_B = (id_B > 0) & (document_B > 0) & (id_B != document_B)
        old = jnp.where(over_width(starts_B), 0, h)
        new = a.astype(h.dtype) * old + x.astype(h.dtype)
        # Padding neither reads nor writes.
        real_B = id_B > 0
        h = jnp.where(over_width(real_B), new, h)
        return (h, jnp.where(real_B, id_B, document_B)), jnp.where(over_width(real_B), new, 0)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (a, x, segment_ids))
    carry = state, jnp.zeros_like(segment_ids, shape=segment_ids.shape[:1])
    (last, _), h = jax.lax.scan(step, carry, tokens, reverse=reverse)
    return jnp.moveaxis(h, 0, 1).astype(x.dtype), last
