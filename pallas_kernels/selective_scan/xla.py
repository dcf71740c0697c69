"""The selective scan token by token, in chunks: the states between chunks are kept, those within are computed again.

With a = exp(dt A) and u = dt x, for one channel and row of the state:

    h = a h_old + u B        y = sum_H C h + D x

Backward, g being the gradient of h, from the last token to the first:

    g = C dy + (a g)_next    dC = sum_D h dy   dB = sum_D g u   du = sum_H g B
                             d(dt A) = g a h_old

Each step is a handful of loops over `[B H D]` that stay in cache; matmuls have no part in it, as each channel and row
decays by itself. Residuals are the inputs and the state before each chunk of `CHUNK` tokens, `states_CBHD`: nothing of
size T x D x H is ever there.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common import chunks

CHUNK = 64
# A step that forgets everything, as a document's first token has to: exp(FOREVER * A) is 0 for every A up to MAX_A.
FOREVER, MAX_A = 1e30, -1e-20


def forward(x, dt, A, B, C, D, state, marks):
    """Returns (y, state) and residuals.

    `marks_BT`: 0 is padding, 2 a document's first token where the state before it is another's, 1 all the others.
    B and C are zero at padding, and so is y; x and dt may be anything there.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rates_HD = jnp.minimum(A.astype(dtype), MAX_A).T

    def chunk(h_BHD, arrays):
        x_LBD, dt_LBD, B_LBH, C_LBH, marks_LB = arrays

        def step(h_BHD, token):
            x_BD, dt_BD, span_BD, B_BH, C_BH = token
            write_BHD = (dt_BD * x_BD)[:, None] * B_BH[..., None]
            h_BHD = jnp.exp(span_BD[:, None] * rates_HD) * h_BHD + write_BHD
            return h_BHD, jnp.einsum("BH,BHD->BD", C_BH, h_BHD)

        x_LBD, dt_LBD, spans_LBD = _tokens(dtype, x_LBD, dt_LBD, marks_LB)
        tokens = x_LBD, dt_LBD, spans_LBD, B_LBH.astype(dtype), C_LBH.astype(dtype)
        last_BHD, y_LBD = jax.lax.scan(step, h_BHD, tokens)
        return last_BHD, ((y_LBD + D.astype(dtype) * x_LBD).astype(x.dtype), h_BHD)

    T, first_BHD = x.shape[1], jnp.swapaxes(state, 1, 2)
    last_BHD, (y_CLBD, states_CBHD) = jax.lax.scan(chunk, first_BHD, [_split(a) for a in (x, dt, B, C, marks)])
    return (_join(y_CLBD, T), jnp.swapaxes(last_BHD, 1, 2)), (x, dt, A, B, C, D, marks, states_CBHD)


def backward(residuals, cotangents):
    """Returns the gradients of x, dt, A, B, C, D and state."""
    x, dt, A, B, C, D, marks, states_CBHD = residuals
    dy, dlast = cotangents
    dtype = states_CBHD.dtype
    rates_HD = jnp.minimum(A.astype(dtype), MAX_A).T
    decay = lambda span_BD: jnp.exp(span_BD[:, None] * rates_HD)

    def chunk(carry, arrays):
        x_LBD, dt_LBD, B_LBH, C_LBH, marks_LB, dy_LBD, h_BHD = arrays
        x_LBD, dt_LBD, spans_LBD = _tokens(dtype, x_LBD, dt_LBD, marks_LB)
        B_LBH, C_LBH = B_LBH.astype(dtype), C_LBH.astype(dtype)
        real_LB1 = marks_LB[..., None] > 0
        dy_LBD = jnp.where(real_LB1, dy_LBD, 0).astype(dtype)

        def remember(h_BHD, token):
            u_BD, span_BD, B_BH = token
            kept_BHD = decay(span_BD) * h_BHD
            return kept_BHD + u_BD[:, None] * B_BH[..., None], kept_BHD

        def step(carry, token):
            dh_BHD, dA_BHD = carry
            u_BD, span_BD, B_BH, C_BH, dy_BD, kept_BHD = token
            h_BHD = kept_BHD + u_BD[:, None] * B_BH[..., None]
            g_BHD = dh_BHD + dy_BD[:, None] * C_BH[..., None]
            dlog_BHD = kept_BHD * g_BHD
            dB_BH = jnp.einsum("BHD,BD->BH", g_BHD, u_BD)
            dC_BH = jnp.einsum("BHD,BD->BH", h_BHD, dy_BD)
            du_BD = jnp.einsum("BHD,BH->BD", g_BHD, B_BH)
            # A product with ones, as XLA on CPU adds rows up more slowly.
            dspan_BD = jnp.einsum("BHD,H->BD", dlog_BHD * rates_HD, jnp.ones(dlog_BHD.shape[1], dtype))
            return (decay(span_BD) * g_BHD, dA_BHD + dlog_BHD * span_BD[:, None]), (du_BD, dspan_BD, dB_BH, dC_BH)

        u_LBD = dt_LBD * x_LBD
        _, kept_LBHD = jax.lax.scan(remember, h_BHD, (u_LBD, spans_LBD, B_LBH))
        tokens = u_LBD, spans_LBD, B_LBH, C_LBH, dy_LBD, kept_LBHD
        *carry, dD_D = carry
        carry, (du_LBD, dspan_LBD, dB_LBH, dC_LBH) = jax.lax.scan(step, tuple(carry), tokens, reverse=True)
        dD_D += jnp.sum(dy_LBD * x_LBD, axis=(0, 1))
        dx_LBD = du_LBD * dt_LBD + D.astype(dtype) * dy_LBD
        ddt_LBD = du_LBD * x_LBD + jnp.where(real_LB1, dspan_LBD, 0)
        grads = dx_LBD, ddt_LBD, dB_LBH, dC_LBH
        return (*carry, dD_D), [grad.astype(a.dtype) for grad, a in zip(grads, (x, dt, B, C), strict=True)]

    carry = jnp.swapaxes(dlast, 1, 2), jnp.zeros_like(states_CBHD[0]), jnp.zeros(D.shape, dtype)
    arrays = *[_split(a) for a in (x, dt, B, C, marks, dy)], states_CBHD
    (dstate_BHD, dA_BHD, dD_D), grads = jax.lax.scan(chunk, carry, arrays, reverse=True)
    dx, ddt, dB, dC = (_join(grad_CLBD, x.shape[1]) for grad_CLBD in grads)
    dA_DH, dstate_BDH = jnp.sum(dA_BHD, axis=0).T, jnp.swapaxes(dstate_BHD, 1, 2)
    return dx, ddt, dA_DH.astype(A.dtype), dB, dC, dD_D.astype(D.dtype), dstate_BDH


def _tokens(dtype, x_LBD, dt_LBD, marks_LB):
    """Returns x, dt, and dt as decays see it: padding changes nothing, a document's first token forgets everything."""
    real_LB1, first_LB1 = marks_LB[..., None] > 0, marks_LB[..., None] == 2
    x_LBD, dt_LBD = (jnp.where(real_LB1, a, 0).astype(dtype) for a in (x_LBD, dt_LBD))
    return x_LBD, dt_LBD, jnp.where(first_LB1, FOREVER, dt_LBD)


def _split(a_BT):
    """Turns `BT...` into `CLBT...`; zeros, which are padding, fill up the last chunk."""
    L = chunks.length(a_BT.shape[1], CHUNK)
    a_BT = jnp.pad(a_BT, [(0, 0), (0, -a_BT.shape[1] % L), *[(0, 0)] * (a_BT.ndim - 2)])
    a_TB = jnp.moveaxis(a_BT, 1, 0)
    return a_TB.reshape(-1, L, *a_TB.shape[1:])


def _join(a_CLB, num_tokens):
    """Turns `CLB...` back into `BT...`."""
    C, L, *rest = a_CLB.shape
    return jnp.moveaxis(a_CLB.reshape(C * L, *rest)[:num_tokens], 0, 1)
