"""Linear attention with decay: linear transformer (https://arxiv.org/abs/2006.16236) to GLA, Mamba-2 and RWKV-6."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import check_impl, dispatch, supported
from pallas_kernels.common.documents import clear_padding
from pallas_kernels.common.shapes import check_heads, check_shapes
from pallas_kernels.linear_attention import ref, step, tpu, xla

# The residuals are the inputs: one platform's forward may be followed by another's backward.
FORWARD = {"xla": xla.forward, "tpu": tpu.forward}
BACKWARD = {"xla": xla.backward, "tpu": tpu.backward}


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
      impl: "ref", "xla", "tpu", or None for the best one on the platform that the program is lowered for.

    Raises:
      ValueError: an unknown `impl`, one that does not support these arguments, or shapes that do not fit.
    """
    check_impl("linear_attention", impl, ("ref", *FORWARD))
    check_heads("linear_attention", q, k, v)
    B, T, N, P = v.shape
    H = k.shape[-1]
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    if g is not None and g.shape not in ((N,), (B, T, N), (B, T, N, H)):
        raise ValueError(f"linear_attention: g has shape {g.shape}, it must be {(N,)}, {(B, T, N)} or {(B, T, N, H)}")
    check_shapes(
        "linear_attention",
        {"bonus": (bonus, (N, H)), "state": (state, (B, N, H, P)), "segment_ids": (segment_ids, (B, T))},
    )
    scale = H**-0.5 if scale is None else scale
    g = jnp.zeros(N, dtype) if g is None else g.astype(dtype)
    g = jnp.broadcast_to(g, (B, T, N)) if g.ndim == 1 else g
    state = jnp.zeros((B, N, H, P), dtype) if state is None else state.astype(dtype)
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    impl = supported("linear_attention", impl, tpu.unsupported(q, k, v, g))
    if impl == "ref" or T == 0:
        return ref.linear_attention(q, k, v, g, bonus, state, ids, scale)
    if T == 1:
        return step.linear_attention(q, k, v, g, bonus, state, ids, scale)

    o_BTNP, state_BNHP = _op(impl, scale, bonus is not None, q, k, v, g, state, ids)
    if bonus is not None:
        own_BTNP = _own_token(q, k, v, bonus, scale)
        o_BTNP += own_BTNP if segment_ids is None else clear_padding(own_BTNP, ids)
    return o_BTNP, state_BNHP


def _own_token(q_BTKH, k_BTKH, v_BTNP, bonus_NH, scale):
    K, dtype = k_BTKH.shape[2], jnp.promote_types(v_BTNP.dtype, jnp.float32)
    bonus_KGH = bonus_NH.reshape(K, -1, bonus_NH.shape[-1]).astype(dtype)
    weight_BTKG = jnp.einsum("BTKH,KGH->BTKG", q_BTKH.astype(dtype) * k_BTKH, scale * bonus_KGH)
    return (weight_BTKG.reshape(v_BTNP.shape[:3])[..., None] * v_BTNP).astype(v_BTNP.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _op(impl, scale, before, *inputs):
    return dispatch(impl, {name: functools.partial(fn, scale, before) for name, fn in FORWARD.items()}, *inputs)


def _forward(impl, scale, before, *inputs):
    return _op(impl, scale, before, *inputs), inputs


def _backward(impl, scale, before, inputs, cotangents):
    backward = {name: functools.partial(fn, scale, before) for name, fn in BACKWARD.items()}
    return *dispatch(impl, backward, inputs, cotangents), None


_op.defvjp(_forward, _backward)
