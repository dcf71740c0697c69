"""The ops of pallas_kernels for sequences that lie in parts on the devices of the mesh axis `context`.

They run in `per_shard(..., split_tokens=True)`, where each device holds some of the tokens, and are the ops themselves
where no axis is called so. What a recurrence leaves is affine in the state it is given: `leaves = decay * given + own`.
Each device finds this map for its part and gathers those of all others: a few states are sent, whatever the number of
tokens. What comes in that way is then added to the outputs, which are linear in it: so the recurrence runs once, with a
second run where the map is a product over all tokens, or, as in `selective_scan`, reading what comes in is a scan
again. Attention gathers keys and values.

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
    bonus: Float[Array, "N H"] | None = None,
    state: Float[Array, "B N H P"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
    op = functools.partial(kernels.linear_attention, q, k, v, g, bonus=bonus, scale=scale, **options)
    if num_parts() == 1:
        return op(state=state, segment_ids=segment_ids)
    ids_BT, repeats = _or_one_document(segment_ids, v), v.shape[2] // k.shape[2]
    o_BTNP, own_BNHP = op(segment_ids=ids_BT)
    log_BTNX = _log_decays(g, ids_BT)
    entering_BNHP, last_BNHP = hand_on(own_BNHP, jnp.exp(log_BTNX[:, -1])[..., None], ids_BT, state)
    if bonus is not None:  # Tokens read the state before their own decay.
        log_BTNX = jnp.pad(log_BTNX[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    is_read_BT11 = ((ids_BT > 0) & (ids_BT == first_document(ids_BT)))[..., None, None]
    reads_BTNX = jnp.where(is_read_BT11, jnp.exp(log_BTNX) * (q.shape[-1] ** -0.5 if scale is None else scale), 0)
    if reads_BTNX.shape[3] > 1:
        came_BTNP = _read(reads_BTNX * jnp.repeat(q, repeats, axis=2), entering_BNHP, v.dtype)
    else:
        came_BTNP = reads_BTNX * _read(q, entering_BNHP, v.dtype)
    return (o_BTNP + came_BTNP).astype(o_BTNP.dtype), last_BNHP


def linear_attention_states(
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N P"],
    g: Float[Array, "B T N"],
    *,
    state: Float[Array, "B N H P"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B N H P"] | None, Float[Array, "B N H P"]]:
    """Returns the states of linear attention before the part's tokens, and after those of all parts."""
    op = functools.partial(kernels.linear_attention, k, k, v, g)
    if num_parts() == 1:
        return state, op(state=state, segment_ids=segment_ids)[1]
    ids_BT = _or_one_document(segment_ids, v)
    decay_BNX1 = jnp.exp(_log_decays(g, ids_BT)[:, -1])[..., None]
    return hand_on(op(segment_ids=ids_BT)[1], decay_BNX1, ids_BT, state)


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
    return _matrix_rule(op, v, k.shape[-1], state, segment_ids)


def generalized_delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N P"],
    a: Float[Array, "B T K H"],
    b: Float[Array, "B T K H"],
    g: Float[Array, "..."] | None = None,
    *,
    state: Float[Array, "B N H P"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
    op = functools.partial(kernels.generalized_delta_rule, q, k, a=a, b=b, g=g, **options)
    return _matrix_rule(op, v, k.shape[-1], state, segment_ids)


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
    h, own = op(x, segment_ids=ids_BT)
    # What is left at each token of a state of ones.
    left, decay = op(jnp.zeros(x.shape, own.dtype), state=jnp.ones_like(own), segment_ids=ids_BT)
    entering, last = hand_on(own, decay, ids_BT, state)
    return (h + left * entering[:, None]).astype(h.dtype), last


def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D H"],
    B: Float[Array, "B T H"],
    C: Float[Array, "B T H"],
    *,
    state: Float[Array, "B D H"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D H"]]:
    op = functools.partial(kernels.selective_scan, x, dt, A, B, C, **options)
    if num_parts() == 1:
        return op(state=state, segment_ids=segment_ids)
    # What comes in decays in each channel and row by itself: to read it at all tokens is a scan again.
    ids_BT = _or_one_document(segment_ids, x)
    step_BD1 = jnp.sum(jnp.where(ids_BT[..., None] > 0, dt, 0), axis=1)[..., None]
    entering_BDH, last_BDH = hand_on(op(segment_ids=ids_BT)[1], jnp.exp(step_BD1 * A), ids_BT, state)
    return op(state=entering_BDH, segment_ids=ids_BT)[0], last_BDH


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
    # The inputs that are remembered move up by one at each token. To find them takes no convolution: only one runs.
    ids_BT, slots = _or_one_document(segment_ids, x), jnp.arange(w.shape[1] - 1)
    moved_B11 = jnp.sum(ids_BT > 0, axis=1)[:, None, None]
    move_BUU = (slots[:, None] + moved_B11 == slots).astype(x.dtype)
    entering, last = hand_on(op(segment_ids=ids_BT)[1], move_BUU, ids_BT, state, apply=jnp.matmul)
    return op(state=entering, segment_ids=ids_BT)[0], last


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K P"],
    g: Float[Array, "B S N"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N T"]]:
    ids_BT = _or_one_document(segment_ids, q)
    keys, places = gather_keys((k, v, g), ids_BT, kv_segment_ids, positions, kv_positions)
    return kernels.attention(q, *keys, **options, **places)


def gather_keys(
    arrays: tuple[Any, ...],
    segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns all tokens' arrays `[B S ...]`, of which keys are made, and where they stand, as `attention` takes it.

    A ring would send the same bytes forward, and more backward, as keys would come by again. A layer of Llama 3.2 1B,
    128k tokens on eight devices, receives 235 MB, 0.7 GB with remat and gradients: 7 ms at 100 GB/s, beside 200 ms of
    products at 197 TFLOP/s. What a ring would save is memory, here 268 MB while one layer is computed.

    Raises:
      ValueError: keys that are not the queries' own tokens lie in parts.
    """
    others = {"kv_segment_ids": kv_segment_ids, "positions": positions, "kv_positions": kv_positions}
    if num_parts() == 1:
        return arrays, {"segment_ids": segment_ids, **others}
    if given := [name for name, value in others.items() if value is not None]:
        raise ValueError(f"attention over the axis {AXIS!r} does not take {', '.join(given)}; decode without that axis")
    # The device's own come last, as its queries are then the last tokens; those of later parts are as padding.
    part, T = jax.lax.axis_index(AXIS), segment_ids.shape[1]
    whole = lambda x: jnp.roll(jax.lax.all_gather(x, AXIS, axis=1, tiled=True), -(part + 1) * T, axis=1)
    is_past_S = jnp.arange(num_parts() * T) >= (num_parts() - 1 - part) * T
    kv_ids_BS = jnp.where(is_past_S, whole(segment_ids), 0)
    return jax.tree.map(whole, arrays), {"segment_ids": segment_ids, "kv_segment_ids": kv_ids_BS}


def hand_on(
    own: Array,
    decay: Array,
    segment_ids: Int[Array, "B T"],
    state: Array | None = None,
    *,
    apply: Callable[[Array, Array], Array] = jnp.multiply,
    join: Callable[[Array, Array], Array] = jnp.add,
) -> tuple[Array, Array]:
    """Returns the state before the part's tokens, as an op takes it, and the one after those of all parts.

    Args:
      own: what the part leaves, `[B ...]`, if it is given no state.
      decay: with what `join(apply(decay, state), own)` is what the part leaves of a state, if no document starts in it.
      state: the one before all tokens.
    """
    # Documents count up: the largest number is the last one's, and nothing but padding has 0.
    first_B = first_document(segment_ids)[:, 0]
    last_B = jnp.max(segment_ids, axis=1, initial=0)
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
        running = join(jnp.where(wide(passes_B), apply(decays[part], running), 0), owns[part])
        document_B = jnp.maximum(document_B, lasts[part])
    return entering, running


def _matrix_rule(op, v, H, state, segment_ids):
    """Runs a rule whose tokens multiply the state by matrices; `op` takes the values, `state` and `segment_ids`."""
    if num_parts() == 1:
        return op(v, state=state, segment_ids=segment_ids)
    ids_BT, (B, T, N, _) = _or_one_document(segment_ids, v), v.shape
    o_BTNP, own_BNHP = op(v, segment_ids=ids_BT)
    # The product of the matrices is what becomes of the identity when nothing is written; the outputs then say what
    # each token reads of any state.
    identity_BNHH = jnp.broadcast_to(jnp.eye(H), (B, N, H, H))
    reads_BTNH, decay_BNHH = op(jnp.zeros((B, T, N, H), v.dtype), state=identity_BNHH, segment_ids=ids_BT)
    entering_BNHP, last_BNHP = hand_on(own_BNHP, decay_BNHH, ids_BT, state, apply=jnp.matmul)
    return (o_BTNP + _read(reads_BTNH, entering_BNHP, v.dtype)).astype(o_BTNP.dtype), last_BNHP


def _read(q_BTKH, S_BNHP, dtype):
    """Returns S^T q in float32; value head n reads key head `n // (N / K)`."""
    S_BKGHP = S_BNHP.reshape(S_BNHP.shape[0], q_BTKH.shape[2], -1, *S_BNHP.shape[2:])
    o_BTKGP = jnp.einsum(
        "BTKH,BKGHP->BTKGP", q_BTKH.astype(dtype), S_BKGHP.astype(dtype), preferred_element_type=S_BNHP.dtype
    )
    return o_BTKGP.reshape(*q_BTKH.shape[:2], S_BNHP.shape[1], S_BNHP.shape[3])


def _log_decays(g, ids_BT):
    """Returns `BTNX` what is left of the state before the part after each of its tokens, as logarithms."""
    if g is None:
        g = jnp.zeros(1)
    wide = g if g.ndim == 4 else g[..., None]
    return jnp.cumsum(jnp.where(ids_BT[..., None, None] > 0, wide, 0.0), axis=1)


def _or_one_document(segment_ids: Int[Array, "B T"] | None, x: Array) -> Int[Array, "B T"]:
    return jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
