"""Decays within a chunk, one per head or one per key channel, without ever taking `exp` of a positive number.

Both classes answer the same questions about a chunk of L tokens whose log-decays are g. With d(j, i] for the decay
`exp(g[j+1] + ... + g[i])` that token i sees of what token j wrote:

    scores[i, j] = sum_h x[i, h] k[j, h] d(j, i][h]   for j <= i, or j < i, in one document
    reads[i]     = d(start, i]                        for tokens in the document of the state before the chunk
    writes[j]    = d(j, end]                          for tokens in the document of the state after the chunk
    keep         = d(start, end]                      where the two states belong to one document

With `before=True` a token reads the state as it was before its own decay and write (RWKV): in scores and reads the
decay ends at i - 1 instead of i.

The gradient of g comes out of four sums. Call `rows[i]` the gradient of the logarithm of all that token i reads,
`cols[j]` that of all that is read of token j within the chunk, `puts[j]` that of what token j leaves in the state after
the chunk, `whole` that of keep. The decay of token t stands in every read by i >= t (i > t with `before`) save in those
of tokens j >= t, in what the tokens before it leave, and in keep:

    dg[t] = sum_{i >= t} rows[i] - sum_{j >= t} cols[j] + sum_{j < t} puts[j] + whole

A token's read of itself (with `before`, of its neighbour) does not decay: where pairs are at hand it is left out of rows
and cols, in which it would only cancel.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common import blocks
from pallas_kernels.common.chunks import Segments

# exp(-128) is 0 in float32: closed gates (-inf, too) stop here.
_MIN_LOG = -128.0


def _lower(L: int, diagonal: int) -> jax.Array:
    """Which pairs have j <= i + diagonal, `111.. L L`."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, L, L), axis) for axis in (4, 5))
    return i + diagonal >= j


def _exp_difference(later: list[jax.Array], earlier: list[jax.Array]) -> jax.Array:
    """exp of the difference of two cumulative logs, each in a coarse and a fine part; at most 1 however it rounds."""
    return jnp.exp(jnp.minimum((later[0] - earlier[0]) + (later[1] - earlier[1]), 0))


class HeadDecay:
    """One decay per head and token. The value heads of one key head share the products of queries and keys.

    Pairs decay by differences of cumulative logs. So that these lose nothing where a decay of -30 stands beside one of
    -0.01, logs are cut in multiples of 1/64, whose sums and differences are exact, and the small rest.
    """

    def __init__(self, g_CBKGL: jax.Array, segments: Segments, before: bool = False):
        self._before, self._same_CB11LL, self._L = before, segments.same_CB11LL, g_CBKGL.shape[-1]
        g_CBKGL = jnp.maximum(g_CBKGL, _MIN_LOG)
        coarse_CBKGL = jnp.ceil(g_CBKGL * 64) / 64
        parts = coarse_CBKGL, g_CBKGL - coarse_CBKGL
        self._cols = [self._sum(part_CBKGL, _lower(self._L, 0)) for part_CBKGL in parts]
        self._rows = [self._sum(part_CBKGL, _lower(self._L, -1)) for part_CBKGL in parts] if before else self._cols
        end = [col_CBKGL[..., -1:] for col_CBKGL in self._cols]
        start = [jnp.zeros_like(end[0])] * 2
        self.reads_CBKGLX = jnp.where(segments.reads_CB11L1, _exp_difference(self._rows, start)[..., None], 0)
        self.writes_CBKGLX = jnp.where(segments.writes_CB11L1, _exp_difference(end, self._cols)[..., None], 0)
        self.keep_CBKGX1 = jnp.where(segments.through_CB1111, _exp_difference(end, start)[..., None], 0)

    @staticmethod
    def _sum(x_CBKGL: jax.Array, which_LL: jax.Array) -> jax.Array:
        return jnp.einsum("CBKGS,LS->CBKGL", x_CBKGL, which_LL[0, 0, 0, 0].astype(x_CBKGL.dtype), precision="highest")

    def _pairs(self, diagonal: int) -> jax.Array:
        d_CBKGLS = _exp_difference([x[..., :, None] for x in self._rows], [x[..., None, :] for x in self._cols])
        return jnp.where(self._same_CB11LL & _lower(self._L, diagonal), d_CBKGLS, 0)

    def scores(self, x_CBKLH: jax.Array, k_CBKLH: jax.Array, diagonal: int) -> jax.Array:
        """Returns `CBKGLS`, zero but for pairs j <= i + diagonal of one document."""
        return jnp.einsum("CBKLH,CBKSH->CBKLS", x_CBKLH, k_CBKLH)[:, :, :, None] * self._pairs(diagonal)

    def scores_backward(self, d_CBKGLS, scores_CBKGLS, x_CBKLH, k_CBKLH, diagonal: int):
        """Returns the gradients of x and k, rows and cols, given that of the scores and the scores themselves."""
        dproduct_CBKLS = jnp.sum(d_CBKGLS * self._pairs(diagonal), axis=3)
        decayed_LL = _lower(self._L, -2 if self._before else -1)
        dlog_CBKGLS = jnp.where(decayed_LL, d_CBKGLS * scores_CBKGLS, 0)
        return (
            jnp.einsum("CBKLS,CBKSH->CBKLH", dproduct_CBKLS, k_CBKLH),
            jnp.einsum("CBKLS,CBKLH->CBKSH", dproduct_CBKLS, x_CBKLH),
            jnp.sum(dlog_CBKGLS, axis=-1)[..., None],
            jnp.sum(dlog_CBKGLS, axis=-2)[..., None],
        )

    @staticmethod
    def apply(x_CBKLH: jax.Array, factors_CBKGLX: jax.Array, S_CBKGHP: jax.Array) -> jax.Array:
        """Returns what x reads of S, each token's read multiplied by its factor."""
        return jnp.einsum("CBKLH,CBKGHP->CBKGLP", x_CBKLH, S_CBKGHP) * factors_CBKGLX

    @staticmethod
    def outer(x_CBKLH: jax.Array, factors_CBKGLX: jax.Array, y_CBKGLP: jax.Array) -> jax.Array:
        """Returns the sum over tokens of x y^T times the token's factor."""
        return jnp.einsum("CBKLH,CBKGLP->CBKGHP", x_CBKLH, factors_CBKGLX * y_CBKGLP)

    @staticmethod
    def log_sum(x_CBKGLH: jax.Array) -> jax.Array:
        """Sums over what shares one log-decay."""
        return jnp.sum(x_CBKGLH, axis=-1, keepdims=True)

    def gradient(self, rows_CBKGLX, cols_CBKGLX, puts_CBKGLX, whole_CBKGX) -> jax.Array:
        """Returns the gradient of g, `CBKGL`."""
        later_LL = _lower(self._L, 0).mT
        return (
            self._sum(rows_CBKGLX[..., 0], _lower(self._L, -1).mT if self._before else later_LL)
            - self._sum(cols_CBKGLX[..., 0], later_LL)
            + self._sum(puts_CBKGLX[..., 0], _lower(self._L, -1))
            + whole_CBKGX
        )


class ChannelDecay:
    """One decay per key channel and token.

    Over a whole chunk exp(G_i - G_j) does not factor in two numbers that are both at most 1. It does for every i beyond
    a border and every j before it: d(j, i] = d(j, border] d(border, i]. So the pairs of a chunk are taken by block
    doubling: blocks of m tokens in pairs, the border between the two, one matmul of m x H by H x m for each pair. Each
    pair of tokens meets at exactly one m = 1, 2, 4 .. L / 2. The factors of blocks of 2m are those of blocks of m times
    the decay of the other half: products of numbers in [0, 1], which neither overflow nor cancel. Borders lie in the
    past of the row that is read: later tokens change no bit of it.
    """

    def __init__(self, g_CBKGLH: jax.Array, segments: Segments, before: bool = False):
        self._before, self._same_CB11LL = before, segments.same_CB11LL
        *lead, L, H = g_CBKGLH.shape
        decays = jnp.exp(jnp.maximum(g_CBKGLH, _MIN_LOG))
        # Of each block of m tokens: the decays from its start to each token, from each token to its end, and throughout.
        heads, tails, whole = (jnp.ones_like(decays) if before else decays), jnp.ones_like(decays), decays
        self._levels = []
        m = 1
        while m < L:
            pairs = (*lead, L // (2 * m), 2, m, H)
            heads, tails = heads.reshape(pairs), tails.reshape(pairs)
            self._levels.append((heads[..., 1, :, :], tails[..., 0, :, :]))
            whole = whole.reshape(*lead, L // (2 * m), 2, 1, H)
            first, second = whole[..., 0, :, :], whole[..., 1, :, :]
            heads = jnp.concatenate([heads[..., 0, :, :], heads[..., 1, :, :] * first], axis=-2)
            tails = jnp.concatenate([tails[..., 0, :, :] * second, tails[..., 1, :, :]], axis=-2)
            whole, m = first * second, 2 * m
            heads, tails, whole = jax.lax.optimization_barrier((heads, tails, whole))
        heads, tails = heads.reshape(g_CBKGLH.shape), tails.reshape(g_CBKGLH.shape)
        self.reads_CBKGLX = jnp.where(segments.reads_CB11L1, heads, 0)
        self.writes_CBKGLX = jnp.where(segments.writes_CB11L1, tails, 0)
        self.keep_CBKGX1 = jnp.where(segments.through_CB1111, whole.reshape(*lead, H, 1), 0)

    def scores(self, x_CBKLH: jax.Array, k_CBKLH: jax.Array, diagonal: int) -> jax.Array:
        """Returns `CBKGLS`, zero but for pairs j <= i + diagonal of one document."""
        *lead, L, _ = jnp.broadcast_shapes(x_CBKLH[:, :, :, None].shape, self.reads_CBKGLX.shape)
        own_CBKL = jnp.sum(x_CBKLH * k_CBKLH, axis=-1) if diagonal == 0 else jnp.zeros_like(x_CBKLH[..., 0])
        scores = jnp.broadcast_to(own_CBKL[:, :, :, None], (*lead, L))[..., None, None]
        for heads, tails in self._levels:
            x, k = _second(x_CBKLH, heads) * heads, _first(k_CBKLH, tails) * tails
            scores = blocks.merge(scores, jnp.einsum("...MH,...OH->...MO", x, k))
        return jnp.where(self._same_CB11LL, scores[..., 0, :, :], 0)

    def scores_backward(self, d_CBKGLS, scores_CBKGLS, x_CBKLH, k_CBKLH, diagonal: int):
        """Returns the gradients of x and k, rows and cols, given that of the scores."""
        del scores_CBKGLS  # the sums of rows and cols need the channels apart
        dblocks = jnp.where(self._same_CB11LL, d_CBKGLS, 0)[..., None, :, :]
        dx_CBKGLH, dk_CBKGLH = jnp.zeros_like(self.reads_CBKGLX), jnp.zeros_like(self.reads_CBKGLX)
        shape = dx_CBKGLH.shape
        for heads, tails in reversed(self._levels):
            dblocks, dbelow = blocks.part(dblocks)
            x, k = _second(x_CBKLH, heads) * heads, _first(k_CBKLH, tails) * tails
            dx = jnp.einsum("...MO,...OH->...MH", dbelow, k) * heads
            dk = jnp.einsum("...MO,...MH->...OH", dbelow, x) * tails
            dx_CBKGLH += jnp.stack([jnp.zeros_like(dx), dx], axis=-3).reshape(shape)
            dk_CBKGLH += jnp.stack([dk, jnp.zeros_like(dk)], axis=-3).reshape(shape)
        rows, cols = x_CBKLH[:, :, :, None] * dx_CBKGLH, k_CBKLH[:, :, :, None] * dk_CBKGLH
        dx_CBKLH, dk_CBKLH = jnp.sum(dx_CBKGLH, axis=3), jnp.sum(dk_CBKGLH, axis=3)
        if diagonal == 0:
            down_CBKL1 = jnp.sum(dblocks[..., 0, 0], axis=3)[..., None]
            dx_CBKLH, dk_CBKLH = dx_CBKLH + down_CBKL1 * k_CBKLH, dk_CBKLH + down_CBKL1 * x_CBKLH
        return dx_CBKLH, dk_CBKLH, rows, cols

    @staticmethod
    def apply(x_CBKLH: jax.Array, factors_CBKGLX: jax.Array, S_CBKGHP: jax.Array) -> jax.Array:
        """Returns what x reads of S, each channel of a token multiplied by its factor."""
        return jnp.einsum("CBKGLH,CBKGHP->CBKGLP", x_CBKLH[:, :, :, None] * factors_CBKGLX, S_CBKGHP)

    @staticmethod
    def outer(x_CBKLH: jax.Array, factors_CBKGLX: jax.Array, y_CBKGLP: jax.Array) -> jax.Array:
        """Returns the sum over tokens of x y^T, each channel of x times its factor."""
        return jnp.einsum("CBKGLH,CBKGLP->CBKGHP", x_CBKLH[:, :, :, None] * factors_CBKGLX, y_CBKGLP)

    @staticmethod
    def log_sum(x_CBKGLH: jax.Array) -> jax.Array:
        """Sums over what shares one log-decay: nothing."""
        return x_CBKGLH

    def gradient(self, rows_CBKGLX, cols_CBKGLX, puts_CBKGLX, whole_CBKGX) -> jax.Array:
        """Returns the gradient of g, `CBKGLH`."""
        L = rows_CBKGLX.shape[-2]
        if self._before:  # what token i reads decays up to i - 1
            rows_CBKGLX = jnp.pad(rows_CBKGLX[..., 1:, :], [(0, 0)] * 4 + [(0, 1), (0, 0)])
        later_CBKGLX = _matmul_each(_lower(L, 0).mT, rows_CBKGLX - cols_CBKGLX)
        return later_CBKGLX + _matmul_each(_lower(L, -1), puts_CBKGLX) + whole_CBKGX[..., None, :]


def _matmul_each(which_LL: jax.Array, x_CBKGLX: jax.Array) -> jax.Array:
    # Broadcast first: XLA on CPU would otherwise transpose both sides of the product.
    which_CBKGLL = jnp.broadcast_to(which_LL.astype(x_CBKGLX.dtype), (*x_CBKGLX.shape[:-1], which_LL.shape[-1]))
    return jnp.matmul(which_CBKGLL, x_CBKGLX, precision="highest")


def _halves(x_CBKLH: jax.Array, factors: jax.Array) -> jax.Array:
    """Cuts x in pairs of blocks as long as the factors' blocks."""
    *_, n, m, H = factors.shape
    return x_CBKLH.reshape(*x_CBKLH.shape[:3], 1, n, 2, m, H)


def _first(x_CBKLH: jax.Array, factors: jax.Array) -> jax.Array:
    return _halves(x_CBKLH, factors)[..., 0, :, :]


def _second(x_CBKLH: jax.Array, factors: jax.Array) -> jax.Array:
    return _halves(x_CBKLH, factors)[..., 1, :, :]
