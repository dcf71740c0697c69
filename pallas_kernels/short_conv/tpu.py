"""`short_conv` on TPU: one pass over the inputs forward, one backward.

XLA reads the inputs once for each tap, and writes what it reads as float32. Here a block of tokens is read once, with
the `HALO` rows before it, and shifted along sublanes. Rows with padding before a token are left to XLA.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.tiles import LANES, tiles_per_block
from pallas_kernels.short_conv import xla

HALO = 8  # Rows of a tile; at least W - 1.
MAX_BLOCK_T = 512
MAX_TILES = 4
ROWS = 64  # At a time, so that all that is computed of them stays in registers.


def forward(activation, x, w, bias, state, segment_ids):
    """Returns `(y, state)` and the residuals of `xla.forward`."""
    args = x, w, bias, state, segment_ids
    run = functools.partial(_forward_packed, activation)
    if x.shape[1] == 0:
        return xla.forward(activation, *args)
    if segment_ids is None:
        return run(*args), args
    slow = lambda *args: xla.forward(activation, *args)[0]
    return jax.lax.cond(_has_holes(segment_ids), slow, run, *args), args


def backward(activation, residuals, cotangents):
    """Returns the gradients of x, w, bias and state."""
    if residuals[0].shape[1] == 0:
        return xla.backward(activation, residuals, cotangents)
    run = functools.partial(_backward_packed, activation)
    if residuals[-1] is None:
        return run(residuals, cotangents)
    slow = functools.partial(xla.backward, activation)
    return jax.lax.cond(_has_holes(residuals[-1]), slow, run, residuals, cotangents)


def _has_holes(ids_BT):
    return jnp.any((ids_BT[:, :-1] == 0) & (ids_BT[:, 1:] > 0))


class _Blocks:
    """The arguments of both kernels, filled up to whole blocks, and where their blocks lie."""

    def __init__(self, x, w, bias, state, segment_ids, last_first):
        batch, T, D = x.shape
        W = w.shape[1]
        self.L = min(MAX_BLOCK_T, T + -T % LANES)
        tiles = tiles_per_block(D, MAX_TILES)
        self.block, self.x = tiles * LANES, x
        self.x = self.pad_tokens(x)
        self.grid = batch, self.x.shape[2] // self.block, self.x.shape[1] // self.L
        last = self.grid[2] - 1
        self.at = at = (lambda t: last - t) if last_first else (lambda t: t)
        # How many tokens back a token may look: -1 at padding.
        ids_BT = jnp.ones((batch, T), jnp.int32) if segment_ids is None else segment_ids
        known_BT = jnp.pad(ids_BT, ((0, 0), (W - 1, 0)), mode="edge")
        back_BT = sum((known_BT[:, W - 1 - j : W - 1 - j + T] == ids_BT).astype(jnp.int32) for j in range(1, W))
        back_BT = jnp.where(ids_BT > 0, back_BT, -1)
        back_B1T = jnp.pad(back_BT, ((0, 0), (0, -T % self.L)), constant_values=-1)[:, None]
        wb_XD = jnp.concatenate([w.T, jnp.zeros((1, D), w.dtype) if bias is None else bias[None]])
        self.arrays = back_B1T, self.x, self.pad_channels(wb_XD), self.pad_channels(self.pad_state(state))
        self.token_spec = pl.BlockSpec((None, self.L, self.block), lambda b, d, t: (b, at(t), d))
        self.state_spec = pl.BlockSpec((None, HALO, self.block), lambda b, d, t: (b, 0, d))
        self.specs = [
            pl.BlockSpec((None, 1, self.L), lambda b, d, t: (b, 0, at(t))),
            self.token_spec,
            pl.BlockSpec((W + 1, self.block), lambda b, d, t: (0, d)),
            self.state_spec,
        ]
        self.scratch = [
            pltpu.VMEM((HALO + self.L, self.block), jnp.float32),
            pltpu.VMEM((self.L, LANES), jnp.float32),
        ]
        self.params = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))

    def pad_tokens(self, a_BTD):
        return jnp.pad(a_BTD, ((0, 0), (0, -a_BTD.shape[1] % self.L), (0, -a_BTD.shape[2] % self.block)))

    def pad_channels(self, a_D):
        return jnp.pad(a_D.astype(jnp.float32), [(0, 0)] * (a_D.ndim - 1) + [(0, -a_D.shape[-1] % self.block)])

    @staticmethod
    def pad_state(state_BWD):
        """The inputs before a row, in the last rows of its halo."""
        return jnp.pad(state_BWD, ((0, 0), (HALO - state_BWD.shape[1], 0), (0, 0)))


def _forward_packed(activation, x, w, bias, state, segment_ids):
    """The convolution of rows whose padding, if any, is at the end."""
    p = _Blocks(x, w, bias, state, segment_ids, last_first=False)
    y = pl.pallas_call(
        functools.partial(_forward_kernel, activation),
        name="short_conv_forward",
        grid=p.grid,
        in_specs=p.specs,
        out_specs=p.token_spec,
        out_shape=jax.ShapeDtypeStruct(p.x.shape, x.dtype),
        scratch_shapes=p.scratch,
        compiler_params=p.params,
    )(*p.arrays)
    place_BW, is_kept_BW = _last(segment_ids, x.shape, w.shape[1])
    take = lambda a_BTD, index_BW: jnp.take_along_axis(a_BTD, jnp.maximum(index_BW, 0)[..., None], axis=1)
    of_x, of_state = take(x, place_BW), take(state, jnp.minimum(place_BW, -1) + state.shape[1])
    last = jnp.where((place_BW >= 0)[..., None], of_x.astype(state.dtype), of_state)
    return y[:, : x.shape[1], : x.shape[2]], jnp.where(is_kept_BW[..., None], last, 0)


def _backward_packed(activation, residuals, cotangents):
    x, w, bias, state, segment_ids = residuals
    dy, dlast = cotangents
    W = w.shape[1]
    p = _Blocks(x, w, bias, state, segment_ids, last_first=True)
    place_BW, is_kept_BW = _last(segment_ids, x.shape, W)
    dlast_BWD = p.pad_channels(jnp.pad(jnp.where(is_kept_BW[..., None], dlast, 0), ((0, 0), (0, HALO - W + 1), (0, 0))))
    first_B = place_BW[:, 0] if W > 1 else jnp.zeros(len(x), jnp.int32)
    rows = 16  # A tile of bfloat16.
    before = pl.BlockSpec((None, rows, p.block), lambda b, d, t: (b, jnp.maximum(p.at(t) * (p.L // rows) - 1, 0), d))
    shape_BWD = jax.ShapeDtypeStruct((p.grid[0], HALO, p.x.shape[2]), jnp.float32)
    dx, dwb_BXD, dstate_BWD = pl.pallas_call(
        functools.partial(_backward_kernel, activation),
        name="short_conv_backward",
        grid=p.grid,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *p.specs, before, p.token_spec, p.state_spec],
        out_specs=[
            p.token_spec,
            pl.BlockSpec((None, W + 1, p.block), lambda b, d, t: (b, 0, d)),
            p.state_spec,
        ],
        out_shape=[
            jax.ShapeDtypeStruct(p.x.shape, x.dtype),
            jax.ShapeDtypeStruct((p.grid[0], W + 1, p.x.shape[2]), jnp.float32),
            shape_BWD,
        ],
        scratch_shapes=[
            *p.scratch,
            pltpu.VMEM((HALO + p.L, p.block), jnp.float32),
            pltpu.VMEM((W + 1, 8, p.block), jnp.float32),
        ],
        compiler_params=p.params,
    )(first_B, *p.arrays, p.x, p.pad_tokens(dy), dlast_BWD)
    T, D = x.shape[1:]
    dwb_XD = jnp.sum(dwb_BXD, axis=0)[:, :D]
    return (
        dx[:, :T, :D],
        dwb_XD[:W].T.astype(w.dtype),
        None if bias is None else dwb_XD[W].astype(bias.dtype),
        dstate_BWD[:, HALO - W + 1 :, :D].astype(state.dtype),
    )


def _last(segment_ids, shape, W):
    """Returns the places in x of what the new state holds (below 0: in the old one), and which are of one document."""
    batch, T, _ = shape
    ids_BT = jnp.ones((batch, T), jnp.int32) if segment_ids is None else segment_ids
    count_B1 = jnp.sum(ids_BT > 0, axis=1, keepdims=True)
    place_BW = count_B1 - W + 1 + jnp.arange(W - 1)[None]
    id_at = lambda place: jnp.take_along_axis(ids_BT, jnp.maximum(place, 0), axis=1)
    return place_BW, id_at(place_BW) == id_at(count_B1 - 1)


def _forward_kernel(activation, back_1L, x_LD, wb_XD, state_WD, y_LD, x_XD, back_LD):
    L, D = x_LD.shape

    @pl.when(pl.program_id(2) == 0)
    def _():
        x_XD[:HALO, :] = state_WD[...]

    @pl.when(pl.program_id(2) > 0)
    def _():
        x_XD[:HALO, :] = x_XD[L:, :]

    x_XD[HALO:, :] = x_LD[...].astype(jnp.float32)
    back_LD[...] = _columns(back_1L[...])

    def rows(i, carry):
        at = pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)
        back = back_LD[at, :]
        for lanes in _tiles(D):
            z, _ = _preactivation(x_XD, wb_XD, back, i, lanes)
            if activation == "silu":
                half = 0.5 * z
                z = half + half * jnp.tanh(half)
            y_LD[at, lanes] = jnp.where(back >= 0, z, 0).astype(y_LD.dtype)
        return carry

    jax.lax.fori_loop(0, L // ROWS, rows, None)


def _backward_kernel(
    activation,
    first_B,
    back_1L,
    x_LD,
    wb_XD,
    state_WD,
    before_ZD,
    dy_LD,
    dlast_WD,
    dx_LD,
    dwb_XD,
    dstate_WD,
    x_XD,
    back_LD,
    dx_XD,
    sums_X8D,
):
    (L, D), W = x_LD.shape, wb_XD.shape[0] - 1
    b, step, num_steps = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
    is_first_block = step == num_steps - 1

    @pl.when(is_first_block)
    def _():
        x_XD[:HALO, :] = state_WD[...]

    @pl.when(jnp.logical_not(is_first_block))
    def _():
        x_XD[:HALO, :] = before_ZD[...].astype(jnp.float32)[-HALO:]

    x_XD[HALO:, :] = x_LD[...].astype(jnp.float32)
    back_LD[...] = _columns(back_1L[...])

    # What the block after this one found out about the last rows of this.
    @pl.when(step == 0)
    def _():
        dx_XD[...] = jnp.zeros_like(dx_XD)
        sums_X8D[...] = jnp.zeros_like(sums_X8D)

    @pl.when(step > 0)
    def _():
        found_WD = dx_XD[:HALO, :]
        dx_XD[:L, :] = jnp.zeros((L, D), jnp.float32)
        dx_XD[L:, :] = found_WD

    def rows(i, carry):
        at = pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)
        with_halo = pl.ds(pl.multiple_of(i * ROWS, ROWS), HALO + ROWS)
        back = back_LD[at, :]
        for lanes in _tiles(D):
            z, taps = _preactivation(x_XD, wb_XD, back, i, lanes)
            dz = dy_LD[at, lanes].astype(jnp.float32)
            if activation == "silu":
                s = 0.5 + 0.5 * jnp.tanh(0.5 * z)
                dz = dz * s * (1 + z * (1 - s))
            dz = jnp.where(back >= 0, dz, 0)
            dx = dx_XD[with_halo, lanes]
            for j, tap in enumerate(taps):
                part = jnp.where(back >= j, dz * wb_XD[W - 1 - j : W - j, lanes], 0)
                part = jnp.concatenate([jnp.zeros((HALO, LANES), jnp.float32), part])
                dx += part if j == 0 else pltpu.roll(part, HALO + ROWS - j, axis=0)
                sums_X8D[W - 1 - j, :, lanes] += _fold(dz * tap)
            sums_X8D[W, :, lanes] += _fold(dz)
            dx_XD[with_halo, lanes] = dx
        return carry

    jax.lax.fori_loop(0, L // ROWS, rows, None)

    # What the state after the row is made of; of the old state, if the row is short.
    for i in range(W - 1):
        row = first_B[b] + i - (num_steps - 1 - step) * L

        @pl.when((row < L) & ((row >= 0) | is_first_block))
        def _(row=row, i=i):
            at = pl.ds(HALO + row, 1)
            dx_XD[at, :] += dlast_WD[i : i + 1, :]

    dx_LD[...] = dx_XD[HALO:, :].astype(dx_LD.dtype)

    @pl.when(is_first_block)
    def _():
        dstate_WD[...] = dx_XD[:HALO, :]
        dwb_XD[...] = jnp.sum(sums_X8D[...], axis=1)


def _preactivation(x_XD, wb_XD, back, i, lanes):
    """Returns z and the taps of some rows, the current token's first; zero across a document's border."""
    W = wb_XD.shape[0] - 1
    x = x_XD[pl.ds(pl.multiple_of(i * ROWS, ROWS), HALO + ROWS), lanes]
    taps = [x[HALO:]] + [pltpu.roll(x, j, axis=0)[HALO:] for j in range(1, W)]
    taps = [jnp.where(back >= j, tap, 0) for j, tap in enumerate(taps)]
    z = wb_XD[W:, lanes]
    for j, tap in enumerate(taps):
        z = z + tap * wb_XD[W - 1 - j : W - j, lanes]
    return z, taps


def _tiles(D):
    return [slice(d, d + LANES) for d in range(0, D, LANES)]


def _columns(row_1L):
    """Turns a row into a column, repeated on all lanes."""
    return jnp.broadcast_to(row_1L.astype(jnp.float32), (LANES, row_1L.shape[1])).T


def _fold(a_LD):
    """Sums rows of the same sublane."""
    return jnp.sum(a_LD.reshape(-1, 8, a_LD.shape[1]), axis=0)
