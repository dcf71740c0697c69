"""The selective scan token by token, in chunks: the states between chunks are kept, those within are computed again.

With a = exp(dt A) and u = dt x, for one channel and row of the state:

    h = a h_old + u B        y = sum_H C h + D x

Backward, from the last token to the first, dh_old being the gradient of the state before a token:

    dh_old = a (dh + C dy)    d(dt A) = h_old dh_old
    dC = sum_D h dy           dB = sum_D (dh + C dy) u    du = sum_H (dh + C dy) B

Each channel and row decays by itself, so there is nothing for a matmul to do. But only the two recurrences have to walk
from token to token; decays and sums are taken for a whole chunk at once. On a CPU that is a handful of loops over
`[L B H D]`, each twice as fast as one that a token starts anew.

Residuals are the inputs and the state before each chunk of `CHUNK` tokens, `states_CBHD`: nothing of size T x D x H is
ever there. M is L + 1: what is before each token, and after the last.
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

    def chunk(carry, arrays):
        h_BHD, h_MBHD = carry
        x_LBD, dt_LBD, spans_LBD, B_LBH, C_LBH, _ = _tokens(dtype, *arrays)
        last_BHD, h_MBHD = _walk(h_BHD, _decays(spans_LBD, rates_HD), dt_LBD * x_LBD, B_LBH, h_MBHD)
        y_LBD = jnp.einsum("MBHD,MBH->MBD", h_MBHD, _after(C_LBH))[1:] + D.astype(dtype) * x_LBD
        return (last_BHD, h_MBHD), (y_LBD.astype(x.dtype), h_BHD)

    T, first_BHD = x.shape[1], jnp.swapaxes(state, 1, 2)
    arrays = [_split(a) for a in (x, dt, B, C, marks)]
    (last_BHD, _), (y_CLBD, states_CBHD) = jax.lax.scan(chunk, (first_BHD, _room(arrays, first_BHD)), arrays)
    return (_join(y_CLBD, T), jnp.swapaxes(last_BHD, 1, 2)), (x, dt, A, B, C, D, marks, states_CBHD)


def backward(residuals, cotangents):
    """Returns the gradients of x, dt, A, B, C, D and state."""
    x, dt, A, B, C, D, marks, states_CBHD = residuals
    dy, dlast = cotangents
    dtype = states_CBHD.dtype
    rates_HD = jnp.minimum(A.astype(dtype), MAX_A).T

    def chunk(carry, arrays):
        dh_BHD, dA_BHD, dD_D, h_MBHD, dh_MBHD = carry
        *arrays, dy_LBD, h_BHD = arrays
        x_LBD, dt_LBD, spans_LBD, B_LBH, C_LBH, real_LB1 = _tokens(dtype, *arrays)
        dy_LBD, u_LBD = jnp.where(real_LB1, dy_LBD, 0).astype(dtype), dt_LBD * x_LBD
        decays_LBHD = _decays(spans_LBD, rates_HD)
        _, h_MBHD = _walk(h_BHD, decays_LBHD, u_LBD, B_LBH, h_MBHD)
        dh_BHD, dh_MBHD = _walk_back(dh_BHD, decays_LBHD, dy_LBD, C_LBH, dh_MBHD)
        dC_LBH = jnp.einsum("MBHD,MBD->MBH", h_MBHD, _after(dy_LBD))[1:]
        dB_LBH = jnp.einsum("MBHD,MBD->MBH", dh_MBHD, _after(u_LBD))[1:]
        dB_LBH += C_LBH * jnp.sum(u_LBD * dy_LBD, axis=-1, keepdims=True)
        du_LBD = jnp.einsum("MBHD,MBH->MBD", dh_MBHD, _after(B_LBH))[1:]
        du_LBD += dy_LBD * jnp.sum(B_LBH * C_LBH, axis=-1, keepdims=True)
        # Times A from here on: dA, a sum of it over tokens, is divided by A in the end.
        dlogs_LBHD = jax.lax.optimization_barrier(h_MBHD[:-1] * dh_MBHD[:-1] * rates_HD)
        # A product with ones, as XLA on CPU adds rows up more slowly.
        dspans_LBD = jnp.einsum("LBHD,LBH->LBD", dlogs_LBHD, jnp.ones_like(B_LBH))
        add = lambda l, sum_BHD: sum_BHD + _at(dlogs_LBHD, l) * _at(spans_LBD, l)[:, None]
        dA_BHD = jax.lax.fori_loop(0, len(spans_LBD), add, dA_BHD)
        dD_D += jnp.sum(dy_LBD * x_LBD, axis=(0, 1))
        dx_LBD = du_LBD * dt_LBD + D.astype(dtype) * dy_LBD
        ddt_LBD = du_LBD * x_LBD + jnp.where(real_LB1, dspans_LBD, 0)
        grads = dx_LBD, ddt_LBD, dB_LBH, dC_LBH
        grads = [grad.astype(a.dtype) for grad, a in zip(grads, (x, dt, B, C), strict=True)]
        return (dh_BHD, dA_BHD, dD_D, h_MBHD, dh_MBHD), grads

    arrays = *[_split(a) for a in (x, dt, B, C, marks, dy)], states_CBHD
    dlast_BHD = jnp.swapaxes(dlast, 1, 2)
    room_MBHD = _room(arrays, dlast_BHD)
    carry = dlast_BHD, jnp.zeros_like(dlast_BHD), jnp.zeros(D.shape, dtype), room_MBHD, room_MBHD
    (dstate_BHD, dA_BHD, dD_D, _, _), grads = jax.lax.scan(chunk, carry, arrays, reverse=True)
    dx, ddt, dB, dC = (_join(grad_CLBD, x.shape[1]) for grad_CLBD in grads)
    dA_DH, dstate_BDH = (jnp.sum(dA_BHD, axis=0) / rates_HD).T, jnp.swapaxes(dstate_BHD, 1, 2)
    return dx, ddt, dA_DH.astype(A.dtype), dB, dC, dD_D.astype(D.dtype), dstate_BDH


def _decays(spans_LBD, rates_HD):
    return jnp.exp(spans_LBD[:, :, None] * rates_HD)


def _walk(h_BHD, decays_LBHD, u_LBD, B_LBH, room_MBHD):
    """Returns the last state, and all of them in the place of `room`."""

    def step(l, carry):
        h_BHD, h_MBHD = carry
        h_BHD = _at(decays_LBHD, l) * h_BHD + _at(u_LBD, l)[:, None] * _at(B_LBH, l)[..., None]
        return h_BHD, _put(h_MBHD, l + 1, h_BHD)

    return jax.lax.fori_loop(0, len(u_LBD), step, (h_BHD, _put(room_MBHD, 0, h_BHD)))


def _walk_back(dh_BHD, decays_LBHD, dy_LBD, C_LBH, room_MBHD):
    """Returns the gradient of the first state, and those of all of them in the place of `room`."""
    L = len(dy_LBD)

    def step(i, carry):
        (dh_BHD, dh_MBHD), l = carry, L - 1 - i
        dh_BHD = _at(decays_LBHD, l) * (dh_BHD + _at(dy_LBD, l)[:, None] * _at(C_LBH, l)[..., None])
        return dh_BHD, _put(dh_MBHD, l, dh_BHD)

    return jax.lax.fori_loop(0, L, step, (dh_BHD, _put(room_MBHD, L, dh_BHD)))


def _room(arrays, h_BHD):
    """Returns an array for the states of a chunk, which is handed on: a new one for each would be filled with zeros."""
    return jnp.empty((arrays[0].shape[1] + 1, *h_BHD.shape), h_BHD.dtype)


def _after(a_LB):
    """Moves what belongs to the state after each token to the place of that state: turns L into M."""
    return jnp.pad(a_LB, [(1, 0), *[(0, 0)] * (a_LB.ndim - 1)])


def _at(a_L, l):
    return jax.lax.dynamic_index_in_dim(a_L, l, axis=0, keepdims=False)


def _put(a_L, l, a):
    return jax.lax.dynamic_update_index_in_dim(a_L, a, l, axis=0)


def _tokens(dtype, x_LBD, dt_LBD, B_LBH, C_LBH, marks_LB):
    """Returns x, dt, dt as decays see it, B, C, and which tokens are no padding.

    Padding changes nothing, a document's first token forgets everything.
    """
    real_LB1, first_LB1 = marks_LB[..., None] > 0, marks_LB[..., None] == 2
    x_LBD, dt_LBD = (jnp.where(real_LB1, a, 0).astype(dtype) for a in (x_LBD, dt_LBD))
    spans_LBD = jnp.where(first_LB1, FOREVER, dt_LBD)
    return x_LBD, dt_LBD, spans_LBD, B_LBH.astype(dtype), C_LBH.astype(dtype), real_LB1


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
