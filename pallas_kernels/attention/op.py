"""Softmax attention: causal or not, windows, sinks, soft cap, forget gates, grouped heads, packed rows, caches."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import ref, tpu, xla
from pallas_kernels.attention.masks import Options
from pallas_kernels.common.dispatch import check_impl, dispatch, supported


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K P"],
    g: Float[Array, "B S N"] | None = None,
    *,
    causal: bool = True,
    window_size: int | None = None,
    sinks: Float[Array, "N"] | None = None,
    sink_tokens: int = 0,
    soft_cap: float | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    impl: Literal["ref", "xla", "tpu"] | None = None,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N T"]]:
    """Returns the outputs and the log of each softmax's denominator (float32).

    The queries are the last T of the S tokens, unless `positions` say where queries and keys stand.

    Args:
      g: log-decays of each key's token, <= 0 (https://arxiv.org/abs/2503.02130). A score is lowered by those of the
        document's tokens after the key, up to the query, itself included.
      causal: a query sees no key after its own position.
      window_size: a query sees the keys less than this far from it, itself included.
      sinks: a logit per head, part of the denominator of every real query; its value is 0.
      sink_tokens: the first so many tokens of each document stay visible beside the window.
      soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
      scale: multiplies the scores; `H**-0.5` by default.
      segment_ids: documents, attended within only. Padding (id 0) is as if removed, for windows too. A query that sees
        nothing has output 0 and log -inf.
      kv_segment_ids: those of the keys, `segment_ids` by default; an empty slot of a cache has id 0.
      positions: each query's place in its document, from 0. It frees queries and keys from standing in order: keys
        may be the slots of a ring. With g, though, keys come in order, those of each row in one document.
      kv_positions: those of the keys.

    Raises:
      ValueError: an unknown `impl`, shapes that do not fit, or options that mean nothing together.
    """
    check_impl("attention", impl, ("ref", "xla", "tpu"))
    _check_shapes(q, k, v, g, sinks, segment_ids, kv_segment_ids, positions, kv_positions)
    B, T, _, H = q.shape
    S = k.shape[1]
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size is {window_size}; it counts the query itself, so it is at least 1")
    if sink_tokens < 0 or (sink_tokens > 0 and window_size is None):
        raise ValueError(f"sink_tokens is {sink_tokens}; it is >= 0 and widens a window: set window_size too")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap is {soft_cap}; it has to be positive, or None for no cap")
    if g is not None and not causal:
        raise ValueError("g with causal=False; decays are of the tokens between a query and a key before it")
    if positions is None and (causal or window_size is not None) and T > S:
        raise ValueError(f"{T} queries do not stand among {S} keys; pass positions, or causal=False and no window_size")
    is_self_attention = T == S and positions is None and kv_segment_ids is None
    if segment_ids is None:
        segment_ids, kv_segment_ids = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    elif kv_segment_ids is None:
        kv_segment_ids = segment_ids
    if S == 0:  # One empty slot, which nothing sees, keeps the shapes positive.
        one_slot = lambda a: jnp.zeros((B, 1, *a.shape[2:]), a.dtype)
        k, v, kv_segment_ids = one_slot(k), one_slot(v), one_slot(kv_segment_ids)
        g = None if g is None else one_slot(g)
        kv_positions = None if kv_positions is None else one_slot(kv_positions)
    options = Options(causal, window_size, sink_tokens, soft_cap, H**-0.5 if scale is None else scale)
    args = q, k, v, g, sinks, segment_ids, kv_segment_ids, positions, kv_positions
    chosen = supported("attention", impl, tpu.unsupported(options, q, v, g, is_self_attention))
    if chosen == "ref" or T == 0:
        return ref.attention(options, *args)
    return _attention(chosen, options, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(impl, options, *args):
    return _forward(impl, options, *args)[0]


def _forward(impl, options, *args):
    return dispatch(impl, _bind(options, xla=xla.forward, tpu=tpu.forward), *args)


def _backward(impl, options, *args):
    return *dispatch(impl, _bind(options, xla=xla.backward, tpu=tpu.backward), *args), None, None, None, None


def _bind(options, **implementations):
    return {name: functools.partial(fn, options) for name, fn in implementations.items()}


_attention.defvjp(_forward, _backward)


def _check_shapes(q, k, v, g, sinks, segment_ids, kv_segment_ids, positions, kv_positions):
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    if k.shape != (B, S, K, H) or v.shape[:3] != (B, S, K) or N % K:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape} have to be [B T N H], [B S K H], [B S K P], K | N")
    wanted = {
        "g": (g, (B, S, N)),
        "sinks": (sinks, (N,)),
        "segment_ids": (segment_ids, (B, T)),
        "kv_segment_ids": (kv_segment_ids, (B, S)),
        "positions": (positions, (B, T)),
        "kv_positions": (kv_positions, (B, S)),
    }
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} is {array.shape}; it has to be {shape}")
    if segment_ids is None and kv_segment_ids is not None:
        raise ValueError("kv_segment_ids came without segment_ids; pass the documents of the queries too")
    if segment_ids is not None and kv_segment_ids is None and T != S:
        raise ValueError(f"{T} queries and {S} keys: pass kv_segment_ids {(B, S)} beside segment_ids")
    if (positions is None) != (kv_positions is None):
        raise ValueError("positions and kv_positions belong together: pass both or neither")
