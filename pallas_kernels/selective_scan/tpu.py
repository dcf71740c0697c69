"""The selective scan on TPU: the vector unit does what differs by channel and row, the matrix unit all sums.

A program holds the state of some tiles of 128 channels, rows on sublanes, channels on lanes, and walks the tokens of
its blocks one after another. Each entry has a decay and an update of its own, on the vector unit; the rest are matmuls
over `GROUP` tokens at once. With X the pairs (token of the group, row), h_XD the states of a group, and C laid out
block by block, C_GX[t, (s, h)] = C[t, h] where t = s and 0 elsewhere:

    y = C_GX h_XD        du = B_GX g_XD        dC_GX = dy h_XD^T        dB_GX = u g_XD^T

the last two on their diagonal blocks. The operands of matmuls are bfloat16 where x is, and in float32 else.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.tiles import LANES, tiles_per_block
from pallas_kernels.selective_scan.xla import FOREVER, MAX_A

BLOCK_T = 128
CHUNK = 64  # The state before each is kept.
GROUP = 8
MAX_ROWS = 64  # Of all tiles of a program: what it computes with has to stay in registers.
LOG2E = math.log2(math.e)


def forward(keep, _, x, dt, A, B, C, D, state, marks):
    """Returns (y, state) and what is kept: the state before each chunk."""
    del keep
    p = _Padded(x, dt, A, B, C, D, marks)
    first_BHD = p.pad_state(jnp.swapaxes(state, 1, 2))
    y, states_CBHD, last_BHD = pl.pallas_call(
        _forward_kernel,
        name="selective_scan_forward",
        grid=p.grid,
        in_specs=[*p.specs(), p.state_spec],
        out_specs=[p.token_spec(), p.states_spec(), p.state_spec],
        out_shape=[
            jax.ShapeDtypeStruct(p.x.shape, x.dtype),
            jax.ShapeDtypeStruct((p.T // CHUNK, *first_BHD.shape), jnp.float32),
            jax.ShapeDtypeStruct(first_BHD.shape, jnp.float32),
        ],
        scratch_shapes=[
            *[p.rows_scratch()] * 2,
            pltpu.VMEM((BLOCK_T, LANES), jnp.float32),
            pltpu.VMEM((BLOCK_T, GROUP * p.H), p.dtype),
        ],
        compiler_params=p.params,
    )(*p.arrays, first_BHD)
    T, width, H = x.shape[1], x.shape[2], A.shape[1]
    states_CBHD = states_CBHD[: -(-T // CHUNK), :, :H, :width]
    outputs = y[:, :T, :width], jnp.swapaxes(last_BHD[:, :H, :width], 1, 2)
    return outputs, (states_CBHD,)


def backward(_, residuals, cotangents):
    """Returns the gradients of x, dt, A, B, C, D and state."""
    x, dt, A, B, C, D, _, marks, states_CBHD = residuals
    dy, dlast = cotangents
    p = _Padded(x, dt, A, B, C, D, marks)
    dlast_BHD = p.pad_state(jnp.swapaxes(dlast, 1, 2))
    states_CBHD = jnp.pad(p.pad_state(states_CBHD), ((0, p.T // CHUNK - len(states_CBHD)), *[(0, 0)] * 3))
    shape_BHD = jax.ShapeDtypeStruct(dlast_BHD.shape, jnp.float32)
    last = p.grid[2] - 1
    dx, ddt, dA_BHD, dBC_BNXT, dD_BGD, dfirst_BHD = pl.pallas_call(
        _backward_kernel,
        name="selective_scan_backward",
        grid=p.grid,
        in_specs=[*p.specs(last), p.state_spec, p.token_spec(last), p.states_spec(last)],
        out_specs=[
            p.token_spec(last),
            p.token_spec(last),
            p.state_spec,
            pl.BlockSpec((None, None, 2 * p.H, BLOCK_T), lambda b, d, t: (b, d, 0, last - t)),
            pl.BlockSpec((None, GROUP, p.block), lambda b, d, t: (b, 0, d)),
            p.state_spec,
        ],
        out_shape=[
            jax.ShapeDtypeStruct(p.x.shape, x.dtype),
            jax.ShapeDtypeStruct(p.x.shape, dt.dtype),
            shape_BHD,
            jax.ShapeDtypeStruct((p.grid[0], p.grid[1], 2 * p.H, p.T), jnp.float32),
            jax.ShapeDtypeStruct((p.grid[0], GROUP, p.x.shape[2]), jnp.float32),
            shape_BHD,
        ],
        scratch_shapes=[
            *[p.rows_scratch()] * 3,
            pltpu.VMEM((BLOCK_T, LANES), jnp.float32),
            pltpu.VMEM((BLOCK_T, GROUP * p.H), p.dtype),
            *[pltpu.VMEM((BLOCK_T, GROUP * p.H), jnp.float32)] * 2,
            pltpu.VMEM((p.tiles, (CHUNK + 1) * p.H, LANES), jnp.float32),
        ],
        compiler_params=p.params,
    )(*p.arrays, dlast_BHD, p.pad_tokens(dy), states_CBHD)
    T, width, H = x.shape[1], x.shape[2], A.shape[1]
    dBC_BTX = jnp.swapaxes(jnp.sum(dBC_BNXT, axis=1), 1, 2)[:, :T]
    return (
        dx[:, :T, :width],
        ddt[:, :T, :width],
        jnp.sum(dA_BHD, axis=0)[:H, :width].T.astype(A.dtype),
        dBC_BTX[..., :H].astype(B.dtype),
        dBC_BTX[..., p.H : p.H + H].astype(C.dtype),
        jnp.sum(dD_BGD, axis=(0, 1))[:width].astype(D.dtype),
        jnp.swapaxes(dfirst_BHD[:, :H, :width], 1, 2),
    )


class _Padded:
    """The arguments as the kernels take them, filled up to whole blocks, and where their blocks lie."""

    def __init__(self, x, dt, A, B, C, D, marks):
        self.H = A.shape[1] + -A.shape[1] % 16
        self.tiles = tiles_per_block(x.shape[2], max(1, MAX_ROWS // self.H))
        self.block = self.tiles * LANES
        self.dtype = jnp.dtype(jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32)
        self.x = self.pad_tokens(x)
        batch, self.T, width = self.x.shape
        self.grid = batch, width // self.block, self.T // BLOCK_T
        marks_B1T = self._pad(marks, T=1)[:, None]
        rates_HD = self._pad(jnp.minimum(A.astype(jnp.float32), MAX_A).T * LOG2E, H=0, D=1)
        BC_BTX = jnp.concatenate([self._pad(a, T=1, H=2).astype(jnp.float32) for a in (B, C)], axis=2)
        D_1D = self._pad(D.astype(jnp.float32)[None], D=1)
        self.arrays = marks_B1T, self.x, self.pad_tokens(dt), rates_HD, jnp.swapaxes(BC_BTX, 1, 2), D_1D
        self.state_spec = pl.BlockSpec((None, self.H, self.block), lambda b, d, t: (b, 0, d))
        self.params = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))

    def _pad(self, a, **axes):
        widths = [(0, 0)] * a.ndim
        for name, axis in axes.items():
            multiple = {"T": BLOCK_T, "H": 16, "D": self.block}[name]
            widths[axis] = (0, -a.shape[axis] % multiple)
        return jnp.pad(a, widths)

    def pad_tokens(self, a_BTD):
        return self._pad(a_BTD, T=1, D=2)

    def pad_state(self, a_BHD):
        return self._pad(a_BHD, H=a_BHD.ndim - 2, D=a_BHD.ndim - 1)

    def specs(self, last=None):
        """Blocks of `arrays`; from the block `last` on backwards, if it is given."""
        at = self._order(last)
        return [
            pl.BlockSpec((None, 1, BLOCK_T), lambda b, d, t: (b, 0, at(t))),
            self.token_spec(last),
            self.token_spec(last),
            pl.BlockSpec((self.H, self.block), lambda b, d, t: (0, d)),
            pl.BlockSpec((None, 2 * self.H, BLOCK_T), lambda b, d, t: (b, 0, at(t))),
            pl.BlockSpec((1, self.block), lambda b, d, t: (0, d)),
        ]

    def token_spec(self, last=None):
        at = self._order(last)
        return pl.BlockSpec((None, BLOCK_T, self.block), lambda b, d, t: (b, at(t), d))

    def states_spec(self, last=None):
        at = self._order(last)
        return pl.BlockSpec((BLOCK_T // CHUNK, None, self.H, self.block), lambda b, d, t: (at(t), b, 0, d))

    def rows_scratch(self):
        """A row of one tile can be loaded as a broadcast over sublanes; one of wider arrays cannot."""
        return pltpu.VMEM((self.tiles, BLOCK_T, LANES), jnp.float32)

    @staticmethod
    def _order(last):
        return (lambda t: t) if last is None else (lambda t: last - t)


def _forward_kernel(
    marks_1L, x_LD, dt_LD, A_HD, BC_XL, D_1D, first_HD, y_LD, states_CHD, h_HD, u_NLD, span_NLD, marks_LD, C_LX
):
    H = A_HD.shape[0]
    tiles = list(enumerate(_tiles(A_HD)))

    @pl.when(pl.program_id(2) == 0)
    def _():
        h_HD[...] = first_HD[...]

    marks_LD[...] = _columns(marks_1L[...])
    for n, at in tiles:
        x, dt, span_NLD[n] = _tokens(marks_LD[...], x_LD[:, at], dt_LD[:, at])
        u_NLD[n] = dt * x
    C_LX[...] = _blocks(BC_XL[H:, :], C_LX.dtype)

    def chunk(c, carry):
        start = pl.multiple_of(c * CHUNK, CHUNK)
        states_CHD[c] = h_HD[...]
        B_HL = pltpu.roll(BC_XL[:H, :], BLOCK_T - start, axis=1)
        h = [h_HD[:, at] for _, at in tiles]
        for pair in range(0, CHUNK, 2 * GROUP):  # A tile of bfloat16 has 16 rows.
            y = [[], []]
            for half in (0, 1):
                hs = [[] for _ in tiles]
                first = pair + half * GROUP
                for t in range(first, first + GROUP):
                    B = _column(B_HL, t)
                    row = pl.ds(start + t, 1)
                    for n, at in tiles:
                        h[n] = jnp.exp2(span_NLD[n, row, :] * A_HD[:, at]) * h[n] + u_NLD[n, row, :] * B
                        hs[n].append(h[n])
                C = C_LX[pl.ds(start + pair, 2 * GROUP), :][half * GROUP : (half + 1) * GROUP]
                y[half] = [_dot(C, jnp.concatenate(hs[n]).astype(C.dtype)) for n, _ in tiles]
            for n, at in tiles:
                rows = pl.ds(start + pair, 2 * GROUP)
                x, _, _ = _tokens(marks_LD[rows, :], x_LD[rows, at], dt_LD[rows, at])
                y_LD[rows, at] = (jnp.concatenate([y[0][n], y[1][n]]) + D_1D[:, at] * x).astype(y_LD.dtype)
        for n, at in tiles:
            h_HD[:, at] = h[n]
        return carry

    jax.lax.fori_loop(0, BLOCK_T // CHUNK, chunk, None)


def _backward_kernel(
    marks_1L,
    x_LD,
    dt_LD,
    A_HD,
    BC_XL,
    D_1D,
    dlast_HD,
    dy_LD,
    states_CHD,
    dx_LD,
    ddt_LD,
    dA_HD,
    dBC_XL,
    dD_GD,
    dh_HD,
    u_NLD,
    span_NLD,
    dy_NLD,
    marks_LD,
    B_LX,
    dB_LX,
    dC_LX,
    h_NXD,
):
    H = A_HD.shape[0]
    tiles = list(enumerate(_tiles(A_HD)))
    dtype = B_LX.dtype

    @pl.when(pl.program_id(2) == 0)
    def _():
        dh_HD[...] = dlast_HD[...]
        dA_HD[...] = jnp.zeros_like(dA_HD)
        dD_GD[...] = jnp.zeros_like(dD_GD)

    marks_LD[...] = _columns(marks_1L[...])
    for n, at in tiles:
        x, dt, span_NLD[n] = _tokens(marks_LD[...], x_LD[:, at], dt_LD[:, at])
        u_NLD[n] = dt * x
        dy_NLD[n] = jnp.where(marks_LD[...] > 0, dy_LD[:, at].astype(jnp.float32), 0)
    B_LX[...] = _blocks(BC_XL[:H, :], dtype)
    ones_GX = _is_own(GROUP, H).astype(dtype)

    def chunk(i, carry):
        c = BLOCK_T // CHUNK - 1 - i
        start = pl.multiple_of(c * CHUNK, CHUNK)
        BC = pltpu.roll(BC_XL[...], BLOCK_T - start, axis=1)
        B_HL, C_HL = BC[:H], BC[H:]
        # 1. The states again: the one before token t at rows t H.
        h = [states_CHD[c, :, at] for _, at in tiles]
        for n, _ in tiles:
            h_NXD[n, :H, :] = h[n]
        for t in range(CHUNK):
            B = _column(B_HL, t)
            row = pl.ds(start + t, 1)
            for n, at in tiles:
                h[n] = jnp.exp2(span_NLD[n, row, :] * A_HD[:, at]) * h[n] + u_NLD[n, row, :] * B
                h_NXD[n, (t + 1) * H : (t + 2) * H, :] = h[n]
        # 2. The gradients, from the last token to the first.
        dh = [dh_HD[:, at] for _, at in tiles]
        dA = [dA_HD[:, at] for _, at in tiles]
        for pair in reversed(range(0, CHUNK, 2 * GROUP)):
            du, dspan = [[], []], [[], []]
            for half in (1, 0):
                first = pair + half * GROUP
                rows = pl.ds(start + first, GROUP)
                gs, dlogs = [[] for _ in tiles], [[] for _ in tiles]  # Filled from the last to the first.
                for t in reversed(range(GROUP)):
                    C = _column(C_HL, first + t)
                    row = pl.ds(start + first + t, 1)
                    for n, at in tiles:
                        span, A = span_NLD[n, row, :], A_HD[:, at]
                        g = dh[n] + dy_NLD[n, row, :] * C
                        dh[n] = jnp.exp2(span * A) * g
                        dlog = dh[n] * h_NXD[n, (first + t) * H : (first + t + 1) * H, :]
                        dA[n] += dlog * span
                        gs[n].insert(0, g)
                        dlogs[n].insert(0, dlog * A)
                B = B_LX[pl.ds(start + pair, 2 * GROUP), :][half * GROUP : (half + 1) * GROUP]
                dB, dC = [], []
                for n, _ in tiles:
                    g_XD = jnp.concatenate(gs[n]).astype(dtype)
                    h_XD = h_NXD[n, (first + 1) * H : (first + 1 + GROUP) * H, :].astype(dtype)
                    dB.append(_dot(u_NLD[n, rows, :].astype(dtype), g_XD.T))
                    dC.append(_dot(dy_NLD[n, rows, :].astype(dtype), h_XD.T))
                    du[half].append(_dot(B, g_XD))
                    dspan[half].append(_dot(ones_GX, jnp.concatenate(dlogs[n]).astype(dtype)))
                dB_LX[rows, :], dC_LX[rows, :] = sum(dB), sum(dC)
            rows = pl.ds(start + pair, 2 * GROUP)
            for n, at in tiles:
                x, dt, _ = _tokens(marks_LD[rows, :], x_LD[rows, at], dt_LD[rows, at])
                du_LD = jnp.concatenate([du[0][n], du[1][n]])
                dspan_LD = jnp.concatenate([dspan[0][n], dspan[1][n]]) / LOG2E
                dy = dy_NLD[n, rows, :]
                dx_LD[rows, at] = (du_LD * dt + D_1D[:, at] * dy).astype(dx_LD.dtype)
                dD_GD[:, at] += (dy * x)[:GROUP] + (dy * x)[GROUP:]
                ddt_LD[rows, at] = (du_LD * x + jnp.where(marks_LD[rows, :] > 0, dspan_LD, 0)).astype(ddt_LD.dtype)
        for n, at in tiles:
            dh_HD[:, at], dA_HD[:, at] = dh[n], dA[n]
        return carry

    jax.lax.fori_loop(0, BLOCK_T // CHUNK, chunk, None)
    dBC_XL[:H, :] = _diagonal(dB_LX[...])
    dBC_XL[H:, :] = _diagonal(dC_LX[...])


def _tiles(a_HD):
    return [slice(d, d + LANES) for d in range(0, a_HD.shape[1], LANES)]


def _columns(marks_1L):
    """Turns a row into a column, repeated on all lanes."""
    return jnp.broadcast_to(marks_1L.astype(jnp.float32), (LANES, marks_1L.shape[1])).T


def _tokens(marks_LD, x_LD, dt_LD):
    """Returns x, dt, and dt as decays see it: padding changes nothing, a document's first token forgets everything."""
    x_LD, dt_LD = (jnp.where(marks_LD > 0, a.astype(jnp.float32), 0) for a in (x_LD, dt_LD))
    return x_LD, dt_LD, jnp.where(marks_LD == 2, FOREVER, dt_LD)


def _column(a_HL, t):
    return jnp.broadcast_to(a_HL[:, t : t + 1], (a_HL.shape[0], LANES))


def _is_own(L, H):
    """Which of the lanes (token of a group, row) belong to the token of a row, `LX`."""
    t, lane = (jax.lax.broadcasted_iota(jnp.int32, (L, GROUP * H), axis) for axis in (0, 1))
    return jax.lax.rem(t, GROUP) == jax.lax.div(lane, H)


def _spread(H):
    """Copies rows of the state to each token of a group, `HX`."""
    h, lane = (jax.lax.broadcasted_iota(jnp.int32, (H, GROUP * H), axis) for axis in (0, 1))
    return (h == jax.lax.rem(lane, H)).astype(jnp.float32)


def _blocks(a_HL, dtype):
    """Lays the columns of all tokens out block by block: `LX`."""
    H, L = a_HL.shape
    return jnp.where(_is_own(L, H), _dot(a_HL.T.astype(dtype), _spread(H).astype(dtype)), 0).astype(dtype)


def _diagonal(a_LX):
    """Undoes `_blocks`: returns each token's own block as a column, `HL`."""
    L, X = a_LX.shape
    return _dot(_spread(X // GROUP), jnp.where(_is_own(L, X // GROUP), a_LX, 0).T)


def _dot(a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
