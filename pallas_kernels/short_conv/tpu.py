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
    if _is_empty(x, w):
        return xla.forward(activation, *args)
    return xla.unless_holes(_forward_packed, xla.forward_with_holes, activation, *args), args


def backward(activation, residuals, cotangents):
    """Returns the gradients of x, w, bias and state."""
    if _is_empty(*residuals[:2]):
        return xla.backward(activation, residuals, cotangents)
    return xla.unless_holes(_backward_packed, xla.backward_with_holes, activation, *residuals, *cotangents)


def _is_empty(x, w):
    return x.shape[1] == 0 or w.shape[1] == 1


class _Blocks:
    """The arguments of both kernels, filled up to whole blocks, and where their blocks lie."""

    def __init__(self, x, w, bias, state, segment_ids, *, last_first):
        batch, T, D = x.shape
        W = w.shape[1]
        self.L = min(MAX_BLOCK_T, T + -T % LANES)
        self.block = LANES * tiles_per_block(D, MAX_TILES)
        self.x = self.pad(x, T=1)
        self.grid = batch, self.x.shape[2] // self.block, self.x.shape[1] // self.L
        last = self.grid[2] - 1
        self.at = at = (lambda t: last - t) if last_first else (lambda t: t)
        # How many tokens back a token may look: -1 at padding.
        ids_BT = jnp.ones((batch, T), jnp.int32) if segment_ids is None else segment_ids
        known_BT = jnp.pad(ids_BT, ((0, 0), (W - 1, 0)), mode="edge")
        back_BT = sum((known_BT[:, W - 1 - j : W - 1 - j + T] == ids_BT).astype(jnp.int32) for j in range(1, W))
        back_BT = jnp.where(ids_BT > 0, back_BT, -1)
        back_B1T = jnp.pad(back_BT, ((0, 0), (0, -T % self.L)), constant_values=-1)[:, None]
        counts_B = jnp.sum(ids_BT > 0, axis=1)
        bias_1D = jnp.zeros((1, D), w.dtype) if bias is None else bias[None]
        self.arrays = counts_B, back_B1T, self.x, *(self.pad(a) for a in (w.T, bias_1D, state))
        self.token_spec = pl.BlockSpec((None, self.L, self.block), lambda b, d, t: (b, at(t), d))
        self.state_spec = pl.BlockSpec((None, W - 1, self.block), lambda b, d, t: (b, 0, d))
        self.specs = [
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((None, 1, self.L), lambda b, d, t: (b, 0, at(t))),
            self.token_spec,
            pl.BlockSpec((W, self.block), lambda b, d, t: (0, d)),
            pl.BlockSpec((1, self.block), lambda b, d, t: (0, d)),
            self.state_spec,
        ]
        self.scratch = [
            pltpu.VMEM((HALO + self.L, self.block), jnp.float32),
            pltpu.VMEM((self.L, LANES), jnp.float32),
            pltpu.VMEM((W + 1, self.block), jnp.float32),
        ]
        self.params = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))

    def pad(self, a_D, T=None):
        """Fills up the channels, which come last, and the tokens, if it is said where they are."""
        widths = [(0, 0)] * (a_D.ndim - 1) + [(0, -a_D.shape[-1] % self.block)]
        if T is not None:
            widths[T] = (0, -a_D.shape[T] % self.L)
        return jnp.pad(a_D, widths)


def _forward_packed(activation, x, w, bias, state, segment_ids):
    """The convolution of rows whose padding, if any, is at the end."""
    p = _Blocks(x, w, bias, state, segment_ids, last_first=False)
    y, last_BWD = pl.pallas_call(
        functools.partial(_forward_kernel, activation),
        name="short_conv_forward",
        grid=p.grid,
        in_specs=p.specs,
        out_specs=[p.token_spec, p.state_spec],
        out_shape=[
            jax.ShapeDtypeStruct(p.x.shape, x.dtype),
            jax.ShapeDtypeStruct((*state.shape[:2], p.x.shape[2]), state.dtype),
        ],
        scratch_shapes=p.scratch,
        compiler_params=p.params,
    )(*p.arrays)
    T, D = x.shape[1:]
    return y[:, :T, :D], last_BWD[..., :D]


def _backward_packed(activation, x, w, bias, state, segment_ids, dy, dlast_BWD):
    p = _Blocks(x, w, bias, state, segment_ids, last_first=True)
    (batch, T, D), (W, width) = x.shape, (w.shape[1], p.x.shape[2])
    rows = 16  # A tile of bfloat16.
    before = pl.BlockSpec((None, rows, p.block), lambda b, d, t: (b, jnp.maximum(p.at(t) * (p.L // rows) - 1, 0), d))
    weight_spec = lambda rows: pl.BlockSpec((None, rows, p.block), lambda b, d, t: (b, 0, d))
    dx, dw_BWD, dbias_B1D, dstate_BWD = pl.pallas_call(
        functools.partial(_backward_kernel, activation),
        name="short_conv_backward",
        grid=p.grid,
        in_specs=[*p.specs, before, p.token_spec, p.state_spec],
        out_specs=[p.token_spec, weight_spec(W), weight_spec(1), p.state_spec],
        out_shape=[
            jax.ShapeDtypeStruct(p.x.shape, x.dtype),
            jax.ShapeDtypeStruct((batch, W, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, 1, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, W - 1, width), state.dtype),
        ],
        scratch_shapes=[
            *p.scratch,
            pltpu.VMEM((HALO + p.L, p.block), jnp.float32),
            pltpu.VMEM((W + 1, 8, p.block), jnp.float32),
        ],
        compiler_params=p.params,
    )(*p.arrays, p.x, p.pad(dy, T=1), p.pad(dlast_BWD))
    return (
        dx[:, :T, :D],
        jnp.sum(dw_BWD, axis=0)[:, :D].T.astype(w.dtype),
        None if bias is None else jnp.sum(dbias_B1D, axis=(0, 1))[:D].astype(bias.dtype),
        dstate_BWD[..., :D],
    )


def _forward_kernel(activation, counts_B, back_1L, x_LD, w_WD, bias_1D, state_WD, y_LD, last_WD, x_XD, back_LD, wb_XD):
    (L, D), W = x_LD.shape, w_WD.shape[0]
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _():
        x_XD[HALO - W + 1 : HALO, :] = state_WD[...].astype(jnp.float32)
        last_WD[...] = state_WD[...]  # Stays so, if there is no token.

    @pl.when(block > 0)
    def _():
        x_XD[:HALO, :] = x_XD[L:, :]

    _load(back_1L, x_LD, w_WD, bias_1D, x_XD, back_LD, wb_XD)

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
    end = counts_B[pl.program_id(0)] - 1 - block * L

    @pl.when((end >= 0) & (end < L))
    def _():
        back_1D = _reach(back_LD, end, D)
        kept = [jnp.where(back_1D >= j, x_XD[pl.ds(HALO + end - j, 1), :], 0) for j in reversed(range(W - 1))]
        last_WD[...] = jnp.concatenate(kept).astype(last_WD.dtype)


def _backward_kernel(
    activation,
    counts_B,
    back_1L,
    x_LD,
    w_WD,
    bias_1D,
    state_WD,
    before_ZD,
    dy_LD,
    dlast_WD,
    dx_LD,
    dw_WD,
    dbias_1D,
    dstate_WD,
    x_XD,
    back_LD,
    wb_XD,
    dx_XD,
    sums_X8D,
):
    (L, D), W = x_LD.shape, w_WD.shape[0]
    step = pl.program_id(2)
    block = pl.num_programs(2) - 1 - step

    @pl.when(block == 0)
    def _():
        x_XD[HALO - W + 1 : HALO, :] = state_WD[...].astype(jnp.float32)

    @pl.when(block > 0)
    def _():
        x_XD[:HALO, :] = before_ZD[...].astype(jnp.float32)[-HALO:]

    _load(back_1L, x_LD, w_WD, bias_1D, x_XD, back_LD, wb_XD)

    # What the block after this one found out about the last rows of this one.
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
    end = counts_B[pl.program_id(0)] - 1 - block * L

    @pl.when((end >= 0) & (end < L))
    def _():
        back_1D, dlast = _reach(back_LD, end, D), dlast_WD[...].astype(jnp.float32)
        for i, j in enumerate(reversed(range(W - 1))):
            dx_XD[pl.ds(HALO + end - j, 1), :] += jnp.where(back_1D >= j, dlast[i : i + 1], 0)

    dx_LD[...] = dx_XD[HALO:, :].astype(dx_LD.dtype)

    @pl.when(block == 0)
    def _():
        # Without any token, the new state is the old one.
        passed_WD = jnp.where(counts_B[pl.program_id(0)] == 0, dlast_WD[...].astype(jnp.float32), 0)
        dstate_WD[...] = (dx_XD[HALO - W + 1 : HALO, :] + passed_WD).astype(dstate_WD.dtype)
        sums_XD = jnp.sum(sums_X8D[...], axis=1)
        dw_WD[...], dbias_1D[...] = sums_XD[:W], sums_XD[W:]


def _load(back_1L, x_LD, w_WD, bias_1D, x_XD, back_LD, wb_XD):
    """Widens a block to float32; turns a row into a column, repeated on all lanes."""
    W = w_WD.shape[0]
    x_XD[HALO:, :] = x_LD[...].astype(jnp.float32)
    wb_XD[:W, :], wb_XD[W:, :] = w_WD[...].astype(jnp.float32), bias_1D[...].astype(jnp.float32)
    back_LD[...] = jnp.broadcast_to(back_1L[...].astype(jnp.float32), (LANES, back_1L.shape[1])).T


def _reach(back_LD, row, D):
    """Returns how far back a token may look, on all lanes."""
    return jnp.concatenate([back_LD[pl.ds(row, 1), :]] * (D // LANES), axis=1)


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


def _fold(a_LD):
    """Sums rows of the same sublane."""
    return jnp.sum(a_LD.reshape(-1, 8, a_LD.shape[1]), axis=0)
