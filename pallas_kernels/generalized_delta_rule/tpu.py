"""The generalized delta rule on TPU.

The mathematics is that of `xla.py`, in chunks of 128 tokens, with the decays of `common/doubling.py`; states are walked
turned around, `S_PH`. What a token reads before its own decay is what the token before it would have read after its
own: so a is moved up by a token, reads with the decays of q, and what it found is moved down again. The first token of
a chunk reads the state before it as it is.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import walk
from pallas_kernels.common.head_blocks import Blocks, flags, widen
from pallas_kernels.common.walk import CHUNK, PARAMS
from pallas_kernels.generalized_delta_rule import tpu_kernels as kernels


def unsupported(q, k, v, a, b, g):
    """Returns why these arguments need another implementation, or None."""
    if any(x.dtype not in (jnp.float32, jnp.bfloat16) for x in (a, b)):
        return f"a {a.dtype} and b {b.dtype}; they have to be float32 or bfloat16"
    if walk.is_exact(q, k, v, a, b) and min(q.shape[3], v.shape[3]) > 128:
        return f"keys and values that are both wider than 128 in float32, here {q.shape[3]} and {v.shape[3]}"
    return walk.unsupported(q, k, v, g)


def forward(keep, scale, q, k, v, a, b, g, state, segment_ids):
    """Returns (o, state) and, if they are to be kept, the states `BCNPH` before each chunk and the inverses `BCNLL`."""
    rule, call = kernels.Rule(scale, walk.is_exact(q, k, v, a, b)), _Call(q, k, v, a, b)
    blocks, spec, state_BNHP = call.blocks, call.blocks.specs(), widen(state, 2, 3)
    o, last_BNHP, *kept = pl.pallas_call(
        functools.partial(kernels.forward, rule, blocks),
        name="generalized_delta_rule",
        grid=blocks.grid,
        in_specs=[spec.flags, *[spec.keys] * 4, spec.values, spec.decays, spec.state],
        out_specs=[spec.values, spec.state, *([spec.states, call.inverse_spec()] if keep else [])],
        out_shape=[blocks.values.shape(v.dtype), _like(state_BNHP), *(call.kept() if keep else [])],
        scratch_shapes=[pltpu.VMEM((blocks.size, blocks.P, blocks.H), jnp.float32)],
        compiler_params=PARAMS,
    )(flags(segment_ids, CHUNK), *call.pack(q, k, v, a, b, g), state_BNHP)
    outputs = blocks.values.from_kernel(o)[..., : v.shape[3]], _cut(last_BNHP, *state.shape[2:])
    return outputs, kept


def backward(scale, residuals, cotangents):
    """Returns the gradients of q, k, v, a, b, g and state."""
    q, k, v, a, b, g, _, segment_ids, states_BCNPH, inverse_BCNLL = residuals
    do, dlast = cotangents
    rule, call = kernels.Rule(scale, walk.is_exact(q, k, v, a, b)), _Call(q, k, v, a, b, backwards=True)
    blocks, spec, dlast_BNHP = call.blocks, call.blocks.specs(backwards=True), widen(dlast, 2, 3)
    dq, dk, da, db, dv, dg, dstate_BNHP = pl.pallas_call(
        functools.partial(kernels.backward, rule, blocks),
        name="generalized_delta_rule_backward",
        grid=blocks.grid,
        in_specs=[
            *[spec.flags, *[spec.keys] * 4, spec.values, spec.decays],
            *[spec.values, spec.states, call.inverse_spec(), spec.state],
        ],
        out_specs=[*[spec.dkeys] * 4, spec.values, spec.decays, spec.state],
        out_shape=[
            *[blocks.dkeys.shape(x.dtype if blocks.parts == 1 else jnp.float32) for x in (q, k, a, b)],
            blocks.values.shape(v.dtype),
            blocks.decays.shape(jnp.float32),
            _like(dlast_BNHP),
        ],
        scratch_shapes=[pltpu.VMEM((blocks.size, blocks.P, blocks.H), jnp.float32)],
        compiler_params=PARAMS,
    )(
        *[flags(segment_ids, CHUNK), *call.pack(q, k, v, a, b, g)],
        *[blocks.values.to_kernel(widen(do, 3)), states_BCNPH, inverse_BCNLL, dlast_BNHP],
    )
    dg_BTNH = blocks.decays.from_kernel(dg)[..., : k.shape[3]]
    return (
        blocks.key_gradient(dq, q),
        blocks.key_gradient(dk, k),
        blocks.values.from_kernel(dv)[..., : v.shape[3]],
        blocks.key_gradient(da, a),
        blocks.key_gradient(db, b),
        dg_BTNH if g.ndim == 4 else jnp.sum(dg_BTNH, axis=3),
        _cut(dstate_BNHP, *dlast.shape[2:]),
    )


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _cut(x: jax.Array, num_rows: int, num_columns: int) -> jax.Array:
    return x[..., :num_rows, :num_columns]


class _Call:
    """Blocks of the arguments and of what is kept for the backward pass."""

    def __init__(self, q, k, v, a, b, backwards=False):
        self.blocks = Blocks(q, v, CHUNK)
        self._dtype = jnp.float32 if walk.is_exact(q, k, v, a, b) else jnp.bfloat16
        num_chunks = self.blocks.grid[2]
        self._chunk = lambda c: num_chunks - 1 - c if backwards else c

    def pack(self, q, k, v, a, b, g):
        """Returns q, k, a, b, v and g as the kernels take them; a decay per token is one for all channels."""
        if g.ndim == 3:
            g = jnp.broadcast_to(g[..., None], (*g.shape, k.shape[3]))
        q, k, v, g = self.blocks.pack(q, k, v, g)
        a, b = (self.blocks.keys.to_kernel(widen(x, 3)) for x in (a, b))
        return q, k, a, b, v, g

    def kept(self):
        """Returns the shapes of the states before each chunk and of the inverses."""
        lead = self.blocks.B, self.blocks.grid[2], self.blocks.N
        shapes = (*lead, self.blocks.P, self.blocks.H), (*lead, CHUNK, CHUNK)
        return [jax.ShapeDtypeStruct(shape, self._dtype) for shape in shapes]

    def inverse_spec(self):
        shape = (None, None, self.blocks.size, CHUNK, CHUNK)
        return pl.BlockSpec(shape, lambda b, n, c: (b, self._chunk(c), n, 0, 0))
