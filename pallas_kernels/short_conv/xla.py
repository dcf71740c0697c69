"""`short_conv` as a sum of W shifted products, forward and backward."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common.holes import has_holes, moves


def forward(activation, *args):
    """Returns `(y, state)` and the residuals, which are the inputs: x, w, bias, state and segment_ids."""
    return unless_holes(_forward_packed, forward_with_holes, activation, *args), args


def backward(activation, residuals, cotangents):
    """Returns the gradients of x, w, bias and state."""
    return unless_holes(_backward_packed, backward_with_holes, activation, *residuals, *cotangents)


def unless_holes(packed, with_holes, activation, x, w, bias, state, segment_ids, *cotangents):
    """Calls `packed`, or the other if there is padding before a token: one condition around all copies no array."""
    args = x, w, bias, state, segment_ids, *cotangents
    if segment_ids is None:
        return packed(activation, *args)
    branches = (functools.partial(fn, activation) for fn in (with_holes, packed))
    return jax.lax.cond(has_holes(segment_ids), *branches, *args)


def forward_with_holes(activation, x, w, bias, state, segment_ids):
    """Returns `(y, state)` of rows with padding before tokens."""
    close, reopen = moves(segment_ids)
    y, new_state = _forward_packed(activation, close(x), w, bias, state, close(segment_ids))
    return reopen(y), new_state


def backward_with_holes(activation, x, w, bias, state, segment_ids, dy, dstate):
    close, reopen = moves(segment_ids)
    dx, *rest = _backward_packed(activation, close(x), w, bias, state, close(segment_ids), close(dy), dstate)
    return reopen(dx), *rest


def _take(a, index_BT):
    return jnp.take_along_axis(a, index_BT.reshape(index_BT.shape + (1,) * (a.ndim - 2)), axis=1)


def _inputs(x, state, segment_ids, dtype):
    x = x if segment_ids is None else jnp.where((segment_ids > 0)[..., None], x, 0)
    return jnp.concatenate([state.astype(dtype), x.astype(dtype)], axis=1)


def _taps(inputs_BTD, ids_BT, T):
    """Yields, for each column of w, the inputs that it multiplies: zero across a document's border."""
    W = inputs_BTD.shape[1] - T + 1
    for j in range(W):
        tap_BTD = inputs_BTD[:, j : j + T]
        if ids_BT is not None and j < W - 1:
            tap_BTD = jnp.where((ids_BT[:, j : j + T] == ids_BT[:, W - 1 :])[..., None], tap_BTD, 0)
        yield tap_BTD


def _with_state_ids(ids_BT, W):
    """Returns ids for state and inputs: the state belongs to the row's first document."""
    return jnp.pad(ids_BT, ((0, 0), (W - 1, 0)), mode="edge")


def _preactivation(inputs_BTD, w_DW, bias, ids_BT, T):
    z_BTD = jnp.zeros((), w_DW.dtype) if bias is None else bias.astype(w_DW.dtype)[None, None]
    for j, tap_BTD in enumerate(_taps(inputs_BTD, ids_BT, T)):
        z_BTD = z_BTD + tap_BTD * w_DW[None, None, :, j]
    return z_BTD


def _last(ids_BT, T, W):
    """Returns where in state and inputs the new state lies, and which of it is of the row's last document."""
    count_B1 = jnp.sum(ids_BT[:, W - 1 :] > 0, axis=1, keepdims=True)
    place_BW = count_B1 + jnp.arange(W - 1)[None]
    last_B1 = _take(ids_BT, count_B1 + W - 2) if W > 1 else count_B1
    return place_BW, _take(ids_BT, place_BW) == last_B1


def _forward_packed(activation, x, w, bias, state, segment_ids):
    """The convolution of rows whose padding, if any, is at the end."""
    T, W = x.shape[1], w.shape[1]
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    inputs_BTD = _inputs(x, state, segment_ids, dtype)
    ids_BT = None if segment_ids is None else _with_state_ids(segment_ids, W)
    y_BTD = _preactivation(inputs_BTD, w.astype(dtype), bias, ids_BT, T)
    if activation == "silu":
        y_BTD = y_BTD / (1 + jnp.exp(-y_BTD))  # On a CPU a fifth faster than a product with a sigmoid.
    if ids_BT is None:
        new_state = inputs_BTD[:, T:]
    else:
        y_BTD = jnp.where((ids_BT[:, W - 1 :] > 0)[..., None], y_BTD, 0)
        place_BW, is_same_BW = _last(ids_BT, T, W)
        new_state = jnp.where(is_same_BW[..., None], _take(inputs_BTD, place_BW), 0)
    return y_BTD.astype(x.dtype), new_state.astype(state.dtype)


def _backward_packed(activation, x, w, bias, state, segment_ids, dy, dstate):
    T, W = x.shape[1], w.shape[1]
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    inputs_BTD, w_DW = _inputs(x, state, segment_ids, dtype), w.astype(dtype)
    ids_BT = None if segment_ids is None else _with_state_ids(segment_ids, W)
    dz_BTD = dy.astype(dtype)
    if activation == "silu":
        # Computed again: cheaper than keeping it.
        z_BTD = _preactivation(inputs_BTD, w_DW, bias, ids_BT, T)
        s_BTD = jax.nn.sigmoid(z_BTD)
        dz_BTD = dz_BTD * s_BTD * (1 + z_BTD * (1 - s_BTD))
    if segment_ids is not None:
        dz_BTD = jnp.where((segment_ids > 0)[..., None], dz_BTD, 0)
    # Zeros follow the last token. Without a barrier fusion computes it again for each of its 2 W + 1 uses.
    dz_BSD = jax.lax.optimization_barrier(jnp.pad(dz_BTD, ((0, 0), (0, W - 1), (0, 0))))
    dw_DW, dbias = _weight_gradients(T, inputs_BTD, ids_BT, dz_BSD)
    head_BSD = jnp.pad(dz_BSD[:, : W - 1], ((0, 0), (W - 1, 0), (0, 0)))
    if ids_BT is None:
        place_BW = jnp.broadcast_to(T + jnp.arange(W - 1), dstate.shape[:2])
        dlast_BWD = dstate.astype(dtype)
        ids = head_ids = None, None
    else:
        place_BW, is_same_BW = _last(ids_BT, T, W)
        dlast_BWD = jnp.where(is_same_BW[..., None], dstate.astype(dtype), 0)
        after_BS = jnp.pad(ids_BT[:, W - 1 :], ((0, 0), (0, W - 1)))
        ids = after_BS, ids_BT[:, W - 1 :]
        head_ids = jnp.pad(after_BS[:, : W - 1], ((0, 0), (W - 1, 0))), ids_BT[:, : W - 1]
    add = jax.vmap(lambda d, place, dlast: d.at[place].add(dlast, mode="drop"))
    dx_BTD = add(_input_gradients(dz_BSD, w_DW, *ids), jnp.where(place_BW < W - 1, T, place_BW - W + 1), dlast_BWD)
    dhead_BWD = add(_input_gradients(head_BSD, w_DW, *head_ids), place_BW, dlast_BWD)
    return (
        dx_BTD.astype(x.dtype),
        dw_DW.astype(w.dtype),
        None if bias is None else dbias.astype(bias.dtype),
        dhead_BWD.astype(state.dtype),
    )


def _input_gradients(dz_BSD, w_DW, ids_BS, ids_BT):
    """Returns the gradients of inputs, each of which went to the outputs at its place in `dz_BSD` and W - 1 after it.

    The ids are those of the outputs and of the inputs.
    """
    W = w_DW.shape[1]
    T = dz_BSD.shape[1] - W + 1
    dinputs_BTD = jnp.zeros((), dz_BSD.dtype)
    for j in range(W):
        part_BTD = dz_BSD[:, W - 1 - j : W - 1 - j + T] * w_DW[None, None, :, j]
        if ids_BS is not None:
            part_BTD = jnp.where((ids_BS[:, W - 1 - j : W - 1 - j + T] == ids_BT)[..., None], part_BTD, 0)
        dinputs_BTD += part_BTD
    return dinputs_BTD


def _weight_gradients(T, inputs_BSD, ids_BS, dz_BSD):
    """Returns the gradients of w and bias: sums over T tokens. A few at a time are five times faster on a CPU."""
    in_turn, at_once = functools.partial(_sums_in_turn, T), functools.partial(_sums, T)
    sums_D = jax.lax.platform_dependent(inputs_BSD, ids_BS, dz_BSD, cpu=in_turn, default=at_once)
    return jnp.stack(sums_D[:-1], axis=1), sums_D[-1]


def _sums(T, inputs_BSD, ids_BS, dz_BSD):
    """Returns the sums of each tap times dz, and of dz."""
    dz_BTD = dz_BSD[:, :T]
    taps_BTD = _taps(inputs_BSD, ids_BS, T)
    return [jnp.sum(a_BTD, axis=(0, 1)) for a_BTD in (*[tap_BTD * dz_BTD for tap_BTD in taps_BTD], dz_BTD)]


def _sums_in_turn(T, inputs_BSD, ids_BS, dz_BSD):
    """The same, eight tokens at a time."""
    B, S, D = dz_BSD.shape
    W, L = S - T + 1, 8
    C = max(1, -(-T // L))
    rest = C * L - T
    inputs_BSD, dz_BSD = (jnp.pad(a, ((0, 0), (0, rest), (0, 0))) for a in (inputs_BSD, dz_BSD))
    ids_BS = None if ids_BS is None else jnp.pad(ids_BS, ((0, 0), (0, rest)))

    def step(c, sums_BD):
        piece = lambda a, size: jax.lax.dynamic_slice_in_dim(a, c * L, size, axis=1)
        dz_BLD, ids_BL = piece(dz_BSD, L), None if ids_BS is None else piece(ids_BS, L + W - 1)
        taps_BLD = _taps(piece(inputs_BSD, L + W - 1), ids_BL, L)
        terms_BLD = *[tap_BLD * dz_BLD for tap_BLD in taps_BLD], dz_BLD
        return [sum((a_BLD[:, l] for l in range(L)), sum_BD) for sum_BD, a_BLD in zip(sums_BD, terms_BLD, strict=True)]

    sums_BD = jax.lax.fori_loop(0, C, step, [jnp.zeros((B, D), dz_BSD.dtype)] * (W + 1))
    return [jnp.sum(sum_BD, axis=0) for sum_BD in sums_BD]
