"""The selective scan of Mamba (https://arxiv.org/abs/2312.00752): a decay of its own for each channel and state row."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import check_impl, differentiable
from pallas_kernels.common.documents import marks
from pallas_kernels.common.shapes import check_shapes
from pallas_kernels.selective_scan import ref, step, tpu, xla

_op = differentiable({"xla": xla.forward, "tpu": tpu.forward}, {"xla": xla.backward, "tpu": tpu.backward})


def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D H"],
    B: Float[Array, "B T H"],
    C: Float[Array, "B T H"],
    *,
    D: Float[Array, "D"] | None = None,
    state: Float[Array, "B D H"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: Literal["ref", "xla", "tpu"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D H"]]:
    """Returns the outputs and the float32 state after the last token. For one channel and one token:

        h = exp(dt A) h_old + dt x B
        y = sum(C h) + D x

    The states of all tokens are never in memory at once.

    Args:
      dt: sizes of the steps, >= 0: after softplus.
      A: < 0: the continuous rates, not their logarithm.
      D: the weight of a skip from x to y; none if not given.
      state: the state before the first token; zero if not given. It belongs to the row's first document.
      segment_ids: documents count from 1 in order, 0 is padding. Each document starts from zero; padding neither reads
        nor writes, and its outputs are 0.
      impl: "ref", "xla", "tpu", or None for the best one on the platform that the program is lowered for.

    Raises:
      ValueError: an unknown `impl`, or shapes that do not fit.
    """
    check_impl("selective_scan", impl, ("ref", "xla", "tpu"))
    batch, T, width = x.shape
    rows = A.shape[1]
    tokens, states = (batch, T), (batch, width, rows)
    check_shapes(
        "selective_scan",
        {"dt": (dt, x.shape), "A": (A, (width, rows)), "B": (B, (*tokens, rows)), "C": (C, (*tokens, rows))}
        | {"D": (D, (width,)), "state": (state, states), "segment_ids": (segment_ids, tokens)},
    )
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    state = jnp.zeros(states, dtype) if state is None else state.astype(dtype)
    ids = jnp.ones(tokens, jnp.int32) if segment_ids is None else segment_ids
    if impl == "ref" or T <= 1:
        one_by_one = ref if impl == "ref" or T == 0 else step
        y, last = one_by_one.selective_scan(x, dt, A, B, C, state, ids)
        if D is not None:
            y += (D.astype(dtype) * jnp.where(ids[..., None] > 0, x, 0)).astype(y.dtype)
    else:
        D = jnp.zeros(width, dtype) if D is None else D
        real_BT1 = ids[..., None] > 0
        B, C = jnp.where(real_BT1, B, 0), jnp.where(real_BT1, C, 0)
        y, last = _op(impl, None, x, dt, A, B, C, D, state, marks(ids))
    return y, last
