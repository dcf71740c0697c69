"""`block_sparse_attention` on TPU: queries that share their blocks with others, or have their own."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import tpu_groups, tpu_tokens


def unsupported(options, q, k, v):
    """Returns why these arguments need another implementation, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q {q.dtype}, k {k.dtype} and v {v.dtype}; they have to be float32 or bfloat16, all the same"
    if options.block_size % 16 or options.block_size > 512:
        return f"blocks of {options.block_size} keys; they have to be a multiple of 16, at most 512"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"heads wider than 256, and here keys have {q.shape[3]} and values {v.shape[3]}"
    return None


def forward(options, q, k, v, block_ids, segment_ids):
    """Returns `(o, lse)` and the same residuals as `xla.forward`."""
    if tpu_groups.fills_rows(options, q, k):
        return tpu_groups.forward(options, q, k, v, block_ids, segment_ids)
    each, ids = _each_query(options, q, block_ids)
    out, (*_, o, lse) = tpu_tokens.forward(each, q, k, v, ids, segment_ids)
    return out, (q, k, v, block_ids, segment_ids, o, lse)


def backward(options, residuals, cotangents):
    """Returns the gradients of q, k and v."""
    q, k, v, block_ids, *rest = residuals
    if tpu_groups.fills_rows(options, q, k):
        return tpu_groups.backward(options, residuals, cotangents)
    each, ids = _each_query(options, q, block_ids)
    return tpu_tokens.backward(each, (q, k, v, ids, *rest), cotangents)


def _each_query(options, q, block_ids):
    """Returns options and ids as if no queries shared theirs."""
    ids_BTKJ = jnp.repeat(block_ids, options.query_block, axis=1)[:, : q.shape[1]]
    return dataclasses.replace(options, query_block=1), ids_BTKJ
