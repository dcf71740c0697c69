"""One token of the convolution, as decoding takes it: no loop, and nothing to find out about documents.

A single token starts no document: the given state is its own. Padding leaves it as it is.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common.documents import clear_padding


def short_conv(x, w, bias, state, segment_ids, activation):
    """Arguments as in `ref.short_conv`, of one token."""
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    w_DW, inputs_BWD = w.astype(dtype), jnp.concatenate([state.astype(dtype), x.astype(dtype)], axis=1)
    y_BD = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)[None]
    for j in range(w.shape[1]):
        y_BD = y_BD + inputs_BWD[:, j] * w_DW[None, :, j]
    y_B1D = (jax.nn.silu(y_BD) if activation == "silu" else y_BD)[:, None].astype(x.dtype)
    new_state = inputs_BWD[:, 1:].astype(state.dtype)
    if segment_ids is None:
        return y_B1D, new_state
    return clear_padding(y_B1D, segment_ids), jnp.where((segment_ids > 0)[..., None], new_state, state)
