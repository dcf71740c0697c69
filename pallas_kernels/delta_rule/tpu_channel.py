"""The delta rule with one decay per key channel, on TPU: Kimi Delta Attention, https://arxiv.org/abs/2510.26692."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import walk
from pallas_kernels.common.head_blocks import Blocks, flags, widen
from pallas_kernels.common.heads import TILE
from pallas_kernels.common.walk import CHUNK, PARAMS
from pallas_kernels.delta_rule import tpu_channel_kernels as kernels
from pallas_kernels.delta_rule.tpu_channel_kernels import Rule


def unsupported(q, k, v, g):
    """Returns why these arguments need another implementation, or None."""
    return walk.unsupported(q, k, v, g)


def forward(scale, q, k, v, beta, g, state, segment_ids):
    """Returns (o, state) and residuals. segment_ids are the user's: 0 is padding, where arguments may be anything."""
    rule, call = Rule(scale, walk.is_exact(q, k, v)), _Call(q, k, v)
    blocks, spec, state_BNHP = call.blocks, call.blocks.specs(), widen(state, 2, 3)
    kept = [call.states(rule), call.inverses(rule)]
    o, last_BNHP, *kept = pl.pallas_call(
        functools.partial(kernels.forward, rule, blocks),
        name="delta_rule_channel",
        grid=blocks.grid,
        in_specs=[spec.flags, spec.keys, spec.keys, spec.values, spec.decays, call.rows(), spec.state],
        out_specs=[spec.values, spec.state, spec.states, call.inverse_spec()],
        out_shape=[blocks.values.shape(v.dtype), _like(state_BNHP), *kept],
        scratch_shapes=[pltpu.VMEM((blocks.size, blocks.P, blocks.H), jnp.float32)],
        compiler_params=PARAMS,
    )(flags(segment_ids, CHUNK), *blocks.pack(q, k, v, g), call.to_rows(beta), state_BNHP)
    outputs = blocks.values.from_kernel(o)[..., : v.shape[3]], _cut(last_BNHP, state)
    return outputs, (q, k, v, beta, g, segment_ids, *kept)


def backward(scale, residuals, cotangents):
    """Returns the gradients of q, k, v, beta, g and state."""
    q, k, v, beta, g, segment_ids, states, inverses = residuals
    do, dlast = cotangents
    rule, call = Rule(scale, walk.is_exact(q, k, v)), _Call(q, k, v, backwards=True)
    blocks, spec, dlast_BNHP = call.blocks, call.blocks.specs(backwards=True), widen(dlast, 2, 3)
    dq, dk, dv, dg, dbeta, dstate_BNHP = pl.pallas_call(
        functools.partial(kernels.backward, rule, blocks),
        name="delta_rule_channel_backward",
        grid=blocks.grid,
        in_specs=[
            *[spec.flags, spec.keys, spec.keys, spec.values, spec.decays, call.rows()],
            *[spec.values, spec.states, call.inverse_spec(), spec.state],
        ],
        out_specs=[spec.dkeys, spec.dkeys, spec.values, spec.decays, call.rows(), spec.state],
        out_shape=[
            *[blocks.dkeys.shape(x.dtype if blocks.parts == 1 else jnp.float32) for x in (q, k)],
            blocks.values.shape(v.dtype),
            blocks.decays.shape(jnp.float32),
            jax.ShapeDtypeStruct(call.rows_shape, jnp.float32),
            _like(dlast_BNHP),
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
        _cut(dstate_BNHP, dlast),
    )


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _cut(x_BNHP: jax.Array, like: jax.Array) -> jax.Array:
    return x_BNHP[:, :, : like.shape[2], : like.shape[3]]


class _Call:
    """Blocks of what is one number per token and head, `B n 8 T`, and of what is kept for the backward pass."""

    def __init__(self, q, k, v, backwards=False):
        self.blocks = blocks = Blocks(q, v, CHUNK)
        num_groups, num_chunks = blocks.grid[1:]
        self._chunk = lambda c: num_chunks - 1 - c if backwards else c
        self.rows_shape = blocks.B, num_groups, TILE, num_chunks * CHUNK

    def rows(self):
        return pl.BlockSpec((None, None, TILE, CHUNK), lambda b, n, c: (b, n, 0, self._chunk(c)))

    def to_rows(self, x_BTN):
        B, num_groups, _, padded_T = self.rows_shape
        x_BnhT = jnp.moveaxis(x_BTN, 1, 2).reshape(B, num_groups, self.blocks.size, self.blocks.T)
        missing = (0, 0), (0, 0), (0, TILE - self.blocks.size), (0, padded_T - self.blocks.T)
        return jnp.pad(x_BnhT.astype(jnp.float32), missing)

    def from_rows(self, x_BnhT):
        x_BnhT = x_BnhT[:, :, : self.blocks.size, : self.blocks.T]
        return jnp.moveaxis(x_BnhT.reshape(self.blocks.B, self.blocks.N, self.blocks.T), 1, 2)

    def states(self, rule):
        blocks = self.blocks
        shape = blocks.B, blocks.grid[2], blocks.N, blocks.P, blocks.H
        return jax.ShapeDtypeStruct(shape, jnp.float32 if rule.exact else jnp.bfloat16)

    def inverses(self, rule):
        blocks = self.blocks
        shape = blocks.B, blocks.grid[2], blocks.N, CHUNK, CHUNK
        return jax.ShapeDtypeStruct(shape, jnp.float32 if rule.exact else jnp.bfloat16)

    def inverse_spec(self):
        shape = (None, None, self.blocks.size, CHUNK, CHUNK)
        return pl.BlockSpec(shape, lambda b, n, c: (b, self._chunk(c), n, 0, 0))
