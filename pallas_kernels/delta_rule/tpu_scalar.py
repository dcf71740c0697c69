"""The delta rule with one decay per token on TPU: DeltaNet, and Gated DeltaNet, https://arxiv.org/abs/2412.06464.

The maths is that of `xla.py`, in chunks of 128 tokens: the side of a matrix unit. Chunks of 64 would halve the last
level of the inverse, a tenth of the products, but double the traffic of states and the vector work on them. A grid step
takes a chunk of up to eight heads. States stay in VMEM while a row is walked. Documents are followed in the kernels and
padding is masked there: a pass of XLA over an array costs as much as a kernel's reading it.

States and inverses are kept for the backward pass, 512 bytes per token and head of width 128 in bfloat16 (q, k, v and o
are 1024), written and read in 1.9 cycles on v5e. To make them again is the forward pass but for its outputs, and the
inverses alone take 3.2 of its 6.2 cycles. A forward pass that is not differentiated writes none; one under
`jax.checkpoint` does, and still gains.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.gates import cumulative_logs, documents, from_tiles, rows, to_tiles
from pallas_kernels.common.head_blocks import Blocks, as_float32, cut, widen
from pallas_kernels.common.heads import TILE
from pallas_kernels.common.walk import CHUNK, PARAMS, is_exact
from pallas_kernels.delta_rule import tpu_scalar_kernels as kernels
from pallas_kernels.delta_rule.tpu_scalar_kernels import Rule


def forward(keep, scale, q, k, v, beta, g, state, segment_ids):
    """Returns (o, state) and, if they are to be kept, the states before each chunk and the inverses."""
    call = _Call(q, k, v)
    state_BNHP, kept = widen(state, 2, 3), call.kept(keep)
    o, last_BNHP, *kept = pl.pallas_call(
        functools.partial(kernels.forward, call.rule(scale), call.blocks),
        name="delta_rule_forward",
        grid=call.blocks.grid,
        in_specs=[call.documents, call.gates, call.keys, call.keys, call.values, call.state],
        out_specs=[call.values, call.state, *call.kept_specs[: len(kept)]],
        out_shape=[call.blocks.values.shape(v.dtype), as_float32(state_BNHP), *kept],
        scratch_shapes=[call.scratch],
        compiler_params=PARAMS,
    )(documents(segment_ids, CHUNK), call.gates_of(beta, g, segment_ids), *call.pack(q, k, v), state_BNHP)
    return (call.blocks.values.from_kernel(o)[..., : v.shape[3]], cut(last_BNHP, state)), kept


def backward(scale, residuals, cotangents):
    """Returns the gradients of q, k, v, beta, g and state."""
    q, k, v, beta, g, state, segment_ids, states, inverse = residuals
    do, dlast = cotangents
    call = _Call(q, k, v, backwards=True)
    blocks, dlast_BNHP = call.blocks, widen(dlast, 2, 3)
    num_groups, num_chunks = blocks.grid[1:]
    dq, dk, dv, dgates, dstate_BNHP = pl.pallas_call(
        functools.partial(kernels.backward, call.rule(scale), blocks),
        name="delta_rule_backward",
        grid=blocks.grid,
        in_specs=[
            *[call.documents, call.gates, call.keys, call.keys, call.values, call.values],
            *[*call.kept_specs, call.state],
        ],
        out_specs=[call.dkeys, call.dkeys, call.values, call.dgates, call.state],
        out_shape=[
            *[blocks.dkeys.shape(x.dtype if blocks.parts == 1 else jnp.float32) for x in (q, k)],
            blocks.values.shape(v.dtype),
            jax.ShapeDtypeStruct((blocks.B, num_groups, 2, TILE, num_chunks * CHUNK), jnp.float32),
            as_float32(dlast_BNHP),
        ],
        scratch_shapes=[call.scratch],
        compiler_params=PARAMS,
    )(
        documents(segment_ids, CHUNK),
        call.gates_of(beta, g, segment_ids),
        *call.pack(q, k, v),
        blocks.values.to_kernel(widen(do, 3)),
        states,
        inverse,
        dlast_BNHP,
    )
    dg_BTN, dbeta_BTN = from_tiles(dgates, blocks)
    return (
        blocks.key_gradient(dq, q),
        blocks.key_gradient(dk, k),
        blocks.values.from_kernel(dv)[..., : v.shape[3]],
        dbeta_BTN.astype(beta.dtype),
        dg_BTN.astype(g.dtype),
        cut(dstate_BNHP, state),
    )


class _Call:
    """The blocks of the kernels' arguments. Grid: rows, groups of heads, chunks, perhaps in reverse."""

    def __init__(self, q, k, v, backwards=False):
        self.blocks = blocks = Blocks(q, v, CHUNK)
        self.exact = is_exact(q, k, v)
        spec, num_chunks = blocks.specs(backwards), blocks.grid[2]
        chunk = lambda c: num_chunks - 1 - c if backwards else c
        along = lambda X: pl.BlockSpec((None, None, X, TILE, CHUNK), lambda b, n, c: (b, n, 0, 0, chunk(c)))
        each = lambda *dims: pl.BlockSpec((None, None, blocks.size, *dims), lambda b, n, c: (b, chunk(c), n, 0, 0))
        self.documents, self.state = spec.flags, spec.state
        self.keys, self.dkeys, self.values = spec.keys, spec.dkeys, spec.values
        self.gates, self.dgates = along(3 if self.exact else 2), along(2)
        self.kept_specs = [each(blocks.H, blocks.P), each(CHUNK, CHUNK)]
        self.scratch = pltpu.VMEM((blocks.size, blocks.H, blocks.P), jnp.float32)

    def rule(self, scale):
        return Rule(scale, self.exact)

    def kept(self, keep):
        shape = self.blocks.B, self.blocks.grid[2], self.blocks.N
        dtype = jnp.float32 if self.exact else jnp.bfloat16
        widths = [(self.blocks.H, self.blocks.P), (CHUNK, CHUNK)] if keep else []
        return [jax.ShapeDtypeStruct(shape + width, dtype) for width in widths]

    def pack(self, q, k, v):
        heads = self.blocks.keys, self.blocks.keys, self.blocks.values
        return [head.to_kernel(widen(x, 3)) for head, x in zip(heads, (q, k, v), strict=True)]

    def gates_of(self, beta, g, segment_ids):
        """Returns the logs of g cumulated within chunks, in parts, and beta: `[B groups X 8 T]`."""
        logs = cumulative_logs(g, segment_ids, self.blocks, self.exact)
        return to_tiles([*logs, rows(beta, segment_ids, self.blocks)])
