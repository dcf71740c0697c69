"""One token of the diagonal scan, as decoding takes it: no chunk, no loop.

A single token starts no document: the given state is its own. Padding leaves it as it is.
"""

import jax.numpy as jnp

from pallas_kernels.common.documents import clear_padding


def diagonal_scan(a, x, state, segment_ids):
    """Arguments as in `ref.diagonal_scan`, of one token."""
    real_B = (segment_ids[:, 0] > 0).reshape(-1, *(1,) * (state.ndim - 1))
    a, x_B = a if a.ndim < x.ndim else a[:, 0], x[:, 0].astype(state.dtype)
    new = jnp.where(real_B, a.astype(state.dtype) * state + x_B, state)
    return clear_padding(new[:, None], segment_ids).astype(x.dtype), new
