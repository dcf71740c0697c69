"""Decays within a chunk, one per head or one per key channel, without ever taking `exp` of a positive number.

Both classes answer the same questions about a chunk of L tokens whose log-decays are g. With d(j, i] for the decay
`exp(g[j+1] + ... + g[i])` that token i sees of what token j wrote:

    scores[i, j] = sum_h x[i, h] k[j, h] d(j, i][h]   for j <= i in one document
    reads[i]     = d(start, i]                        for tokens in the document of the state before the chunk
    writes[j]    = d(j, end]                          for tokens in the document of the state after the chunk
    keep         = d(start, end]                      where the two states belong to one document

With `before=True` a token reads the state as it was before its own decay and write (RWKV): in scores and reads the
decay ends at i - 1 instead of i, and scores are for j < i.

Logs are cumulated within the chunk and subtracted. So that differences lose nothing where a decay of -30 stands beside
one of -0.01, each log is cut in a multiple of 1/64, whose sums are exact, and a small rest, whose sums are small.

The gradient of g comes out of four sums. Call `pairs[i, j]` the gradient of the logarithm of what token i reads of
token j, `rows[i]` that of what it reads of the state before the chunk, `puts[j]` that of what token j leaves in the
state after the chunk, `whole` that of keep. The decay of token t (i > t with `before`) stands in

    dg[t] = sum_{j < t <= i} pairs[i, j] + sum_{i >= t} rows[i] + sum_{j < t} puts[j] + whole

The first sum is that of pairs over all i >= t, their rows, less that over all j >= t, their columns, and kernels whose
operands are bfloat16 take it so. But most pairs are in both: float32 loses digits, and here no difference is taken.

X is 1 or H. R counts the readers that share keys and decays: x is q, or q and k.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.common import blocks
from pallas_kernels.common.accurate import accurate
from pallas_kernels.common.chunks import Segments

# exp(-128) is 0 in float32: closed gates (-inf, too) stop here.
_MIN_LOG = -128.0


def lower(L: int, diagonal: int = 0) -> jax.Array:
    """Which pairs have j <= i + diagonal, `111111LL`."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, 1, L, L), axis) for axis in (5, 6))
    return i + diagonal >= j


def _sum_over(which_LL: jax.Array, x_CBKGLX: jax.Array) -> jax.Array:
    """Sums over the tokens j that `which[i, j]` tells, in float32 on every platform."""
    which_LL = which_LL.reshape(which_LL.shape[-2:]).astype(x_CBKGLX.dtype)
    if x_CBKGLX.shape[-1] == 1:
        return jnp.einsum("CBKGS,LS->CBKGL", x_CBKGLX[..., 0], which_LL, precision="highest")[..., None]
    # Broadcast first: XLA on CPU would otherwise transpose both sides of the product.
    which_CBKGLS = jnp.broadcast_to(which_LL, (*x_CBKGLX.shape[:-1], which_LL.shape[-1]))
    return jnp.matmul(which_CBKGLS, x_CBKGLX, precision="highest")


def _exp_difference(later: list[jax.Array], earlier: list[jax.Array]) -> jax.Array:
    """exp of the difference of two cumulative logs, each in its two parts; at most 1 however it rounds."""
    return jnp.exp(jnp.minimum((later[0] - earlier[0]) + (later[1] - earlier[1]), 0))


def _product(subscripts: str, exactly: bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
    product = functools.partial(jnp.einsum, subscripts)
    return functools.partial(accurate, product) if exactly else product


class _Decay:
    def __init__(self, g_CBKGLX: jax.Array, segments: Segments, before: bool = False):
        self._before, self._L = before, g_CBKGLX.shape[-2]
        g_CBKGLX = jnp.maximum(g_CBKGLX, _MIN_LOG)
        coarse_CBKGLX = jnp.ceil(g_CBKGLX * 64) / 64
        parts = coarse_CBKGLX, g_CBKGLX - coarse_CBKGLX
        self._cols = [_sum_over(lower(self._L), part_CBKGLX) for part_CBKGLX in parts]
        self._rows = [x - part for x, part in zip(self._cols, parts, strict=True)] if before else self._cols
        seen_CB111LL = segments.same_CB111LL & lower(self._L, -1 if before else 0)
        self._seen_CB111LL = seen_CB111LL
        end = [col_CBKGLX[..., -1:, :] for col_CBKGLX in self._cols]
        start = [jnp.zeros_like(end[0])] * 2
        self.reads_CBKGLX = jnp.where(segments.reads_CB11L1, _exp_difference(self._rows, start), 0)
        self.writes_CBKGLX = jnp.where(segments.writes_CB11L1, _exp_difference(end, self._cols), 0)
        self.keep_CBKGX1 = jnp.where(segments.through_CB1111, _exp_difference(end, start).mT, 0)

    def gradient(self, pairs_CBKGLX, rows_CBKGLX, puts_CBKGLX, whole_CBKGX) -> jax.Array:
        """Returns the gradient of g from the sums over pairs, the rows, the puts and the whole."""
        later_CBKGLX = _sum_over(lower(self._L, -1 if self._before else 0).mT, rows_CBKGLX)
        return pairs_CBKGLX + later_CBKGLX + _sum_over(lower(self._L, -1), puts_CBKGLX) + whole_CBKGX[..., None, :]


class HeadDecay(_Decay):
    """One decay per head and token. The value heads of one key head share the products of queries and keys."""

    def _pairs(self) -> jax.Array:
        d_CBKGLS = _exp_difference(self._rows, [col_CBKGL1.mT for col_CBKGL1 in self._cols])
        return jnp.where(self._seen_CB111LL, d_CBKGLS[:, :, :, None], 0)

    def scores(self, x_CBKRLH: jax.Array, k_CBKLH: jax.Array, exactly: bool = False) -> jax.Array:
        """Returns `CBKRGLS`, zero but for the pairs that see each other; `exactly`: right to the last bit or so."""
        product_CBKRLS = _product("CBKRLH,CBKSH->CBKRLS", exactly)(x_CBKRLH, k_CBKLH)
        return product_CBKRLS[:, :, :, :, None] * self._pairs()

    def scores_backward(self, d_CBKRGLS, scores_CBKRGLS, x_CBKRLH, k_CBKLH):
        """Returns the gradients of x and k, and the sums over pairs, given that of the scores, and the scores."""
        dproduct_CBKRLS = jnp.sum(d_CBKRGLS * self._pairs(), axis=4)
        dlog_CBKGLS = jnp.sum(d_CBKRGLS * scores_CBKRGLS, axis=3)
        later_LL = jnp.squeeze(lower(self._L, -1 if self._before else 0)).mT.astype(dlog_CBKGLS.dtype)
        later_CBKGLS = jnp.einsum("LM,CBKGMS->CBKGLS", later_LL, dlog_CBKGLS, precision="highest")
        return (
            jnp.einsum("CBKRLS,CBKSH->CBKRLH", dproduct_CBKRLS, k_CBKLH),
            jnp.einsum("CBKRLS,CBKRLH->CBKSH", dproduct_CBKRLS, x_CBKRLH),
            jnp.sum(jnp.where(lower(self._L, -1)[0], later_CBKGLS, 0), axis=-1)[..., None],
        )

    @staticmethod
    def apply(x_CBKLH: jax.Array, factors_CBKGLX: jax.Array, S_CBKGHP: jax.Array) -> jax.Array:
        """Returns what x reads of S, each token's read multiplied by its factor."""
        if S_CBKGHP.shape[3] == 1:  # As written below, XLA would take the transposed product and turn it around.
            read_CBKGLP = jnp.einsum("CBKLH,CBKHP->CBKLP", x_CBKLH, S_CBKGHP[:, :, :, 0])[:, :, :, None]
        else:
            read_CBKGLP = jnp.einsum("CBKLH,CBKGHP->CBKGLP", x_CBKLH, S_CBKGHP)
        return read_CBKGLP * factors_CBKGLX

    @staticmethod
    def outer(x_CBKLH: jax.Array, factors_CBKGLX: jax.Array, y_CBKGLP: jax.Array) -> jax.Array:
        """Returns the sum over tokens of x y^T times the token's factor."""
        y_CBKGLP = factors_CBKGLX * y_CBKGLP
        if y_CBKGLP.shape[3] == 1:
            return jnp.einsum("CBKLH,CBKLP->CBKHP", x_CBKLH, y_CBKGLP[:, :, :, 0])[:, :, :, None]
        return jnp.einsum("CBKLH,CBKGLP->CBKGHP", x_CBKLH, y_CBKGLP)

    @staticmethod
    def log_sum(x_CBKGLH: jax.Array) -> jax.Array:
        """Sums over what shares one log-decay."""
        return jnp.sum(x_CBKGLH, axis=-1, keepdims=True)


class ChannelDecay(_Decay):
    """One decay per key channel and token.

    Over a whole chunk d(j, i] does not factor in two numbers that are both at most 1. It does for every i beyond a
    border and every j before it: d(j, i] = d(j, border] d(border, i]. So pairs are taken by block doubling: blocks of m
    tokens, two by two, the border between them, one matmul (m x H by H x m) for each two. Every pair of tokens meets at
    exactly one m = 1, 2, 4 .. L / 2. Borders lie in the past of the row that is read: later tokens change no bit of it.
    """

    def _factors(self, m: int) -> tuple[jax.Array, jax.Array]:
        """Returns d(border, i] of each second block and d(j, border] of each first block of m tokens."""
        shape = (*self._cols[0].shape[:-2], self._L // (2 * m), 2, m, self._cols[0].shape[-1])
        cols, rows = [x.reshape(shape) for x in self._cols], [x.reshape(shape) for x in self._rows]
        border = [x_CBKGnmH[..., 0, -1:, :] for x_CBKGnmH in cols]
        return (
            _exp_difference([x[..., 1, :, :] for x in rows], border),
            _exp_difference(border, [x[..., 0, :, :] for x in cols]),
        )

    def _level(self, m: int, x_CBKRLH: jax.Array, k_CBKLH: jax.Array):
        """Returns the rows of each second and the keys of each first block of m, decayed from and to the border."""
        heads, tails = self._factors(m)
        C, B, K, R, L, H = x_CBKRLH.shape
        x = x_CBKRLH.reshape(C, B, K, R, 1, L // (2 * m), 2, m, H)[..., 1, :, :] * heads[:, :, :, None]
        k = k_CBKLH.reshape(C, B, K, 1, L // (2 * m), 2, m, H)[..., 0, :, :] * tails
        # Kept apart from the products: fused with their transposition they would take three times as long on a CPU.
        x, k = jax.lax.optimization_barrier((x, k))
        return x, k, heads, tails

    def _sizes(self) -> list[int]:
        return [1 << level for level in range(self._L.bit_length() - 1)]

    def scores(self, x_CBKRLH: jax.Array, k_CBKLH: jax.Array, exactly: bool = False) -> jax.Array:
        """Returns `CBKRGLS`, zero but for the pairs that see each other; `exactly`: right to the last bit or so."""
        own_CBKRL = jnp.sum(x_CBKRLH * k_CBKLH[:, :, :, None], axis=-1)
        C, B, K, R, L = own_CBKRL.shape
        scores = jnp.broadcast_to(own_CBKRL[:, :, :, :, None], (C, B, K, R, self._cols[0].shape[3], L))[..., None, None]
        for m in self._sizes():
            x, k, _, _ = self._level(m, x_CBKRLH, k_CBKLH)
            scores = blocks.merge(scores, _product("CBKRGnLH,CBKGnSH->CBKRGnLS", exactly)(x, k))
        return jnp.where(self._seen_CB111LL, scores[..., 0, :, :], 0)

    def scores_backward(self, d_CBKRGLS, scores_CBKRGLS, x_CBKRLH, k_CBKLH):
        """Returns the gradients of x and k, and the sums over pairs, given that of the scores."""
        del scores_CBKRGLS  # the sums need the channels apart
        d = jnp.where(self._seen_CB111LL, d_CBKRGLS, 0)[..., None, :, :]
        *lead, R, G, _, L, H = (*d.shape[:-1], x_CBKRLH.shape[-1])
        dx_CBKRGLH, dk_CBKGLH = jnp.zeros((*lead, R, G, L, H), d.dtype), jnp.zeros((*lead, G, L, H), d.dtype)
        pairs_CBKGLH = jnp.zeros_like(dk_CBKGLH)
        logs = lambda: (
            jnp.sum(x_CBKRLH[:, :, :, :, None] * dx_CBKRGLH, axis=3),
            k_CBKLH[:, :, :, None] * dk_CBKGLH,
        )
        for m in reversed(self._sizes()):
            # What pairs of larger blocks put between these two: all of it lies before or after one of them.
            rows, cols = (jnp.sum(x.reshape(*lead, G, L // (2 * m), 2, m, H), axis=-2) for x in logs())
            between = jnp.stack([rows[..., 1, :], cols[..., 0, :]], axis=-2)[..., None, :]
            pairs_CBKGLH += jnp.broadcast_to(between, (*between.shape[:-2], m, H)).reshape(pairs_CBKGLH.shape)
            d, below = blocks.part(d)
            x, k, heads, tails = self._level(m, x_CBKRLH, k_CBKLH)
            dx = jnp.einsum("CBKRGnLS,CBKGnSH->CBKRGnLH", below, k) * heads[:, :, :, None]
            dk = jnp.einsum("CBKRGnLS,CBKRGnLH->CBKGnSH", below, x) * tails
            dx_CBKRGLH += jnp.stack([jnp.zeros_like(dx), dx], axis=-3).reshape(dx_CBKRGLH.shape)
            dk_CBKGLH += jnp.stack([dk, jnp.zeros_like(dk)], axis=-3).reshape(dk_CBKGLH.shape)
        if not self._before:
            pairs_CBKGLH += logs()[0]
        own_CBKRL1 = jnp.sum(d[..., 0], axis=4)
        dx_CBKRLH = jnp.sum(dx_CBKRGLH, axis=4) + own_CBKRL1 * k_CBKLH[:, :, :, None]
        dk_CBKLH = jnp.sum(dk_CBKGLH, axis=3) + jnp.sum(own_CBKRL1 * x_CBKRLH, axis=3)
        return dx_CBKRLH, dk_CBKLH, pairs_CBKGLH

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
