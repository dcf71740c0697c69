"""Linear attention with one decay per head and token on TPU, as in Mamba-2: https://arxiv.org/abs/2405.21060.

The maths is that of `xla.py` and the decays those of `common/decays.py`, in chunks of 128 tokens: the side of a matrix
unit. A grid step takes one or two chunks of up to eight heads: while the products of one head are under way, those of
others are issued. The states stay in VMEM while a row is walked; documents are followed in the kernels, and padding is
masked there, because a pass of XLA over an array costs as much as a kernel's reading it.

The backward pass is two kernels: `states` walks the row again and leaves the state before each step in HBM, `backward`
goes from the last step to the first. Had the forward pass kept these states, 256 bytes per token and head of width 128
(q, k, v and o in bfloat16 are 1024), `states` would not be needed: by libtpu's schedule and its bandwidth 1.0 of 8.9
cycles on v5e. It is run all the same: the residuals are the inputs then, one contract for all platforms, a forward pass
is the same whether it is differentiated or not, and a block under `jax.checkpoint` writes no states only to drop them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.gates import cumulative_logs, documents, from_tiles, to_tiles
from pallas_kernels.common.head_blocks import Blocks, as_float32, cut, widen
from pallas_kernels.common.heads import TILE
from pallas_kernels.common.walk import CHUNK, PARAMS, is_exact
from pallas_kernels.linear_attention import tpu_scalar_kernels as kernels


def forward(scale, before, q, k, v, g, state, segment_ids):
    """Returns (o, state)."""
    call, state_BNHP = _Call(scale, before, q, k, v), widen(state, 2, 3)
    o, last_BNHP = pl.pallas_call(
        functools.partial(kernels.forward, call.rule, call.blocks),
        name="linear_attention_forward",
        grid=call.blocks.grid,
        in_specs=[call.documents, call.logs, call.keys, call.keys, call.values, call.state],
        out_specs=[call.values, call.state],
        out_shape=[call.blocks.values.shape(v.dtype), as_float32(state_BNHP)],
        compiler_params=PARAMS,
    )(*call.gates(g, segment_ids), *call.pack(q, k, v), state_BNHP)
    return call.blocks.values.from_kernel(o)[..., : v.shape[3]], cut(last_BNHP, state)


def backward(scale, before, inputs, cotangents):
    """Returns the gradients of q, k, v, g and state."""
    q, k, v, g, state, segment_ids = inputs
    do, dlast = cotangents
    call, state_BNHP, dlast_BNHP = _Call(scale, before, q, k, v), widen(state, 2, 3), widen(dlast, 2, 3)
    gates, (q_packed, k_packed, v_packed), blocks = call.gates(g, segment_ids), call.pack(q, k, v), call.blocks
    (num_groups, num_steps), of_heads = blocks.grid[1:], (blocks.size, blocks.H, blocks.P)
    states = pl.pallas_call(
        functools.partial(kernels.states, call.rule, blocks),
        name="linear_attention_states",
        grid=blocks.grid,
        in_specs=[call.documents, call.logs, call.keys, call.values, call.state],
        out_specs=call.states,
        out_shape=jax.ShapeDtypeStruct((blocks.B, num_steps, *state_BNHP.shape[1:]), jnp.float32),
        scratch_shapes=[pltpu.VMEM(of_heads, jnp.float32)],
        compiler_params=PARAMS,
    )(*gates, k_packed, v_packed, state_BNHP)

    call = _Call(scale, before, q, k, v, backwards=True)
    dq, dk, dv, dg, dstate_BNHP = pl.pallas_call(
        functools.partial(kernels.backward, call.rule, blocks),
        name="linear_attention_backward",
        grid=blocks.grid,
        in_specs=[
            *[call.documents, call.logs, call.keys, call.keys, call.values, call.values],
            *[call.states, call.state],
        ],
        out_specs=[call.dkeys, call.dkeys, call.values, call.dg, call.state],
        out_shape=[
            *[blocks.dkeys.shape(x.dtype if blocks.parts == 1 else jnp.float32) for x in (q, k)],
            blocks.values.shape(v.dtype),
            jax.ShapeDtypeStruct((blocks.B, num_groups, 1, TILE, num_steps * blocks.length), jnp.float32),
            as_float32(dlast_BNHP),
        ],
        scratch_shapes=[
            pltpu.VMEM(of_heads, jnp.float32),
            pltpu.VMEM((max(1, blocks.length // CHUNK - 1), *of_heads), jnp.float32),
        ],
        compiler_params=PARAMS,
    )(*gates, q_packed, k_packed, v_packed, blocks.values.to_kernel(widen(do, 3)), states, dlast_BNHP)
    return (
        blocks.key_gradient(dq, q),
        blocks.key_gradient(dk, k),
        blocks.values.from_kernel(dv)[..., : v.shape[3]],
        from_tiles(dg, blocks)[0].astype(g.dtype),
        cut(dstate_BNHP, state),
    )


class _Call:
    """The blocks of the kernels' arguments. Grid: rows, groups of heads, steps along the row, perhaps in reverse."""

    def __init__(self, scale, before, q, k, v, backwards=False):
        num_chunks = pl.cdiv(v.shape[1], CHUNK)
        self.blocks = blocks = Blocks(q, v, CHUNK if num_chunks % 2 else 2 * CHUNK)
        self.rule = kernels.Rule(scale, is_exact(q, k, v), before)
        spec, num_steps = blocks.specs(backwards), blocks.grid[2]
        step = lambda c: num_steps - 1 - c if backwards else c
        along = lambda *X: pl.BlockSpec((None, None, *X, TILE, blocks.length), lambda b, n, c: (b, n, 0, 0, step(c)))
        self.documents, self.state = spec.flags, spec.state
        self.keys, self.dkeys, self.values = spec.keys, spec.dkeys, spec.values
        self.logs, self.dg = along((1 + self.rule.exact) * (1 + before)), along(None)
        of_heads = blocks.size, blocks.H, blocks.P
        self.states = pl.BlockSpec((None, None, *of_heads), lambda b, n, c: (b, step(c), n, 0, 0))

    def gates(self, g, segment_ids):
        """Returns the documents and the logs of g cumulated within chunks: up to each token, then also before it."""
        blocks, exact = self.blocks, self.rule.exact
        logs = cumulative_logs(g, segment_ids, blocks, exact)
        if self.rule.before:
            logs += cumulative_logs(g, segment_ids, blocks, exact, before=True)
        return documents(segment_ids, blocks.length), to_tiles(logs)

    def pack(self, q, k, v):
        heads = self.blocks.keys, self.blocks.keys, self.blocks.values
        return [head.to_kernel(widen(x, 3)) for head, x in zip(heads, (q, k, v), strict=True)]
