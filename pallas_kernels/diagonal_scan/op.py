"""Diagonal recurrences, h = a h + x: S4D (https://arxiv.org/abs/2206.11893), HGRN, RG-LRU (2402.19427), S5, LRU."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from pallas_kernels.common.dispatch import check_impl, differentiable, supported
from pallas_kernels.common.documents import marks
from pallas_kernels.common.shapes import check_shapes
from pallas_kernels.diagonal_scan import ref, step, tpu, xla

_op = differentiable({"xla": xla.forward, "tpu": tpu.forward}, {"xla": xla.backward, "tpu": tpu.backward})


def diagonal_scan(
    a: Inexact[Array, "..."],
    x: Inexact[Array, "B T ..."],
    *,
    reverse: bool = False,
    state: Inexact[Array, "B ..."] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = None,
) -> tuple[Inexact[Array, "B T ..."], Inexact[Array, "B ..."]]:
    """Returns `h = a * h_old + x` of all tokens and the state after the last one, in float32 or complex64.

    Args:
      a: decays, of the shape of x, or without B and T: the same for all tokens. Any number of modulus at most 1, 0 and
        1 included. Where one of a and x is complex, all is.
      x: inputs, each channel by itself. Outputs have their dtype.
      reverse: whether to walk from the last token to the first. All that is said here of first and last, before and
        after is then mirrored: the state is that before the last token, and the one returned that after the first.
      state: the state before the first token; zero if not given. It belongs to the row's first document.
      segment_ids: documents count from 1 in order, 0 is padding. Each document starts from zero; padding neither reads
        nor writes, and its outputs are 0.
      impl: "ref", "xla", "tpu", or None for the best one on the platform that the program is lowered for.

    Raises:
      ValueError: an unknown `impl` or one that does not support these dtypes, or shapes that do not fit.
    """
    check_impl("diagonal_scan", impl, ("ref", "xla", "tpu"))
    if x.ndim < 2 or a.shape not in (x.shape, x.shape[2:]):
        raise ValueError(
            f"diagonal_scan: a {a.shape} must have the shape of x {x.shape}, all of it or that after [B T]"
        )
    B, T, *width = x.shape
    check_shapes("diagonal_scan", {"state": (state, (B, *width)), "segment_ids": (segment_ids, (B, T))})
    if jnp.iscomplexobj(a) or jnp.iscomplexobj(x):
        kind = jnp.promote_types(jnp.promote_types(a.dtype, x.dtype), jnp.complex64)
        a, x = a.astype(kind), x.astype(kind)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    state = jnp.zeros((B, *width), dtype) if state is None else state.astype(dtype)
    ids_BT = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    if impl == "ref" or T == 0:
        return ref.diagonal_scan(reverse, a, x, state, ids_BT)
    if T == 1:
        return step.diagonal_scan(a, x, state, ids_BT)

    impl = supported("diagonal_scan", impl, tpu.unsupported(a, x))
    a = a.reshape(math.prod(width)) if a.ndim < x.ndim else a.reshape(B, T, math.prod(width))
    marks_BT = _marks(ids_BT, reverse)
    h_BTW, last_BW = _op(impl, reverse, a, x.reshape(B, T, -1), state.reshape(B, -1), marks_BT)
    return h_BTW.reshape(x.shape), last_BW.reshape(state.shape)


def _marks(ids_BT, reverse):
    """Returns the marks of `documents.marks`, in the order of the walk."""
    if not reverse:
        return marks(ids_BT)
    last_B1 = jnp.max(ids_BT, axis=1, keepdims=True)
    mirrored_BT = jnp.where(ids_BT > 0, last_B1 + 1 - ids_BT, 0)
    return jnp.flip(marks(jnp.flip(mirrored_BT, axis=1)), axis=1)
