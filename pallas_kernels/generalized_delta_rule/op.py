"""The generalized delta rule, diagonal plus low rank: RWKV-7 (https://arxiv.org/abs/2503.14456), Comba, and its kin."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import check_impl, differentiable, supported
from pallas_kernels.common.shapes import check_heads, check_shapes
from pallas_kernels.generalized_delta_rule import ref, step, tpu, xla

FORWARD = {"xla": xla.forward, "tpu": tpu.forward}
_op = differentiable(FORWARD, {"xla": xla.backward, "tpu": tpu.backward})


def generalized_delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N P"],
    a: Float[Array, "B T K H"],
    b: Float[Array, "B T K H"],
    g: Float[Array, "B T N"] | Float[Array, "B T N H"] | None = None,
    *,
    state: Float[Array, "B N H P"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
    """Returns the outputs and the float32 state after the last token. For one head and one token:

        S = Diag(exp(g)) S_old + b (S_old^T a)^T + k v^T
        o = scale * S^T q

    What a reads, before the decay, b writes. With `a = exp(g) * k'`, `b = -beta k'` and `k = beta k'` it is the
    delta rule of keys k'. The caller keeps `Diag(exp(g)) + b a^T` from growing what it is applied to.

    Args:
      q, k, a, b: value head n reads key head `n // (N / K)`.
      g: log-decays in [-inf, 0]: none, per token, or per token and key channel.
      state: the state before the first token; zero if not given. It belongs to the row's first document.
      segment_ids: documents count from 1 in order, 0 is padding. Each document starts from zero; padding neither reads
        nor writes, and its outputs are 0.
      scale: `H**-0.5` if not given.
      impl: "ref", "xla", "tpu", or None for the best one on the platform that the program is lowered for.
    """
    name = "generalized_delta_rule"
    check_impl(name, impl, ("ref", *FORWARD))
    check_heads(name, q, k, v)
    B, T, N, P = v.shape
    H = k.shape[-1]
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    if g is not None and g.shape not in ((B, T, N), (B, T, N, H)):
        raise ValueError(f"{name}: g has shape {g.shape}, it must be {(B, T, N)} or {(B, T, N, H)}")
    check_shapes(
        name,
        {
            "a": (a, k.shape),
            "b": (b, k.shape),
            "state": (state, (B, N, H, P)),
            "segment_ids": (segment_ids, (B, T)),
        },
    )
    scale = H**-0.5 if scale is None else scale
    g = jnp.zeros((B, T, N), dtype) if g is None else g.astype(dtype)
    state = jnp.zeros((B, N, H, P), dtype) if state is None else state.astype(dtype)
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    if impl == "ref" or T == 0:
        return ref.generalized_delta_rule(q, k, v, a, b, g, state, ids, scale)
    if T == 1:
        return step.generalized_delta_rule(q, k, v, a, b, g, state, ids, scale)
    impl = supported(name, impl, tpu.unsupported(q, k, v, a, b, g))
    return _op(impl, scale, q, k, v, a, b, g, state, ids)
