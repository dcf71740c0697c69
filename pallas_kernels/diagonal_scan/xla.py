"""The diagonal scan in XLA. Its own outputs are what it keeps for the backward pass.

With h the states, and the decays of the token after it,

    h = a h_old + x        dx = a_next dx_next + dh        da = dx h_old

so that backward is the same walk from the other end. On a CPU the tokens are walked in turn. Where thousands of lanes
wait for work, all chunks walk at once, position by position: first for what each makes of the state that comes to it,
`keep * state + write`, then, once the states at their borders are known, for the outputs.

Padding hands a state on, so that h, before padding is cleared, holds what comes to each token.
"""

import jax
import jax.numpy as jnp

CHUNK = 128
IN_TURN = ("cpu",)  # platforms


def forward(keep, reverse, a, x, state_BW, marks_BT):
    """Returns (h, state) and what is kept. a is `[B T W]` or `[W]`, x `[B T W]`; marks are `documents.marks`."""
    del keep
    h_BTW, last_BW = _scan(reverse, a, marks_BT, _clear(x, marks_BT), state_BW)
    return (_clear(h_BTW, marks_BT), last_BW), (h_BTW,)


def backward(reverse, residuals, cotangents):
    """Returns the gradients of a, x and state."""
    a, x, state_BW, marks_BT, h_BTW = residuals
    dh, dlast_BW = cotangents
    # The last token's gradient is what comes back to the state after it, as if padding came then.
    next_a = _shift(not reverse, a, a[:, :1]) if a.ndim > 1 else a
    next_marks_BT = _shift(not reverse, marks_BT, jnp.zeros_like(marks_BT[:, :1]))
    dx_BTW, dfirst_BW = _scan(not reverse, next_a, next_marks_BT, _clear(dh, marks_BT).astype(dlast_BW.dtype), dlast_BW)
    first = -1 if reverse else 0
    dstate_BW = _keep(a if a.ndim == 1 else a[:, first], marks_BT[:, first], dlast_BW.dtype) * dfirst_BW
    before_BTW = _shift(reverse, h_BTW, state_BW[:, None].astype(h_BTW.dtype))
    da = jnp.where(marks_BT[..., None] == 1, dx_BTW * before_BTW, 0)
    if a.ndim == 1:
        da = jnp.sum(da, axis=(0, 1))
    return da.astype(a.dtype), _clear(dx_BTW, marks_BT).astype(x.dtype), dstate_BW


def _scan(reverse, a, marks_BT, x_BTW, state_BW):
    """Returns the states after all tokens, in the dtype of x, and after the last one."""

    def in_turn(a, marks_BT, x_BTW, state_BW):
        # Caches expect that what follows is read next: a walk from the end takes three times as long.
        turn = lambda z: jnp.flip(z, axis=1) if reverse and z.ndim > 1 else z
        h_BTW, last_BW = _walk(False, turn(a), turn(marks_BT), turn(x_BTW), state_BW)
        return turn(h_BTW), last_BW

    def at_once(a, marks_BT, x_BTW, state_BW):
        B, T, W = x_BTW.shape
        chunks = _split(a) if a.ndim > 1 else a, _split(marks_BT), _split(x_BTW)
        states_RW, last_BW = _borders(reverse, *chunks, state_BW)
        h_RLW, _ = _walk(reverse, *chunks, states_RW)
        return h_RLW.reshape(B, -1, W)[:, :T], last_BW

    branches = {platform: in_turn for platform in IN_TURN}
    return jax.lax.platform_dependent(a, marks_BT, x_BTW, state_BW, **branches, default=at_once)


def _walk(reverse, a, marks_BT, x_BTW, state_BW):
    def step(t, carry):
        state_BW, h_BTW = carry
        a_BW, x_BW = _token(a, marks_BT, h_BTW, t, state_BW.dtype)
        state_BW = a_BW * state_BW + jax.lax.optimization_barrier(x_BW)
        return state_BW, jax.lax.dynamic_update_index_in_dim(h_BTW, state_BW.astype(h_BTW.dtype), t, axis=1)

    # States take the place of inputs, each of which is read before.
    state_BW, h_BTW = _loop(x_BTW.shape[1], reverse, step, (state_BW, x_BTW))
    return h_BTW, state_BW


def _borders(reverse, a, marks_RL, x_RLW, state_BW):
    """Returns the states as they come to each chunk, and the last one."""
    R, L, W = x_RLW.shape
    B, dtype = state_BW.shape[0], state_BW.dtype

    def summarise(l, carry):
        keep_RW, write_RW = carry
        a_RW, x_RW = _token(a, marks_RL, x_RLW, l, dtype)
        return a_RW * keep_RW, a_RW * write_RW + x_RW

    def step(state_BW, chunk):
        keep_BW, write_BW = chunk
        return keep_BW * state_BW + write_BW, state_BW

    chunks = _loop(L, reverse, summarise, (jnp.ones((R, W), dtype), jnp.zeros((R, W), dtype)))
    last_BW, states_CBW = jax.lax.scan(
        step, state_BW, tuple(z_RW.reshape(B, -1, W).swapaxes(0, 1) for z_RW in chunks), reverse=reverse
    )
    return states_CBW.swapaxes(0, 1).reshape(R, W), last_BW


def _token(a, marks_BT, x_BTW, t, dtype):
    """Returns what token t leaves of the state that comes to it, and what it adds."""
    at = lambda z: jax.lax.dynamic_index_in_dim(z, t, axis=1, keepdims=False)
    return _keep(a if a.ndim == 1 else at(a), at(marks_BT), dtype), at(x_BTW).astype(dtype)


def _keep(a_BW, mark_B, dtype):
    mark_B1 = mark_B[:, None]
    return jnp.where(mark_B1 == 1, a_BW.astype(dtype), jnp.where(mark_B1 == 0, 1, 0).astype(dtype))


def _clear(x_BTW, marks_BT):
    return jnp.where(marks_BT[..., None] > 0, x_BTW, 0)


def _shift(reverse, x_BT, first_B1):
    """Moves everything by a token in the direction of the walk."""
    return jnp.concatenate([x_BT[:, 1:], first_B1] if reverse else [first_B1, x_BT[:, :-1]], axis=1)


def _loop(length, reverse, step, carry):
    return jax.lax.fori_loop(0, length, lambda i, carry: step(length - 1 - i if reverse else i, carry), carry)


def _split(x_BT):
    """Makes rows of chunks; filled up with zeros, which as marks say padding."""
    T, *width = x_BT.shape[1:]
    x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % CHUNK), *[(0, 0)] * len(width)))
    return x_BT.reshape(-1, CHUNK, *width)
