"""Linear attention with decay: linear transformer (https://arxiv.org/abs/2006.16236) to GLA, Mamba-2 and RWKV-6."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import check_impl
from pallas_kernels.common.shapes import check_heads
from pallas_kernels.linear_attention import ref

type Impl = Literal["ref"]


def linear_attention(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N P"],
    g: Float[Array, "N"] | Float[Array, "B T N"] | Float[Array, "B T N H"] | None = None,
    *,
    bonus: Float[Array, "N H"] | None = None,
    state: Float[Array, "B N H P"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
    """Returns the outputs and the float32 state after the last token. For one head and one token:

        S = Diag(exp(g)) S_old + k v^T
        o = scale * S^T q                                  without bonus
        o = scale * (S_old + Diag(bonus) k v^T)^T q        with bonus, as in RWKV-5 and RWKV-6

    With a bonus the output reads the state as it was before this token's decay and write: g of a token discounts what
    the tokens after it read.

    Args:
      q, k: value head n reads key head `n // (N / K)`.
      g: log-decays in [-inf, 0]: none, one per head, per token, or per token and key channel.
      state: the state before the first token; zero if not given. It belongs to the row's first document.
      segment_ids: documents count from 1 in order, 0 is padding. Each document starts from zero; padding neither reads
        nor writes, and its outputs are 0.
      scale: `H**-0.5` if not given.
      impl: "ref" or None, the best one for these shapes.
    """
    check_impl("linear_attention", impl, ("ref",))
    check_heads("linear_attention", q, k, v)
    B, T, N, P = v.shape
    H = k.shape[-1]
    if g is None:
        g = jnp.zeros((B, T, N), jnp.float32)
    elif g.ndim == 1:
        g = jnp.broadcast_to(g, (B, T, N))
    if state is None:
        state = jnp.zeros((B, N, H, P), jnp.float32)
    if segment_ids is None:
        segment_ids = jnp.ones((B, T), jnp.int32)
    return ref.linear_attention(q, k, v, g, bonus, state, segment_ids, H**-0.5 if scale is None else scale)
