"""The gated delta rule: DeltaNet (https://arxiv.org/abs/2406.06484), Gated DeltaNet, Kimi Delta Attention."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import check_impl, differentiable, supported
from pallas_kernels.common.shapes import check_heads, check_shapes
from pallas_kernels.delta_rule import ref, step, tpu, xla

FORWARD = {"xla": xla.forward, "tpu": tpu.forward}
_op = differentiable(FORWARD, {"xla": xla.backward, "tpu": tpu.backward})


def delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N P"],
    beta: Float[Array, "B T N"],
    g: Float[Array, "B T N"] | Float[Array, "B T N H"] | None = None,
    *,
    state: Float[Array, "B N H P"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
    """Returns the outputs and the float32 state after the last token. For one head and one token:

        S = Diag(exp(g)) S_old
        S = S + beta k (v - S^T k)^T
        o = scale * S^T q

    The caller normalises k: beyond `beta * |k|^2 = 2` the state grows.

    Args:
      q, k: value head n reads key head `n // (N / K)`.
      beta: how much of the old value is replaced, in [0, 2].
      g: log-decays in [-inf, 0]: none, per token, or per token and key channel.
      state: the state before the first token; zero if not given. It belongs to the row's first document.
      segment_ids: documents count from 1 in order, 0 is padding. Each document starts from zero; padding neither reads
        nor writes, and its outputs are 0.
      scale: `H**-0.5` if not given.
      impl: "ref", "xla", "tpu", or None for the best one on the platform that the program is lowered for.

    Raises:
      ValueError: an unknown `impl`, one that does not support these arguments, or shapes that do not fit.
    """
    check_impl("delta_rule", impl, ("ref", *FORWARD))
    check_heads("delta_rule", q, k, v)
    B, T, N, P = v.shape
    H = k.shape[-1]
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    if g is not None and g.shape not in ((B, T, N), (B, T, N, H)):
        raise ValueError(f"delta_rule: g has shape {g.shape}, it must be {(B, T, N)} or {(B, T, N, H)}")
    check_shapes(
        "delta_rule",
        {"beta": (beta, (B, T, N)), "state": (state, (B, N, H, P)), "segment_ids": (segment_ids, (B, T))},
    )
    scale = H**-0.5 if scale is None else scale
    g = jnp.zeros((B, T, N), dtype) if g is None else g.astype(dtype)
    state = jnp.zeros((B, N, H, P), dtype) if state is None else state.astype(dtype)
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    impl = supported("delta_rule", impl, tpu.unsupported(q, k, v, g))
    if impl == "ref" or T == 0:
        return ref.delta_rule(q, k, v, beta, g, state, ids, scale)
    if T == 1:
        return step.delta_rule(q, k, v, beta, g, state, ids, scale)
    return _op(impl, scale, q, k, v, beta, g, state, ids)
