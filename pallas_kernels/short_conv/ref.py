"""The definition of `short_conv`: one token at a time."""

import jax
import jax.numpy as jnp

from pallas_kernels.common.documents import fill_padding


def short_conv(x, w, bias, state, segment_ids, activation):
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    w_DW, bias = w.astype(dtype), None if bias is None else bias.astype(dtype)
    if segment_ids is None:
        segment_ids = jnp.ones(x.shape[:2], jnp.int32)
    filled_BT = fill_padding(segment_ids)
    starts_BT = jnp.diff(filled_BT, axis=1, prepend=filled_BT[:, :1]) != 0

    def step(window_BWD, token):
        x_BD, is_real_B, is_start_B = token
        window_BWD = jnp.where(is_start_B[:, None, None], 0, window_BWD)
        taps_BWD = jnp.concatenate([window_BWD, x_BD[:, None]], axis=1)
        y_BD = jnp.einsum("BWD,DW->BD", taps_BWD, w_DW)
        if bias is not None:
            y_BD = y_BD + bias[None]
        if activation == "silu":
            y_BD = jax.nn.silu(y_BD)
        window_BWD = jnp.where(is_real_B[:, None, None], taps_BWD[:, 1:], window_BWD)
        return window_BWD, jnp.where(is_real_B[:, None], y_BD, 0)

    tokens = (jnp.moveaxis(x.astype(dtype), 1, 0), (segment_ids > 0).T, starts_BT.T)
    window_BWD, y_TBD = jax.lax.scan(step, state.astype(dtype), tokens)
    return jnp.moveaxis(y_TBD, 0, 1).astype(x.dtype), window_BWD.astype(state.dtype)
