"""The ops of pallas_kernels for sequences that lie in parts on the devices of the mesh axis `context`.

They run in `per_shard(..., split_tokens=True)`, where each device holds some of the tokens, and are the ops themselves
where no axis is called so. What a recurrence leaves is affine in the state it is given: `leaves = decay * given + own`.
Each device finds this map for its part, gathers those of all others, and runs again from the state that they leave it:
a few states are sent, whatever the number of tokens. Attention gathers keys and values.

Maps are exact about documents: a part in which a new one starts hands on nothing of what it was given.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

import pallas_kernels as kernels
from pallas_kernels.common.documents import first_document

AXIS = "context"


def num_parts() -> int:
    """Returns in how many parts the sequence lies."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def linear_attention(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N P"],
    g: Float[Array, "..."] | None = None,
    *,
    state: Float[Array, "B N H P"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
    op = functools.partial(kernels.linear_attention, q, k, v, g, **options)
    if num_parts() == 1:
        return op(state=state, segment_ids=segment_ids)
    ids_BT = _or_one_document(segment_ids, v)
    real_BT = ids_BT > 0
    if g is None:
        log_BNH = jnp.zeros((1, 1, 1))
    elif g.ndim == 1:
        log_BNH = (jnp.sum(real_BT, axis=1)[:, None] * g)[..., None]
    else:
        wide_BTNH = g[..., None] if g.ndim == 3 else g
        log_BNH = jnp.sum(jnp.where(real_BT[..., None, None], wide_BTNH, 0.0), axis=1)
    decay_BNH1 = jnp.exp(log_BNH)[..., None]
    return _run(op, decay_BNH1, jnp.multiply, ids_BT, state)


def delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N P"],
    beta: Float[Array, "B T N"],
    g: Float[Array, "..."] | None = None,
    *,
    state: Float[Array, "B N H P"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
    op = functools.partial(kernels.delta_rule, q, k, beta=beta, g=g, **options)
    if num_parts() == 1:
        return op(v, state=state, segment_ids=segment_ids)
    # Decay and erasure of all tokens are one matrix: what becomes of the identity when nothing is written.
    ids_BT, (B, T, N, _), H = _or_one_document(segment_ids, v), v.shape, k.shape[-1]
    identity_BNHH = jnp.broadcast_to(jnp.eye(H), (B, N, H, H))
    _, decay_BNHH = op(jnp.zeros((B, T, N, H), v.dtype), state=identity_BNHH, segment_ids=ids_BT)
    return _run(functools.partial(op, v), decay_BNHH, jnp.matmul, ids_BT, state)


def diagonal_scan(
    a: Inexact[Array, "..."],
    x: Inexact[Array, "B T ..."],
    *,
    state: Inexact[Array, "B ..."] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    **options: Any,
) -> tuple[Inexact[Array, "B T ..."], Inexact[Array, "B ..."]]:
    op = functools.partial(kernels.diagonal_scan, a, **options)
    if num_parts() == 1:
        return op(x, state=state, segment_ids=segment_ids)
    ids_BT = _or_one_document(segment_ids, x)
    ones = jnp.ones_like(op(x, segment_ids=ids_BT)[1])
    _, decay = op(jnp.zeros_like(x), state=ones, segment_ids=ids_BT)
    return _run(functools.partial(op, x), decay, jnp.multiply, ids_BT, state)


def short_conv(
    x: Float[Array, "B T D"],
    w: Float[Array, "D W"],
    *,
    state: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    op = functools.partial(kernels.short_conv, x, w, **options)
    if num_parts() == 1:
        return op(state=state, segment_ids=segment_ids)
    # The inputs that are remembered move up by one at each token.
    ids_BT, slots = _or_one_document(segment_ids, x), jnp.arange(w.shape[1] - 1)
    moved_B11 = jnp.sum(ids_BT > 0, axis=1)[:, None, None]
    move_BUU = (slots[:, None] + moved_B11 == slots).astype(x.dtype)
    return _run(op, move_BUU, jnp.matmul, ids_BT, state)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K P"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N T"]]:
    if num_parts() == 1:
        return kernels.attention(q, k, v, segment_ids=segment_ids, **options)
    options = {name: value for name, value in options.items() if value is not None}
    if given := [name for name in ("positions", "kv_positions", "kv_segment_ids") if name in options]:
        raise ValueError(f"attention over the axis {AXIS!r} does not take {', '.join(given)}; decode without that axis")
    # All keys, the device's own last, as its queries are then the last tokens; those of later parts are as padding.
    ids_BT, part, T = _or_one_document(segment_ids, q), jax.lax.axis_index(AXIS), q.shape[1]
    whole = lambda x: jnp.roll(jax.lax.all_gather(x, AXIS, axis=1, tiled=True), -(part + 1) * T, axis=1)
    is_past_S = jnp.arange(num_parts() * T) >= (num_parts() - 1 - part) * T
    kv_ids_BS = jnp.where(is_past_S, whole(ids_BT), 0)
    return kernels.attention(q, whole(k), whole(v), segment_ids=ids_BT, kv_segment_ids=kv_ids_BS, **options)


def _or_one_document(segment_ids: Int[Array, "B T"] | None, x: Array) -> Int[Array, "B T"]:
    return jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids


def _run(op: Callable[..., Any], decay: Array, apply: Any, ids_BT: Int[Array, "B T"], state: Array | None) -> Any:
    """Returns the part's outputs, and the state after the last part.

    Args:
      op: takes `state` and `segment_ids`.
      decay: with what `apply(decay, state)` is what the part leaves of a state if it writes nothing and no document
        starts in it.
    """
    own = op(segment_ids=ids_BT)[1]
    # Documents count up: the largest number is the last one's, and nothing but padding has 0.
    first_B = first_document(ids_BT)[:, 0]
    last_B = jnp.max(ids_BT, axis=1, initial=0)
    decays, owns, firsts, lasts = jax.lax.all_gather((decay, own, first_B, last_B), AXIS)

    running = jnp.zeros_like(own) if state is None else state.astype(own.dtype)
    entering, document_B = running, jnp.zeros_like(last_B)
    wide = lambda x_B: x_B.reshape(-1, *(1,) * (own.ndim - 1))
    for part in range(num_parts()):
        # The given state belongs to the first document there is.
        document_B = jnp.where((document_B == 0) & (lasts[part] > 0), firsts[part], document_B)
        goes_on_B = (lasts[part] == 0) | (firsts[part] == document_B)
        given = jnp.where(wide(goes_on_B), running, 0)
        entering = jnp.where(jax.lax.axis_index(AXIS) == part, given, entering)
        passes_B = (lasts[part] == 0) | (lasts[part] == document_B)
        running = jnp.where(wide(passes_B), apply(decays[part], running), 0) + owns[part]
        document_B = jnp.maximum(document_B, lasts[part])
    return op(state=entering, segment_ids=ids_BT)[0], running
