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
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.documents import clear_padding
from pallas_kernels.common.head_blocks import REAL, STARTS, Blocks, as_float32, cut, flags, widen
from pallas_kernels.common.heads import TILE
from pallas_kernels.common.walk import PARAMS, is_exact
from pallas_kernels.delta_rule import tpu_scalar_kernels as kernels
from pallas_kernels.delta_rule.tpu_scalar_kernels import CHUNK, Rule

# exp(-128) is 0 in float32: closed gates (-inf, too) stop here.
_MIN_LOG = -128.0


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
    )(call.mark(segment_ids), call.pack_gates(beta, g, segment_ids), *call.pack(q, k, v), state_BNHP)
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
        call.mark(segment_ids),
        call.pack_gates(beta, g, segment_ids),
        *call.pack(q, k, v),
        blocks.values.to_kernel(widen(do, 3)),
        states,
        inverse,
        dlast_BNHP,
    )
    dgates = jnp.moveaxis(dgates[:, :, :, : blocks.size], (2, 4), (0, 2)).reshape(2, blocks.B, -1, blocks.N)
    dg_BTN, dbeta_BTN = dgates[:, :, : blocks.T]
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

    def mark(self, segment_ids):
        """Returns how many documents have begun in its chunk up to each token, -1 for padding; float32 `B1T`."""
        flags_B1CL = flags(segment_ids, CHUNK).reshape(segment_ids.shape[0], 1, -1, CHUNK)
        started = jnp.cumsum(flags_B1CL & STARTS > 0, axis=3)
        marks = jnp.where(flags_B1CL & REAL > 0, started, -1).astype(jnp.float32)
        return marks.reshape(marks.shape[0], 1, -1)

    def pack_gates(self, beta, g, segment_ids):
        """Returns the logs of g cumulated within chunks, in parts, and beta: `[B groups X 8 T]`.

        With two parts, one is a multiple of 1/64, whose sums are exact, and one a small rest: differences lose nothing
        where a decay of -30 stands beside one of -0.01. Beside bfloat16 products one part is enough.
        """
        blocks = self.blocks
        g_BTN = jnp.maximum(clear_padding(g, segment_ids), _MIN_LOG)
        parts = [g_BTN]
        if self.exact:
            coarse_BTN = jnp.ceil(g_BTN * 64) / 64
            parts = [coarse_BTN, g_BTN - coarse_BTN]
        # A constant of the program: XLA would take longer to make it than to multiply by it.
        upper_LL = np.triu(np.ones((CHUNK, CHUNK), np.float32))
        in_rows = [self._rows(x) for x in parts]
        logs = [jnp.einsum("BnhCL,LM->BnhCM", x, upper_LL, precision="highest") for x in in_rows]
        rows = jnp.stack([*logs, self._rows(clear_padding(beta, segment_ids))], axis=2)
        rows = rows.reshape(*rows.shape[:4], -1)
        return jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, TILE - blocks.size), (0, 0)))

    def _rows(self, x_BTN):
        blocks = self.blocks
        x_BTN = jnp.pad(x_BTN, ((0, 0), (0, -blocks.T % CHUNK), (0, 0))).astype(jnp.float32)
        return jnp.moveaxis(x_BTN.reshape(blocks.B, -1, CHUNK, blocks.grid[1], blocks.size), (3, 4), (1, 2))
