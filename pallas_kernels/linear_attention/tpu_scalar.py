"""Linear attention with one decay per head and token on TPU, as in Mamba-2: https://arxiv.org/abs/2405.21060.

The maths is that of `xla.py` and the decays those of `common/decays.py`, in chunks of 128 tokens: the side of a matrix
unit. A grid step takes one or two chunks of up to eight heads: while the products of one head are under way, those of
others are issued. The states stay in VMEM while a row is walked; documents are followed in the kernels, and padding is
masked there, because a pass of XLA over an array costs as much as a kernel's reading it.

The backward pass is two kernels: `states` walks the row again and leaves the state before each step in HBM, `backward`
goes from the last step to the first. Had the forward pass kept these states, 256 bytes per token and head of width 128
(q, k, v and o in bfloat16 are 1024), `states` would not be needed: by libtpu's schedule and its bandwidth 1.0 of 8.2
cycles on v5e. It is run all the same: the residuals are the inputs then, one contract for all platforms, a forward pass
is the same whether it is differentiated or not, and a block under `jax.checkpoint` writes no states only to drop them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention import tpu_layout
from pallas_kernels.linear_attention import tpu_scalar_kernels as kernels
from pallas_kernels.linear_attention.tpu_layout import CHUNK, TILE, Heads, Tiles

_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=48 * 1024 * 1024
)
# The document of the last real token so far.
_DOCUMENT = pltpu.VMEM((1, 1), jnp.float32)


def unsupported(q, k, v, g):
    """Returns why these arguments need another implementation, or None."""
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or q.dtype not in (jnp.float32, jnp.bfloat16) or g.dtype != jnp.float32:
        return f"q {q.dtype}, k {k.dtype}, v {v.dtype}; they have to be all float32, or all bfloat16"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"heads wider than 256, and here keys have {q.shape[3]} and values {v.shape[3]}"
    return None


def forward(scale, before, q, k, v, g, state, segment_ids):
    """Returns (o, state)."""
    call = _Call(q, k, v, before)
    logs, ids = call.gates(g, segment_ids)
    o, last = pl.pallas_call(
        functools.partial(kernels.forward, scale, before),
        name="linear_attention_forward",
        grid=call.tiles.grid,
        in_specs=[call.keys, call.keys, call.values, call.logs, call.ids, call.state],
        out_specs=[call.values, call.state],
        out_shape=[call.value_heads.shape(*call.padded), call.state_shape],
        scratch_shapes=[_DOCUMENT],
        compiler_params=_PARAMS,
    )(*call.pack(q, k, v), logs, ids, call.pad_state(state))
    return call.value_heads.unpack(o, q.shape[1]), _cut(last, state)


def backward(scale, before, inputs, cotangents):
    """Returns the gradients of q, k, v, g and state."""
    q, k, v, g, state, segment_ids = inputs
    do, dlast = cotangents
    call = _Call(q, k, v, before)
    logs, ids = call.gates(g, segment_ids)
    q_packed, k_packed, v_packed = call.pack(q, k, v)
    tiles, num_steps = call.tiles, call.tiles.grid[2]
    states, documents = pl.pallas_call(
        functools.partial(kernels.states, before),
        name="linear_attention_states",
        grid=tiles.grid,
        in_specs=[call.keys, call.values, call.logs, call.ids, call.state],
        out_specs=[call.states, call.documents],
        out_shape=[
            jax.ShapeDtypeStruct((num_steps, *call.state_shape.shape), jnp.float32),
            jax.ShapeDtypeStruct((*tiles.grid, 1, 1), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((tiles.heads, *call.state_shape.shape[2:]), jnp.float32),
            _DOCUMENT,
        ],
        compiler_params=_PARAMS,
    )(k_packed, v_packed, logs, ids, call.pad_state(state))

    call = _Call(q, k, v, before, reverse=True)
    dq, dk, dv, sums, dstate = pl.pallas_call(
        functools.partial(kernels.backward, scale, before),
        name="linear_attention_backward",
        grid=tiles.grid,
        in_specs=[
            call.keys,
            call.keys,
            call.values,
            call.values,
            call.logs,
            call.ids,
            call.states,
            call.documents,
            call.state,
        ],
        out_specs=[call.key_gradients, call.key_gradients, call.values, call.sums, call.state],
        out_shape=[
            call.key_gradient_heads.shape(*call.padded),
            call.key_gradient_heads.shape(*call.padded),
            call.value_heads.shape(*call.padded),
            jax.ShapeDtypeStruct((tiles.B, tiles.grid[1], 3, TILE, tiles.padded_T), jnp.float32),
            call.state_shape,
        ],
        scratch_shapes=[
            pltpu.VMEM((max(1, tiles.tokens // CHUNK - 1), tiles.heads, *call.state_shape.shape[2:]), jnp.float32),
        ],
        compiler_params=_PARAMS,
    )(
        q_packed,
        k_packed,
        v_packed,
        call.value_heads.pack(do, tiles.padded_T),
        logs,
        ids,
        states,
        documents,
        call.pad_state(dlast),
    )
    T = q.shape[1]
    return (
        call.key_gradient(dq, q),
        call.key_gradient(dk, k),
        call.value_heads.unpack(dv, T),
        tpu_layout.gate_gradient(sums, segment_ids, tiles, before).astype(g.dtype),
        _cut(dstate, state),
    )


def _cut(state, like):
    return state[:, :, : like.shape[2], : like.shape[3]]


class _Call:
    """The blocks of the kernels' arguments. Grid: rows, blocks of heads, steps along the row, perhaps in reverse."""

    def __init__(self, q, k, v, before, reverse=False):
        (B, T, N, P), (K, H) = v.shape, k.shape[2:]
        self.tiles = tiles = Tiles(B, T, K, N, H, P)
        self.before, self.dtype = before, q.dtype
        self.padded = B, tiles.padded_T
        num_steps = tiles.grid[2]
        step = (lambda c: num_steps - 1 - c) if reverse else (lambda c: c)
        at = lambda b, n, c: (b, n, step(c))
        self.key_heads = Heads(tiles.key_heads, K, H, q.dtype)
        self.value_heads = Heads(tiles.heads, N, P, v.dtype)
        parts = tiles.num_parts
        self.key_gradient_heads = Heads(tiles.key_heads, K * parts, H, q.dtype if parts == 1 else jnp.dtype("float32"))
        self.keys = self.key_heads.spec(tiles.tokens, lambda b, n, c: (b, jax.lax.div(n, parts), step(c)))
        self.key_gradients = self.key_gradient_heads.spec(tiles.tokens, at)
        self.values = self.value_heads.spec(tiles.tokens, at)
        num_logs = (1 if q.dtype == jnp.bfloat16 else 2) * (1 + before)
        along = lambda X: pl.BlockSpec((None, None, X, TILE, tiles.tokens), lambda b, n, c: (b, n, 0, 0, step(c)))
        self.logs, self.sums = along(num_logs), along(3)
        self.ids = pl.BlockSpec((None, 1, tiles.tokens), lambda b, n, c: (b, 0, step(c)))
        self.documents = pl.BlockSpec((None, None, None, 1, 1), lambda b, n, c: (b, n, step(c), 0, 0))
        self.state_shape = jax.ShapeDtypeStruct(tiles.state_shape(), jnp.float32)
        block = (tiles.heads, *tiles.state_shape()[2:])
        self.state = pl.BlockSpec((None, *block), lambda b, n, c: (b, n, 0, 0))
        self.states = pl.BlockSpec((None, None, *block), lambda b, n, c: (step(c), b, n, 0, 0))

    def pack(self, q, k, v):
        T = self.tiles.padded_T
        return self.key_heads.pack(q, T), self.key_heads.pack(k, T), self.value_heads.pack(v, T)

    def pad_state(self, state):
        return jnp.pad(state, [(0, to - size) for to, size in zip(self.state_shape.shape, state.shape, strict=True)])

    def gates(self, g, segment_ids):
        """Returns the cumulative logs, and the documents `[B 1 T]` in float32, which kernels can take a maximum of."""
        tiles, num_parts = self.tiles, 1 if self.dtype == jnp.bfloat16 else 2
        ids_BT = jnp.pad(segment_ids, ((0, 0), (0, tiles.padded_T - tiles.T))).astype(jnp.float32)
        return tpu_layout.cumulative_logs(g, segment_ids, tiles, num_parts, self.before), ids_BT[:, None]

    def key_gradient(self, packed, like):
        d_BTKH = self.key_gradient_heads.unpack(packed, like.shape[1])
        if self.tiles.num_parts > 1:
            d_BTKH = jnp.sum(d_BTKH.reshape(*like.shape[:3], self.tiles.num_parts, like.shape[3]), axis=3)
        return d_BTKH.astype(like.dtype)
