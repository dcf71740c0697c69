"""One token of the selective scan, as decoding takes it: no chunk, no loop, the state written once.

A single token starts no document: the given state is its own. Padding takes a step of 0, which changes nothing.
"""

import jax.numpy as jnp

from pallas_kernels.common.documents import clear_padding


def selective_scan(x, dt, A, B, C, state, segment_ids):
    """Arguments as in `ref.selective_scan`, of one token."""
    dtype = state.dtype
    x_BD, dt_BD, B_BH, C_BH = (clear_padding(a, segment_ids)[:, 0].astype(dtype) for a in (x, dt, B, C))
    new_BDH = jnp.exp(dt_BD[..., None] * A.astype(dtype)) * state + (dt_BD * x_BD)[..., None] * B_BH[:, None]
    y_BD = jnp.einsum("BDH,BH->BD", new_BDH, C_BH)
    return y_BD[:, None].astype(x.dtype), new_BDH
