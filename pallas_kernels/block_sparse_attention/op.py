"""Softmax attention to blocks of keys that are chosen by data: NSA, MoBA, Quest, and fixed patterns."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.block_sparse_attention import ref, tpu, xla
from pallas_kernels.block_sparse_attention.selection import Options, canonical
from pallas_kernels.common.dispatch import check_impl, dispatch, supported
from pallas_kernels.common.shapes import check_shapes


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K P"],
    block_ids: Int[Array, "B U K J"],
    *,
    block_size: int,
    query_block: int = 1,
    window_size: int | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    impl: Literal["ref", "xla", "tpu"] | None = None,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N T"]]:
    """Returns the outputs and the log of each softmax's denominator (float32), both differentiable.

    A query sees the keys of the blocks chosen for it that are not after it, in its own document. The queries are the
    last T of the S tokens.

    Args:
      block_ids: for each group of queries and each key/value head, the blocks of keys that are seen. Block j is the
        keys `block_size * j` to `block_size * (j + 1) - 1` of the row, padding counted. The order means nothing, an id
        named twice counts once, and what is no block of the row (-1, by convention) is nothing.
      query_block: query t has the ids of group `t // query_block`; U is `ceil(T / query_block)`. 1: ids of its own.
      window_size: of those keys, a query sees the ones less than this far from it, itself included.
      segment_ids: documents of all S tokens, attended within only. Padding (id 0) is as if removed, for windows too. A
        query that sees nothing has output 0, log -inf, and adds nothing to gradients.
      scale: multiplies the scores; `H**-0.5` by default.

    Raises:
      ValueError: an unknown `impl`, shapes that do not fit, sizes below 1.
    """
    op = "block_sparse_attention"
    check_impl(op, impl, ("ref", "xla", "tpu"))
    sizes = {"block_size": block_size, "query_block": query_block, "window_size": window_size}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{op}: {name} is {size}; it is at least 1")
    (B, T, N, H), (_, S, K, P), J = q.shape, v.shape, block_ids.shape[3]
    if N % K or T > S or J == 0:
        raise ValueError(f"{op}: q {q.shape}, v {v.shape}, block_ids {block_ids.shape}: N % K, T > S, or no ids")
    U = -(-T // query_block)
    shapes = {"k": (k, (B, S, K, H)), "v": (v, (B, S, K, P)), "block_ids": (block_ids, (B, U, K, J))}
    check_shapes(op, {**shapes, "segment_ids": (segment_ids, (B, S))})
    if segment_ids is None:
        segment_ids = jnp.ones((B, S), jnp.int32)
    options = Options(block_size, query_block, window_size, H**-0.5 if scale is None else scale)
    args = q, k, v, canonical(block_ids, -(-S // block_size)), segment_ids
    chosen = supported(op, impl, tpu.unsupported(options, q, k, v, block_ids))
    if chosen == "ref" or T == 0:
        return ref.block_sparse_attention(options, *args)
    return _block_sparse_attention(chosen, options, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _block_sparse_attention(impl, options, *args):
    return _forward(impl, options, *args)[0]


def _forward(impl, options, *args):
    return dispatch(impl, _bind(options, xla=xla.forward, tpu=tpu.forward), *args)


def _backward(impl, options, *args):
    return *dispatch(impl, _bind(options, xla=xla.backward, tpu=tpu.backward), *args), None, None


def _bind(options, **implementations):
    return {name: functools.partial(fn, options) for name, fn in implementations.items()}


_block_sparse_attention.defvjp(_forward, _backward)
