"""The diagonal scan in chunks of tokens, which keep the state that comes to them and compute the others again.

With h the states, and u what comes back to a state from the tokens after it,

    h' = a h + x        u = a (u' + dh)        dx = u' + dh        da = (u' + dh) h

so that backward is the same walk from the other end. On a CPU the chunks are walked in turn, each within its caches.
Where thousands of lanes wait for work, all chunks walk at once, position by position: first for what each makes of the
state that comes to it, `keep * state + write`, then, once the states at their borders are known, for the outputs.

Residuals are the inputs and the state before each chunk of `CHUNK` tokens, `states_CBW`.
"""

import jax
import jax.numpy as jnp

CHUNK = 128
IN_TURN = ("cpu",)  # platforms


def forward(reverse, a, x, marks_BT, state_BW):
    """Returns (h, state) and residuals. a is `[B T W]` or `[W]`, x `[B T W]`, marks are those of `documents.marks`."""

    def in_turn(a, x_BCLW, marks_BCL, state_BW):
        C, L = x_BCLW.shape[1:3]
        a, x_BTW, marks_BT = _flat(a), _flat(x_BCLW), _flat(marks_BCL)

        def chunk(c, carry):
            state_BW, h_BTW, states_CBW = carry
            states_CBW = jax.lax.dynamic_update_index_in_dim(states_CBW, state_BW, c, axis=0)

            def step(l, carry):
                state_BW, h_BTW = carry
                t = c * L + l
                a_BW, real_B1, _ = _token(a, marks_BT, t, state_BW.dtype)
                state_BW = a_BW * state_BW + jnp.where(real_B1, _at(x_BTW, t), 0)
                return state_BW, _put(h_BTW, t, jnp.where(real_B1, state_BW, 0).astype(x_BTW.dtype))

            state_BW, h_BTW = _walk(L, reverse, step, (state_BW, h_BTW))
            return state_BW, h_BTW, states_CBW

        carry = state_BW, jnp.empty_like(x_BTW), jnp.empty((C, *state_BW.shape), state_BW.dtype)
        state_BW, h_BTW, states_CBW = _walk(C, reverse, chunk, carry)
        return h_BTW.reshape(x_BCLW.shape), states_CBW, state_BW

    def at_once(a, x_BCLW, marks_BCL, state_BW):
        rows = _rows(a), _rows(x_BCLW), _rows(marks_BCL)
        states_CBW, last_BW = _borders(reverse, *rows, state_BW)
        h_RLW, _ = _forward(reverse, *rows, _rows(states_CBW.swapaxes(0, 1)))
        return h_RLW.reshape(x_BCLW.shape), states_CBW, last_BW

    chunks = _split(a) if a.ndim > 1 else a, _split(x), _split(marks_BT)
    h_BCLW, states_CBW, last_BW = _choose(in_turn, at_once)(*chunks, state_BW)
    return (_join(h_BCLW, x.shape[1]), last_BW), (a, x, marks_BT, states_CBW)


def backward(reverse, residuals, cotangents):
    """Returns the gradients of a, x and state."""
    a, x, marks_BT, states_CBW = residuals
    dh, dlast_BW = cotangents
    per_token = a.ndim > 1

    def in_turn(a, x_BCLW, marks_BCL, dh_BCLW, states_CBW, dlast_BW):
        B, C, L, W = x_BCLW.shape
        dtype = dlast_BW.dtype
        a, x_BTW, marks_BT, dh_BTW = _flat(a), _flat(x_BCLW), _flat(marks_BCL), _flat(dh_BCLW)

        def chunk(c, carry):
            def again(l, carry):
                state_BW, before_BLW = carry
                a_BW, real_B1, _ = _token(a, marks_BT, c * L + l, dtype)
                before_BLW = _put(before_BLW, l, state_BW)
                return a_BW * state_BW + jnp.where(real_B1, _at(x_BTW, c * L + l), 0), before_BLW

            def step(l, carry):
                u_BW, da, dx_BTW = carry
                t = c * L + l
                a_BW, real_B1, reads_B1 = _token(a, marks_BT, t, dtype)
                dx_BW = u_BW + jnp.where(real_B1, _at(dh_BTW, t), 0)
                da_BW = jnp.where(reads_B1, dx_BW * _at(before_BLW, l), 0)
                da = _put(da, t, da_BW) if per_token else da + da_BW
                return a_BW * dx_BW, da, _put(dx_BTW, t, jnp.where(real_B1, dx_BW, 0).astype(x_BTW.dtype))

            _, before_BLW = _walk(L, reverse, again, (states_CBW[c], jnp.empty((B, L, W), dtype)))
            return _walk(L, not reverse, step, carry)

        da = jnp.empty(x_BTW.shape, dtype) if per_token else jnp.zeros_like(dlast_BW)
        dstate_BW, da, dx_BTW = _walk(C, not reverse, chunk, (dlast_BW, da, jnp.empty_like(x_BTW)))
        da = da.reshape(x_BCLW.shape) if per_token else jnp.sum(da, axis=0)
        return da, dx_BTW.reshape(x_BCLW.shape), dstate_BW

    def at_once(a, x_BCLW, marks_BCL, dh_BCLW, states_CBW, dlast_BW):
        a, x_RLW, marks_RL, dh_RLW = (_rows(z) for z in (a, x_BCLW, marks_BCL, dh_BCLW))
        adh_RLW = jnp.where(marks_RL[..., None] == 1, a.astype(dlast_BW.dtype) * dh_RLW, 0)
        us_CBW, dstate_BW = _borders(not reverse, a, adh_RLW, marks_RL, dlast_BW)
        borders = (_rows(z_CBW.swapaxes(0, 1)) for z_CBW in (states_CBW, us_CBW))
        da, dx_RLW, _ = _backward(reverse, a, x_RLW, marks_RL, dh_RLW, *borders)
        da = da.reshape(x_BCLW.shape) if per_token else jnp.sum(da, axis=0)
        return da, dx_RLW.reshape(x_BCLW.shape), dstate_BW

    chunks = _split(a) if per_token else a, _split(x), _split(marks_BT), _split(dh)
    da, dx_BCLW, dstate_BW = _choose(in_turn, at_once)(*chunks, states_CBW, dlast_BW)
    da = _join(da, x.shape[1]) if per_token else da
    return da.astype(a.dtype), _join(dx_BCLW, x.shape[1]), dstate_BW


def _forward(reverse, a, x_RLW, marks_RL, state_RW):
    """Returns the outputs of one chunk of each row, and the state after it."""

    def step(l, carry):
        state_RW, h_RLW = carry
        a_RW, real_R1, _ = _token(a, marks_RL, l, state_RW.dtype)
        state_RW = a_RW * state_RW + jnp.where(real_R1, _at(x_RLW, l), 0)
        return state_RW, _put(h_RLW, l, jnp.where(real_R1, state_RW, 0).astype(x_RLW.dtype))

    state_RW, h_RLW = _walk(x_RLW.shape[1], reverse, step, (state_RW, jnp.empty_like(x_RLW)))
    return h_RLW, state_RW


def _backward(reverse, a, x_RLW, marks_RL, dh_RLW, state_RW, u_RW):
    """Returns the gradients of a (summed over tokens where it is the same for all), x and the state before."""
    L, dtype = x_RLW.shape[1], state_RW.dtype

    def again(l, carry):
        state_RW, before_RLW = carry
        a_RW, real_R1, _ = _token(a, marks_RL, l, dtype)
        before_RLW = _put(before_RLW, l, state_RW)
        return a_RW * state_RW + jnp.where(real_R1, _at(x_RLW, l), 0), before_RLW

    _, before_RLW = _walk(L, reverse, again, (state_RW, jnp.empty(x_RLW.shape, dtype)))

    def step(l, carry):
        u_RW, dx_RLW, da = carry
        a_RW, real_R1, reads_R1 = _token(a, marks_RL, l, dtype)
        dx_RW = u_RW + jnp.where(real_R1, _at(dh_RLW, l), 0)
        da_RW = jnp.where(reads_R1, dx_RW * _at(before_RLW if a.ndim == 1 else da, l), 0)
        da = da + da_RW if a.ndim == 1 else _put(da, l, da_RW)
        return a_RW * dx_RW, _put(dx_RLW, l, jnp.where(real_R1, dx_RW, 0).astype(x_RLW.dtype)), da

    # The gradient of a takes the place of the states, once they are read: one array less.
    da = jnp.zeros_like(state_RW) if a.ndim == 1 else before_RLW
    u_RW, dx_RLW, da = _walk(L, not reverse, step, (u_RW, jnp.empty_like(x_RLW), da))
    return da, dx_RLW, u_RW


def _borders(reverse, a, x_RLW, marks_RL, state_BW):
    """Returns the states as they come to each chunk, and the last one."""
    R, L, W = x_RLW.shape
    B, dtype = state_BW.shape[0], state_BW.dtype

    def summarise(l, carry):
        keep_RW, write_RW = carry
        a_RW, real_R1, _ = _token(a, marks_RL, l, dtype)
        return a_RW * keep_RW, a_RW * write_RW + jnp.where(real_R1, _at(x_RLW, l), 0)

    def step(state_BW, chunk):
        keep_BW, write_BW = chunk
        return keep_BW * state_BW + write_BW, state_BW

    chunks = _walk(L, reverse, summarise, (jnp.ones((R, W), dtype), jnp.zeros((R, W), dtype)))
    last_BW, states_CBW = jax.lax.scan(
        step, state_BW, tuple(z_RW.reshape(B, -1, W).swapaxes(0, 1) for z_RW in chunks), reverse=reverse
    )
    return states_CBW, last_BW


def _token(a, marks_RL, l, dtype):
    """Returns what token l leaves of the state that comes to it, whether it is no padding, and whether it reads."""
    mark_R1 = _at(marks_RL, l)[:, None]
    a = (a if a.ndim == 1 else _at(a, l)).astype(dtype)
    return jnp.where(mark_R1 == 1, a, jnp.where(mark_R1 == 0, 1, 0).astype(dtype)), mark_R1 > 0, mark_R1 == 1


def _choose(in_turn, at_once):
    branches = {platform: in_turn for platform in IN_TURN}
    return lambda *args: jax.lax.platform_dependent(*args, **branches, default=at_once)


def _walk(length, reverse, step, carry):
    return jax.lax.fori_loop(0, length, lambda i, carry: step(length - 1 - i if reverse else i, carry), carry)


def _split(x_BT):
    """Cuts rows into chunks; filled up with zeros, which as marks say padding."""
    B, T, *width = x_BT.shape
    return jnp.pad(x_BT, ((0, 0), (0, -T % CHUNK), *[(0, 0)] * len(width))).reshape(B, -1, CHUNK, *width)


def _join(x_BCLW, num_tokens):
    B, C, L, W = x_BCLW.shape
    return x_BCLW.reshape(B, C * L, W)[:, :num_tokens]


def _flat(x_BC):
    """Makes one row of its chunks again."""
    return x_BC if x_BC.ndim == 1 else x_BC.reshape(x_BC.shape[0], -1, *x_BC.shape[3:])


def _rows(x_BC):
    """Makes rows of chunks."""
    return x_BC if x_BC.ndim == 1 else x_BC.reshape(-1, *x_BC.shape[2:])


def _at(x_BT, t):
    return jax.lax.dynamic_index_in_dim(x_BT, t, axis=1, keepdims=False)


def _put(x_BT, t, x_B):
    return jax.lax.dynamic_update_index_in_dim(x_BT, x_B, t, axis=1)
