"""`block_sparse_attention` on TPU: queries that share their blocks with others, or have their own."""

import dataclasses
import functools

import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import tpu_groups, tpu_tokens
from pallas_kernels.block_sparse_attention.selection import canonical, of_softmax
from pallas_kernels.block_sparse_attention.tpu_layout import by_head, lanes

# Of k and v together, which stay in VMEM.
_MAX_GRADIENT_BYTES = 32 * 2**20


def unsupported(options, q, k, v, block_ids):
    """Returns why these arguments need another implementation, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q {q.dtype}, k {k.dtype} and v {v.dtype}; they have to be float32 or bfloat16, all the same"
    if options.block_size % 16 or options.block_size > 512:
        return f"blocks of {options.block_size} keys; they have to be a multiple of 16, at most 512"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"heads wider than 256, and here keys have {q.shape[3]} and values {v.shape[3]}"
    if tpu_groups.fills_rows(options, q, k):
        num_ids = tpu_groups.num_ids(options, q, k, block_ids) // (k.shape[0] * k.shape[2])
        if num_ids > tpu_groups.MAX_IDS:
            return f"more than {tpu_groups.MAX_IDS} ids to a head, and here are {num_ids}"
    return None


def forward(options, q, k, v, block_ids, segment_ids):
    """Returns `(o, lse)` and the same residuals as `xla.forward`."""
    o, lse_BTN = _call("forward", options, (), q, k, v, block_ids, segment_ids)
    lse = jnp.moveaxis(lse_BTN, 1, 2)
    return (o, lse), (q, k, v, block_ids, segment_ids, o, lse)


def backward(options, residuals, cotangents):
    """Returns the gradients of q, k and v, taking as many keys at a time as there is memory for their gradients."""
    q, k, v, block_ids, segment_ids, o, lse = residuals
    do, dlse = cotangents
    shift_BTN, lse_BTN = of_softmax(o, lse, do, dlse)
    L, S = options.block_size, k.shape[1]
    most = max(_MAX_GRADIENT_BYTES // (4 * (lanes(k.shape[3]) + lanes(v.shape[3]))) // L, 1) * L
    run = lambda dtype, at, ids: _call(
        "backward", options, (dtype, at), q, k[:, at], v[:, at], ids, segment_ids, lse_BTN, do, shift_BTN
    )
    if most >= S:
        return run(q.dtype, slice(0, S), block_ids)
    parts = []
    for start in range(0, S, most):
        at = slice(start, min(start + most, S))
        ids = canonical(block_ids - start // L, -(-(at.stop - start) // L))
        parts.append(run(jnp.dtype(jnp.float32), at, ids))
    dq, dk, dv = zip(*parts, strict=True)
    return functools.reduce(jnp.add, dq).astype(q.dtype), jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1)


def _call(direction, options, statics, q, k, v, block_ids, *rest):
    """Calls the kernels that fit, for all heads at once if there are not too many ids."""
    if not tpu_groups.fills_rows(options, q, k):
        # As if no queries shared their ids.
        block_ids = jnp.repeat(block_ids, options.query_block, axis=1)[:, : q.shape[1]]
        options = dataclasses.replace(options, query_block=1)
        return getattr(tpu_tokens, direction)(options, *statics, q, k, v, block_ids, *rest)
    kernels = functools.partial(getattr(tpu_groups, direction), options, *statics)
    if tpu_groups.num_ids(options, q, k, block_ids) > tpu_groups.MAX_IDS:
        return by_head(kernels, k.shape[2], q, k, v, block_ids, *rest)
    return kernels(q, k, v, block_ids, *rest)
