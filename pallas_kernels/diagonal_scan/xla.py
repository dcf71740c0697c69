"""The diagonal scan in XLA. Its own outputs are what it keeps for the backward pass.

With h the states, and u what comes back to a state from the tokens after it,

    h' = a h + x        dx = u' + dh        u = a dx        da = dx h

so that backward is a walk like the other, from the other end. On a CPU the tokens are walked in turn. Where thousands
of lanes wait for work, all chunks walk at once, position by position: first for what each makes of the state that comes
to it, `keep * state + write`, then, once the states at their borders are known, for the outputs.

Padding hands a state on, so that h, before padding is cleared, holds what comes to each token.
"""

import jax
import jax.numpy as jnp

CHUNK = 128
IN_TURN = ("cpu",)  # platforms


def forward(keep, reverse, a, x, state_BW, marks_BT):
    """Returns (h, state) and what is kept. a is `[B T W]` or `[W]`, x `[B T W]`; marks are `documents.marks`."""
    del keep

    def step(a_BW, state_BW, x_BW):
        state_BW = a_BW * state_BW + x_BW
        return state_BW, state_BW

    h_BTW, last_BW = _scan(step, reverse, a, x, state_BW, marks_BT, x.dtype)
    return (jnp.where(marks_BT[..., None] > 0, h_BTW, 0), last_BW), (h_BTW,)


def backward(reverse, residuals, cotangents):
    """Returns the gradients of a, x and state."""
    a, x, state_BW, marks_BT, h_BTW = residuals
    dh, dlast_BW = cotangents

    def step(a_BW, u_BW, dh_BW):
        dx_BW = jax.lax.optimization_barrier(u_BW + dh_BW)
        return a_BW * dx_BW, dx_BW

    dx_BTW, dstate_BW = _scan(step, not reverse, a, dh, dlast_BW, marks_BT, dlast_BW.dtype)
    first_B1W = state_BW[:, None].astype(h_BTW.dtype)
    before_BTW = [h_BTW[:, 1:], first_B1W] if reverse else [first_B1W, h_BTW[:, :-1]]
    da = jnp.where(marks_BT[..., None] == 1, dx_BTW * jnp.concatenate(before_BTW, axis=1), 0)
    if a.ndim == 1:
        da = jnp.sum(da, axis=(0, 1))
    return da.astype(a.dtype), jnp.where(marks_BT[..., None] > 0, dx_BTW, 0).astype(x.dtype), dstate_BW


def _scan(step, reverse, a, x_BTW, state_BW, marks_BT, dtype):
    """Returns the outputs of `state, output = step(a, state, x)`, in this dtype, and the state after the last token.

    The state after a token is a times the one before it, and something of x.
    """

    def in_turn(a, x_BTW, state_BW, marks_BT):
        return _walk(step, reverse, a, x_BTW, state_BW, marks_BT, dtype)

    def at_once(a, x_BTW, state_BW, marks_BT):
        T = x_BTW.shape[1]
        arrays = (_split(a) if a.ndim > 1 else a), _split(x_BTW), _split(marks_BT)
        states_RW, last_BW = _borders(step, reverse, *arrays, state_BW)
        a, x_RLW, marks_RL = arrays
        y_RLW, _ = _walk(step, reverse, a, x_RLW, states_RW, marks_RL, dtype)
        return y_RLW.reshape(x_BTW.shape[0], -1, x_BTW.shape[2])[:, :T], last_BW

    branches = {platform: in_turn for platform in IN_TURN}
    return jax.lax.platform_dependent(a, x_BTW, state_BW, marks_BT, **branches, default=at_once)


def _walk(step, reverse, a, x_BTW, state_BW, marks_BT, dtype):
    def body(t, carry):
        state_BW, y_BTW = carry
        a_BW, x_BW = _token(a, y_BTW, marks_BT, t, state_BW.dtype)
        x_BW = jax.lax.optimization_barrier(x_BW)
        state_BW, y_BW = step(a_BW, state_BW, x_BW)
        return state_BW, jax.lax.dynamic_update_index_in_dim(y_BTW, y_BW.astype(dtype), t, axis=1)

    # Outputs take the place of inputs as they are read.
    state_BW, y_BTW = _loop(x_BTW.shape[1], reverse, body, (state_BW, x_BTW.astype(dtype)))
    return y_BTW, state_BW


def _borders(step, reverse, a, x_RLW, marks_RL, state_BW):
    """Returns the states as they come to each chunk, and the last one."""
    R, L, W = x_RLW.shape
    B, dtype = state_BW.shape[0], state_BW.dtype

    def summarise(l, carry):
        keep_RW, write_RW = carry
        a_RW, x_RW = _token(a, x_RLW, marks_RL, l, dtype)
        return a_RW * keep_RW, step(a_RW, write_RW, x_RW)[0]

    def border(state_BW, chunk):
        keep_BW, write_BW = chunk
        return keep_BW * state_BW + write_BW, state_BW

    chunks = _loop(L, reverse, summarise, (jnp.ones((R, W), dtype), jnp.zeros((R, W), dtype)))
    last_BW, states_CBW = jax.lax.scan(
        border, state_BW, tuple(z_RW.reshape(B, -1, W).swapaxes(0, 1) for z_RW in chunks), reverse=reverse
    )
    return states_CBW.swapaxes(0, 1).reshape(R, W), last_BW


def _token(a, x_BTW, marks_BT, t, dtype):
    """Returns what token t leaves of the state that comes to it, and what it adds: padding all and nothing."""
    at = lambda z: jax.lax.dynamic_index_in_dim(z, t, axis=1, keepdims=False)
    mark_B1 = at(marks_BT)[:, None]
    a_BW = (a if a.ndim == 1 else at(a)).astype(dtype)
    a_BW = jnp.where(mark_B1 == 1, a_BW, jnp.where(mark_B1 == 0, 1, 0).astype(dtype))
    return a_BW, jnp.where(mark_B1 > 0, at(x_BTW), 0).astype(dtype)


def _loop(length, reverse, step, carry):
    return jax.lax.fori_loop(0, length, lambda i, carry: step(length - 1 - i if reverse else i, carry), carry)


def _split(x_BT):
    """Makes rows of chunks; filled up with zeros, which as marks say padding."""
    T, *width = x_BT.shape[1:]
    x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % CHUNK), *[(0, 0)] * len(width)))
    return x_BT.reshape(-1, CHUNK, *width)
