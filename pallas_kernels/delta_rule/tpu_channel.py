"""The delta rule with one decay per key channel, on TPU: Kimi Delta Attention, https://arxiv.org/abs/2510.26692.

The maths is that of `xla.py`, in chunks of 128 tokens, with the decays of `common/doubling.py`; the kernels are in
`tpu_channel_kernels.py`. beta stands with the keys that write, w = beta k, and nowhere else: the rule is then linear
attention of q and of k over what w and the errors U wrote, save that U is the solution of a triangular system,

    (I + KW) U = V - reads (K S)        KW, QW: decayed scores, the former strictly lower
    O  = QW U + reads (Q S)
    S' = keep S + W^T (writes U)

and its gradients are those of linear attention with keys w, dU being followed through the system, dV = M^T dU with
M = (I + KW)^-1, and what k reads having the gradient -dV where what q reads has dO. dw is shared out to k and beta.

States are walked turned around, `S_PH`. Residuals are the states before each chunk and the inverses M: to walk the row
once more would cost most of the forward pass, they cost 0.94 cycles to write and the same to read.

Cycles per token and head, by the compiler's schedule, for 8 heads of H = P = 128 in bfloat16, beside the floors: what
passes between HBM and the kernel, and the products of matrices. Those are, forward, 2.5 for the seven levels of QW and
KW, 1.25 for the others, 0.9 for the inverse, whose factors are two bfloat16 numbers each; backward, 5.75 for levels.

                  v5e: schedule  HBM  products      v6e: schedule  HBM  products
    forward                 8.7  3.8       4.7                6.9  2.2       2.3
    backward               15.5  6.2      10.5               14.6  3.6       4.7

Forward, stores of what registers do not hold fill up while scores are made (95 %); then the inverses are bound by
latency. So all heads' scores are made first and all inverses together: two heads at a time took 11.2, four 10.5. What
the state holds for q and k, too, is made before them (9.4 without). Backward, the matrix unit is two thirds busy all
along and the heads' chains wait for one another. One product for the gradients that w gets from q and from k, where the
blocks of readers leave half of it empty, took 0.5 cycles away; the same in blocks of fewer than 8 tokens cost 2 for
moving rows; scores' gradients turned around rather than made twice took 0.2 away.

In float32 the errors of KW are those of U, ten times over where keys are alike: it is made by `accurate` products, and
the inverse is corrected once, with what float32 does not hold of KW. The gradient of g is summed level by level, so
that nothing cancels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import walk
from pallas_kernels.common.head_blocks import Blocks, as_float32, cut, flags, widen
from pallas_kernels.common.heads import TILE
from pallas_kernels.common.walk import CHUNK, PARAMS
from pallas_kernels.delta_rule import tpu_channel_kernels as kernels
from pallas_kernels.delta_rule.tpu_channel_kernels import Rule


def forward(keep, scale, q, k, v, beta, g, state, segment_ids):
    """Returns (o, state) and, if they are to be kept, the states `BCNPH` before each chunk and the inverses `BCNLL`.

    0 of segment_ids is padding, where all other arguments may be anything.
    """
    rule, call, state_BNHP = Rule(scale, walk.is_exact(q, k, v)), _Call(q, v), widen(state, 2, 3)
    blocks, spec, kept = call.blocks, call.blocks.specs(), call.blocks.kept(rule.exact) if keep else []
    o, last_BNHP, *kept = pl.pallas_call(
        functools.partial(kernels.forward, rule, blocks),
        name="delta_rule_channel",
        grid=blocks.grid,
        in_specs=[spec.flags, spec.keys, spec.keys, spec.values, spec.decays, call.rows, spec.state],
        out_specs=[spec.values, spec.state, *[spec.states, spec.inverses][: len(kept)]],
        out_shape=[blocks.values.shape(v.dtype), as_float32(state_BNHP), *kept],
        scratch_shapes=[pltpu.VMEM((blocks.size, blocks.P, blocks.H), jnp.float32)],
        compiler_params=PARAMS,
    )(flags(segment_ids, CHUNK), *blocks.pack(q, k, v, g), call.to_rows(beta), state_BNHP)
    return (blocks.values.from_kernel(o)[..., : v.shape[3]], cut(last_BNHP, state)), kept


def backward(scale, residuals, cotangents):
    """Returns the gradients of q, k, v, beta, g and state."""
    q, k, v, beta, g, state, segment_ids, states, inverses = residuals
    do, dlast = cotangents
    rule, call, dlast_BNHP = Rule(scale, walk.is_exact(q, k, v)), _Call(q, v, backwards=True), widen(dlast, 2, 3)
    blocks, spec = call.blocks, call.blocks.specs(backwards=True)
    dq, dk, dv, dg, dbeta, dstate_BNHP = pl.pallas_call(
        functools.partial(kernels.backward, rule, blocks),
        name="delta_rule_channel_backward",
        grid=blocks.grid,
        in_specs=[
            *[spec.flags, spec.keys, spec.keys, spec.values, spec.decays, call.rows],
            *[spec.values, spec.states, spec.inverses, spec.state],
        ],
        out_specs=[spec.dkeys, spec.dkeys, spec.values, spec.decays, call.rows, spec.state],
        out_shape=[
            *[blocks.dkeys.shape(x.dtype if blocks.parts == 1 else jnp.float32) for x in (q, k)],
            blocks.values.shape(v.dtype),
            blocks.decays.shape(jnp.float32),
            jax.ShapeDtypeStruct(call.rows_shape, jnp.float32),
            as_float32(dlast_BNHP),
        ],
        scratch_shapes=[pltpu.VMEM((blocks.size, blocks.P, blocks.H), jnp.float32)],
        compiler_params=PARAMS,
    )(
        *[flags(segment_ids, CHUNK), *blocks.pack(q, k, v, g), call.to_rows(beta)],
        *[blocks.values.to_kernel(widen(do, 3)), states, inverses, dlast_BNHP],
    )
    return (
        blocks.key_gradient(dq, q),
        blocks.key_gradient(dk, k),
        blocks.values.from_kernel(dv)[..., : v.shape[3]],
        call.from_rows(dbeta).astype(beta.dtype),
        blocks.decays.from_kernel(dg)[..., : g.shape[3]],
        cut(dstate_BNHP, state),
    )


class _Call:
    """How the kernels see what `Blocks` does not know: beta, in rows `[B groups 8 T]`."""

    def __init__(self, q, v, backwards=False):
        self.blocks = blocks = Blocks(q, v, CHUNK)
        _, num_groups, num_chunks = blocks.grid
        chunk = lambda c: num_chunks - 1 - c if backwards else c
        self.rows = pl.BlockSpec((None, None, TILE, CHUNK), lambda b, n, c: (b, n, 0, chunk(c)))
        self.rows_shape = blocks.B, num_groups, TILE, num_chunks * CHUNK

    def to_rows(self, x_BTN):
        B, num_groups, _, num_tokens = self.rows_shape
        x_BnhT = jnp.moveaxis(x_BTN, 1, 2).reshape(B, num_groups, self.blocks.size, self.blocks.T)
        missing = [(0, 0), (0, 0), (0, TILE - self.blocks.size), (0, num_tokens - self.blocks.T)]
        return jnp.pad(x_BnhT.astype(jnp.float32), missing)

    def from_rows(self, x_BnhT):
        B, T, N = self.blocks.B, self.blocks.T, self.blocks.N
        return jnp.moveaxis(x_BnhT[:, :, : self.blocks.size, :T].reshape(B, N, T), 1, 2)
