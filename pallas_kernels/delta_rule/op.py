"""The gated delta rule: DeltaNet (https://arxiv.org/abs/2406.06484), Gated DeltaNet, Kimi Delta Attention."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import check_impl
from pallas_kernels.common.shapes import check_heads
from pallas_kernels.delta_rule import ref


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
      impl: "ref" or None, the best one for these shapes.
    """
    check_impl("delta_rule", impl, ("ref",))
    check_heads("delta_rule", q, k, v)
    B, T, N, P = v.shape
    H = k.shape[-1]
    if g is None:
        g = jnp.zeros((B, T, N), jnp.float32)
    if state is None:
        state = jnp.zeros((B, N, H, P), jnp.float32)
    if segment_ids is None:
        segment_ids = jnp.ones((B, T), jnp.int32)
    return ref.delta_rule(q, k, v, beta, g, state, segment_ids, H**-0.5 if scale is None else scale)
