"""The generalized delta rule on TPU.

The mathematics is that of `xla.py`, in chunks of 128 tokens, with the decays of `common/doubling.py`; states are walked
turned around, `S_PH`. What a token reads before its own decay is what the token before it would have read after its
own: so a is moved up by a token, reads with the decays of q, and what it found is moved down again. The first token of
a chunk reads the state before it as it is.

In float32 what is read of b u^T and of k v^T is large and cancels, all but a hundredth where keys are alike. So scores
are `accurate`, both reads are one sum, and what the inverse gives is corrected with it, and with what float32 does not
hold of the scores.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import walk
from pallas_kernels.common.head_blocks import Blocks, as_float32, cut, flags, widen
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
    rule, blocks = kernels.Rule(scale, walk.is_exact(q, k, v, a, b)), Blocks(q, v, CHUNK)
    spec, state_BNHP, kept = blocks.specs(), widen(state, 2, 3), blocks.kept(rule.exact) if keep else []
    o, last_BNHP, *kept = pl.pallas_call(
        functools.partial(kernels.forward, rule, blocks),
        name="generalized_delta_rule",
        grid=blocks.grid,
        in_specs=[spec.flags, *[spec.keys] * 4, spec.values, spec.decays, spec.state],
        out_specs=[spec.values, spec.state, *[spec.states, spec.inverses][: len(kept)]],
        out_shape=[blocks.values.shape(v.dtype), as_float32(state_BNHP), *kept],
        scratch_shapes=[pltpu.VMEM((blocks.size, blocks.P, blocks.H), jnp.float32)],
        compiler_params=PARAMS,
    )(flags(segment_ids, CHUNK), *_pack(blocks, q, k, v, a, b, g), state_BNHP)
    outputs = blocks.values.from_kernel(o)[..., : v.shape[3]], cut(last_BNHP, state)
    return outputs, kept


def backward(scale, residuals, cotangents):
    """Returns the gradients of q, k, v, a, b, g and state."""
    q, k, v, a, b, g, state, segment_ids, states_BCNPH, inverse_BCNLL = residuals
    do, dlast = cotangents
    rule, blocks = kernels.Rule(scale, walk.is_exact(q, k, v, a, b)), Blocks(q, v, CHUNK)
    spec, dlast_BNHP = blocks.specs(backwards=True), widen(dlast, 2, 3)
    dq, dk, da, db, dv, dg, dstate_BNHP = pl.pallas_call(
        functools.partial(kernels.backward, rule, blocks),
        name="generalized_delta_rule_backward",
        grid=blocks.grid,
        in_specs=[
            *[spec.flags, *[spec.keys] * 4, spec.values, spec.decays],
            *[spec.values, spec.states, spec.inverses, spec.state],
        ],
        out_specs=[*[spec.dkeys] * 4, spec.values, spec.decays, spec.state],
        out_shape=[
            *[blocks.dkeys.shape(x.dtype if blocks.parts == 1 else jnp.float32) for x in (q, k, a, b)],
            blocks.values.shape(v.dtype),
            blocks.decays.shape(jnp.float32),
            as_float32(dlast_BNHP),
        ],
        scratch_shapes=[pltpu.VMEM((blocks.size, blocks.P, blocks.H), jnp.float32)],
        compiler_params=PARAMS,
    )(
        *[flags(segment_ids, CHUNK), *_pack(blocks, q, k, v, a, b, g)],
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
        cut(dstate_BNHP, state),
    )


def _pack(blocks, q, k, v, a, b, g):
    """Returns q, k, a, b, v and g as the kernels take them; a decay per token is one for all channels."""
    if g.ndim == 3:
        g = jnp.broadcast_to(g[..., None], (*g.shape, k.shape[3]))
    q, k, v, g = blocks.pack(q, k, v, g)
    a, b = (blocks.keys.to_kernel(widen(x, 3)) for x in (a, b))
    return q, k, a, b, v, g
