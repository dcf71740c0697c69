"""The selective scan token by token, in chunks: the states between chunks are kept, those within are computed again.

With a = exp(dt A) and u = dt x, for one channel and row of the state:

    h = a h_old + u B        y = sum_H C h + D x

Backward, from the last token to the first, dh_old being the gradient of the state before a token:

    dh_old = a (dh + C dy)    d(dt A) = h_old dh_old
    dC = sum_D h dy           dB = sum_D (dh + C dy) u    du = sum_H (dh + C dy) B

Each channel and row decays by itself, so there is nothing for a matmul to do. The exponentials are taken for a whole
chunk at once. On a CPU all else happens token by token, while the states of one, 16 KB for 256 channels, are in its
first cache; sums over rows and over channels are products with vectors there, which XLA does several times as fast as
its own sums. Elsewhere each operation in a loop has to be started, and only the two recurrences walk.

Kept are the inputs and the state before each chunk of `CHUNK` tokens, `states_CBHD`: nothing of size T x D x H is ever
there.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common import chunks

CHUNK = 128
IN_TURN = ("cpu",)  # platforms
# A step that forgets everything, as a document's first token has to: exp(FOREVER * A) is 0 for every A up to MAX_A.
FOREVER, MAX_A = 1e30, -1e-20


def forward(keep, _, x, dt, A, B, C, D, state, marks):
    """Returns (y, state) and what is kept.

    `marks_BT`: 0 is padding, 2 a document's first token where the state before it is another's, 1 all the others.
    B and C are zero at padding, and so is y; x and dt may be anything there.
    """
    del keep
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rates_HD = jnp.minimum(A.astype(dtype), MAX_A).T
    outputs = _choose(_outputs_in_turn, _outputs_at_once)

    def chunk(h_BHD, arrays):
        x_LBD, dt_LBD, spans_LBD, B_LBH, C_LBH, _ = _tokens(dtype, *arrays)
        last_BHD, y_LBD = outputs(rates_HD, h_BHD, spans_LBD, dt_LBD * x_LBD, B_LBH, C_LBH)
        return last_BHD, ((y_LBD + D.astype(dtype) * x_LBD).astype(x.dtype), h_BHD)

    arrays = [_split(a) for a in (x, dt, B, C, marks)]
    last_BHD, (y_CLBD, states_CBHD) = jax.lax.scan(chunk, jnp.swapaxes(state, 1, 2), arrays)
    return (_join(y_CLBD, x.shape[1]), jnp.swapaxes(last_BHD, 1, 2)), (states_CBHD,)


def backward(_, residuals, cotangents):
    """Returns the gradients of x, dt, A, B, C, D and state."""
    x, dt, A, B, C, D, _, marks, states_CBHD = residuals
    dy, dlast = cotangents
    dtype = states_CBHD.dtype
    rates_HD = jnp.minimum(A.astype(dtype), MAX_A).T
    gradients = _choose(_gradients_in_turn, _gradients_at_once)

    def chunk(carry, arrays):
        room_MHD, dh_BHD, dA_BHD, dD_D = carry
        *arrays, dy_LBD, h_BHD = arrays
        x_LBD, dt_LBD, spans_LBD, B_LBH, C_LBH, real_LB1 = _tokens(dtype, *arrays)
        dy_LBD, u_LBD = jnp.where(real_LB1, dy_LBD, 0).astype(dtype), dt_LBD * x_LBD
        room_MHD, dh_BHD, dA_BHD, du_LBD, dspans_LBD, dB_LBH, dC_LBH = gradients(
            rates_HD, room_MHD, dh_BHD, dA_BHD, h_BHD, spans_LBD, u_LBD, B_LBH, C_LBH, dy_LBD
        )
        dD_D += jnp.sum(dy_LBD * x_LBD, axis=(0, 1))
        dx_LBD = du_LBD * dt_LBD + D.astype(dtype) * dy_LBD
        ddt_LBD = du_LBD * x_LBD + jnp.where(real_LB1, dspans_LBD, 0)
        grads = dx_LBD, ddt_LBD, dB_LBH, dC_LBH
        grads = [grad.astype(a.dtype) for grad, a in zip(grads, (x, dt, B, C), strict=True)]
        return (room_MHD, dh_BHD, dA_BHD, dD_D), grads

    arrays = *[_split(a) for a in (x, dt, B, C, marks, dy)], states_CBHD
    dlast_BHD = jnp.swapaxes(dlast, 1, 2)
    # What the states of a chunk are written into is handed on: a new array for each would be filled with zeros.
    room_MHD = jnp.empty((arrays[0].shape[1] + 1, *rates_HD.shape), dtype)
    carry = room_MHD, dlast_BHD, jnp.zeros_like(dlast_BHD), jnp.zeros(D.shape, dtype)
    (_, dstate_BHD, dA_BHD, dD_D), grads = jax.lax.scan(chunk, carry, arrays, reverse=True)
    dx, ddt, dB, dC = (_join(grad_CLBD, x.shape[1]) for grad_CLBD in grads)
    dA_DH, dstate_BDH = (jnp.sum(dA_BHD, axis=0) / rates_HD).T, jnp.swapaxes(dstate_BHD, 1, 2)
    return dx, ddt, dA_DH.astype(A.dtype), dB, dC, dD_D.astype(D.dtype), dstate_BDH


def _outputs_in_turn(rates_HD, h_BHD, *arrays_LB):
    """Returns the states after the last token, and sum_H C h of each token, row by row."""

    def row(_, arrays):
        h_HD, spans_LD, u_LD, B_LH, C_LH = arrays
        decays_LHD = _decays(spans_LD, rates_HD)

        def step(l, carry):
            h_HD, y_LD = carry
            h_HD = jax.lax.optimization_barrier(_after(l, h_HD, decays_LHD, u_LD, B_LH))
            return h_HD, _put(y_LD, l, _at(C_LH, l) @ h_HD)

        return None, jax.lax.fori_loop(0, len(u_LD), step, (h_HD, jnp.empty_like(u_LD)))

    _, (last_BHD, y_BLD) = jax.lax.scan(row, None, (h_BHD, *_swap(arrays_LB)))
    return last_BHD, *_swap([y_BLD])


def _outputs_at_once(rates_HD, h_BHD, spans_LBD, u_LBD, B_LBH, C_LBH):
    last_BHD, h_LBHD = _states(h_BHD, _decays(spans_LBD, rates_HD), u_LBD, B_LBH)
    return last_BHD, jnp.einsum("LBHD,LBH->LBD", h_LBHD, C_LBH)


def _gradients_in_turn(rates_HD, room_MHD, dh_BHD, dA_BHD, h_BHD, *arrays_LB):
    """Returns the room; the gradients of the first state, and of A, times A, with what came; of u, dt A, B and C."""

    def row(room_MHD, arrays):
        dh_HD, dA_HD, h_HD, spans_LD, u_LD, B_LH, C_LH, dy_LD = arrays
        L = len(u_LD)
        decays_MHD = _decays(jnp.pad(spans_LD, ((0, 1), (0, 0))), rates_HD)  # Nothing decays after the last.

        def again(l, carry):
            h_HD, states_MHD, dC_LH = carry
            h_HD = jax.lax.optimization_barrier(_after(l, h_HD, decays_MHD, u_LD, B_LH))
            return h_HD, _put(states_MHD, l + 1, h_HD * rates_HD), _put(dC_LH, l, h_HD @ _at(dy_LD, l))

        def step(i, carry):
            dh_HD, dA_HD, du_LD, dspans_LD, dB_LH = carry
            l = L - 1 - i
            dh_HD = _at(decays_MHD, l + 1) * dh_HD + _at(C_LH, l)[:, None] * _at(dy_LD, l)
            dh_HD = jax.lax.optimization_barrier(dh_HD)  # Else fusion computes it several times.
            du_LD = _put(du_LD, l, _at(B_LH, l) @ dh_HD)
            dB_LH = _put(dB_LH, l, dh_HD @ _at(u_LD, l))
            dlogs_HD = jax.lax.optimization_barrier(_at(states_MHD, l) * _at(decays_MHD, l) * dh_HD)
            dspans_LD = _put(dspans_LD, l, jnp.ones_like(B_LH[0]) @ dlogs_HD)
            return dh_HD, dA_HD + dlogs_HD * _at(spans_LD, l), du_LD, dspans_LD, dB_LH

        rooms = jnp.empty_like(u_LD), jnp.empty_like(u_LD), jnp.empty_like(B_LH)
        states_MHD = _put(room_MHD, 0, h_HD * rates_HD)
        _, states_MHD, dC_LH = jax.lax.fori_loop(0, L, again, (h_HD, states_MHD, rooms[-1]))
        dh_HD, *grads = jax.lax.fori_loop(0, L, step, (dh_HD, dA_HD, *rooms))
        return states_MHD, (decays_MHD[0] * dh_HD, *grads, dC_LH)

    rows = dh_BHD, dA_BHD, h_BHD, *_swap(arrays_LB)
    room_MHD, (dh_BHD, dA_BHD, *grads) = jax.lax.scan(row, room_MHD, rows)
    return room_MHD, dh_BHD, dA_BHD, *_swap(grads)


def _gradients_at_once(rates_HD, room_MHD, dh_BHD, dA_BHD, h_BHD, spans_LBD, u_LBD, B_LBH, C_LBH, dy_LBD):
    decays_LBHD, L = _decays(spans_LBD, rates_HD), len(u_LBD)

    def step(i, carry):
        (dh_BHD, dh_LBHD), l = carry, L - 1 - i
        dh_BHD += _at(C_LBH, l)[..., None] * _at(dy_LBD, l)[:, None]
        return _at(decays_LBHD, l) * dh_BHD, _put(dh_LBHD, l, dh_BHD)

    _, h_LBHD = _states(h_BHD, decays_LBHD, u_LBD, B_LBH)
    dh_BHD, dh_LBHD = jax.lax.fori_loop(0, L, step, (dh_BHD, jnp.empty_like(decays_LBHD)))
    before_LBHD = jnp.concatenate([h_BHD[None], h_LBHD[:-1]])
    dlogs_LBHD = before_LBHD * decays_LBHD * dh_LBHD * rates_HD
    dA_BHD += jnp.sum(dlogs_LBHD * spans_LBD[:, :, None], axis=0)
    du_LBD = jnp.einsum("LBHD,LBH->LBD", dh_LBHD, B_LBH)
    dB_LBH = jnp.einsum("LBHD,LBD->LBH", dh_LBHD, u_LBD)
    dC_LBH = jnp.einsum("LBHD,LBD->LBH", h_LBHD, dy_LBD)
    return room_MHD, dh_BHD, dA_BHD, du_LBD, jnp.sum(dlogs_LBHD, axis=2), dB_LBH, dC_LBH


def _states(h_BHD, decays_LBHD, u_LBD, B_LBH):
    """Returns the state after the last token, and those after all of them."""

    def step(l, carry):
        h_BHD, h_LBHD = carry
        h_BHD = _after(l, h_BHD, decays_LBHD, u_LBD, B_LBH)
        return h_BHD, _put(h_LBHD, l, h_BHD)

    return jax.lax.fori_loop(0, len(u_LBD), step, (h_BHD, jnp.empty_like(decays_LBHD)))


def _decays(spans_LBD, rates_HD):
    return jnp.exp(spans_LBD[..., None, :] * rates_HD)


def _after(l, h_BHD, decays_LBHD, u_LBD, B_LBH):
    """Returns the state after token l, of one row or of all."""
    return _at(decays_LBHD, l) * h_BHD + _at(B_LBH, l)[..., None] * _at(u_LBD, l)[..., None, :]


def _swap(arrays):
    """Turns `LB...` into `BL...`, and back."""
    return [jnp.swapaxes(a, 0, 1) for a in arrays]


def _choose(in_turn, at_once):
    branches = {platform: in_turn for platform in IN_TURN}
    return lambda *args: jax.lax.platform_dependent(*args, **branches, default=at_once)


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
