"""`attention` as an online softmax over the blocks of queries and keys that see each other, forward and backward.

https://arxiv.org/abs/2205.14135, https://arxiv.org/abs/2307.08691
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import decays
from pallas_kernels.attention.masks import Tokens, blocks_that_see, sees, tokens

# Queries and keys of a block: the fastest on a CPU, where smaller ones skip more of a causal mask.
BLOCK_T, BLOCK_S = 128, 64
# Up to so many pairs of a query and a key, one block is as fast as several.
MAX_PAIRS_OF_ONE_BLOCK = 128 * 128


def forward(options, q, k, v, g, sinks, segment_ids, kv_segment_ids, positions, kv_positions):
    """Returns `(o, lse)` and the residuals."""
    inputs = q, k, v, g, sinks, segment_ids, kv_segment_ids, positions, kv_positions
    (B, T, N, _), (_, S, K, P) = q.shape, v.shape
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    sides = tokens(options, segment_ids, kv_segment_ids, positions, kv_positions)
    queries, keys = _token_blocks(sides, T, S)
    q_CBKGLH = _query_blocks(q, K, S)
    k_CBKSH, v_CBKSP = (_key_blocks(a, T) for a in (k, v))
    decay = _decay_blocks(g, sides, K)

    def step(i, j, sums):
        o_BKGLP, max_BKGL, sum_BKGL = (a[i] for a in sums)
        scores_BKGLS, _ = _scores(options, q_CBKGLH[i], k_CBKSH[j], _at(queries, i), _at(keys, j), decay(i, j))
        scores_BKGLS = _computed_once(scores_BKGLS)
        new_max_BKGL = jnp.maximum(max_BKGL, jnp.max(scores_BKGLS, axis=-1))
        finite_max_BKGL = jnp.where(new_max_BKGL == -jnp.inf, 0, new_max_BKGL)
        p_BKGLS = _computed_once(jnp.exp(scores_BKGLS - finite_max_BKGL[..., None]))
        shrink_BKGL = jnp.exp(max_BKGL - finite_max_BKGL)
        sum_BKGL = shrink_BKGL * sum_BKGL + jnp.sum(p_BKGLS, axis=-1)
        new_BKGLP = jnp.einsum("BKGLS,BKSP->BKGLP", p_BKGLS.astype(v.dtype), v_CBKSP[j], preferred_element_type=dtype)
        o_BKGLP = shrink_BKGL[..., None] * o_BKGLP + new_BKGLP
        return tuple(a.at[i].set(b) for a, b in zip(sums, (o_BKGLP, new_max_BKGL, sum_BKGL), strict=True))

    # A sink is one more key, which every real query sees and whose value is 0.
    start = -jnp.inf if sinks is None else sinks.astype(dtype).reshape(1, 1, K, N // K, 1)
    max_CBKGL = jnp.where((queries.ids > 0)[:, :, None, None], start, -jnp.inf)
    max_CBKGL = jnp.broadcast_to(max_CBKGL, q_CBKGLH.shape[:-1]).astype(dtype)
    sums = jnp.zeros((*max_CBKGL.shape, P), dtype), max_CBKGL, jnp.where(max_CBKGL > -jnp.inf, 1, 0).astype(dtype)
    o_CBKGLP, max_CBKGL, sum_CBKGL = _for_each_pair(options, queries, keys, step, sums)
    o_CBKGLP = o_CBKGLP / jnp.where(sum_CBKGL > 0, sum_CBKGL, 1)[..., None]
    lse_CBKGL = max_CBKGL + jnp.log(sum_CBKGL)
    o = _tokens_first(o_CBKGLP, T).reshape(B, T, N, P).astype(v.dtype)
    lse = jnp.moveaxis(_tokens_first(lse_CBKGL, T).reshape(B, T, N), 1, 2)
    return (o, lse), (*inputs, o, lse)


def backward(options, residuals, cotangents):
    """Returns the gradients of q, k, v, g and sinks. The softmax is computed again, from its denominator."""
    q, k, v, g, sinks, segment_ids, kv_segment_ids, positions, kv_positions, o, lse = residuals
    do, dlse = cotangents
    (_, T, _, _), (B, S, K, _) = q.shape, k.shape
    dtype = lse.dtype
    sides = tokens(options, segment_ids, kv_segment_ids, positions, kv_positions)
    queries, keys = _token_blocks(sides, T, S)
    # d score = p (dp - shift)
    shift_BTN = jnp.sum(o.astype(dtype) * do.astype(dtype), axis=3) - jnp.moveaxis(dlse, 1, 2)
    lse_BTN = jnp.moveaxis(lse, 1, 2)
    shift_BTN = jnp.where(lse_BTN == -jnp.inf, 0, shift_BTN)
    lse_BTN = jnp.where(lse_BTN == -jnp.inf, 0, lse_BTN)
    q_CBKGLH, do_CBKGLP, shift_CBKGL, lse_CBKGL = (_query_blocks(a, K, S) for a in (q, do, shift_BTN, lse_BTN))
    k_CBKSH, v_CBKSP = (_key_blocks(a, T) for a in (k, v))
    decay = _decay_blocks(g, sides, K)

    def step(i, j, grads):
        (dq_CBKGLH, dk_CBKSH, dv_CBKSP), ddecay = grads
        query, key = _at(queries, i), _at(keys, j)
        scores_BKGLS, dcap_BKGLS = _scores(options, q_CBKGLH[i], k_CBKSH[j], query, key, decay(i, j))
        p_BKGLS = _computed_once(jnp.exp(scores_BKGLS - lse_CBKGL[i][..., None]))
        dp_BKGLS = jnp.einsum("BKGLP,BKSP->BKGLS", do_CBKGLP[i], v_CBKSP[j], preferred_element_type=dtype)
        ds_BKGLS = p_BKGLS * (dp_BKGLS - shift_CBKGL[i][..., None])
        if ddecay is not None:
            # What a query sees of itself has not decayed: in the sums over both it would only cancel.
            is_other_BLS = query.places[:, :, None] != key.places[:, None, :]
            ddecay_BKGLS = jnp.where(is_other_BLS[:, None, None], ds_BKGLS, 0)
            rows_CBKGL, columns_CBKGS = ddecay
            rows_CBKGL = rows_CBKGL.at[i].add(jnp.sum(ddecay_BKGLS, axis=4))
            ddecay = rows_CBKGL, columns_CBKGS.at[j].add(jnp.sum(ddecay_BKGLS, axis=3))
        ds_BKGLS = options.scale * dcap_BKGLS * ds_BKGLS
        ds_BKGLS, p_BKGLS = ds_BKGLS.astype(q.dtype), p_BKGLS.astype(v.dtype)
        dq_BKGLH = jnp.einsum("BKGLS,BKSH->BKGLH", ds_BKGLS, k_CBKSH[j], preferred_element_type=dtype)
        dk_BKSH = jnp.einsum("BKGLS,BKGLH->BKSH", ds_BKGLS, q_CBKGLH[i], preferred_element_type=dtype)
        dv_BKSP = jnp.einsum("BKGLS,BKGLP->BKSP", p_BKGLS, do_CBKGLP[i], preferred_element_type=dtype)
        return (dq_CBKGLH.at[i].add(dq_BKGLH), dk_CBKSH.at[j].add(dk_BKSH), dv_CBKSP.at[j].add(dv_BKSP)), ddecay

    zeros = lambda *shapes: tuple(jnp.zeros(shape, dtype) for shape in shapes)
    grads = zeros(q_CBKGLH.shape, k_CBKSH.shape, v_CBKSP.shape)
    C_kv, _, _, L_kv, _ = k_CBKSH.shape
    ddecay = None if g is None else zeros(q_CBKGLH.shape[:5], (C_kv, B, K, q_CBKGLH.shape[3], L_kv))
    (dq_CBKGLH, dk_CBKSH, dv_CBKSP), ddecay = _for_each_pair(options, queries, keys, step, (grads, ddecay))
    dq = _tokens_first(dq_CBKGLH, T).reshape(q.shape).astype(q.dtype)
    unblock = lambda a: jnp.moveaxis(a, 3, 2).swapaxes(0, 1).reshape(B, -1, K, a.shape[-1])[:, :S]
    dk, dv = unblock(dk_CBKSH).astype(k.dtype), unblock(dv_CBKSP).astype(v.dtype)
    dg = None
    if g is not None and ddecay is not None:
        rows_BTN, columns_BSN = (_tokens_first(a, n).reshape(B, n, -1) for a, n in zip(ddecay, (T, S), strict=True))
        dg = decays.gradient(rows_BTN, columns_BSN, sides).astype(g.dtype)
    if sinks is None:
        return dq, dk, dv, dg, None
    is_query_BTN = (segment_ids > 0)[:, :, None]
    p_BTN = jnp.where(is_query_BTN, jnp.exp(jnp.where(is_query_BTN, sinks[None, None] - lse_BTN, 0)), 0)
    return dq, dk, dv, dg, -jnp.sum(p_BTN * shift_BTN, axis=(0, 1)).astype(sinks.dtype)


def _scores(options, q_BKGLH, k_BKSH, queries, keys, decay_BKGLS):
    """Returns the scores, -inf where a query does not see a key, and their derivative by the scores before the cap."""
    dtype = jnp.promote_types(jnp.float32, q_BKGLH.dtype)
    scores = options.scale * jnp.einsum("BKGLH,BKSH->BKGLS", q_BKGLH, k_BKSH, preferred_element_type=dtype)
    dcap = 1
    if options.soft_cap is not None:
        tanh = jnp.tanh(scores / options.soft_cap)
        scores, dcap = options.soft_cap * tanh, 1 - tanh**2
    if decay_BKGLS is not None:
        scores = scores + decay_BKGLS
    return jnp.where(sees(options, queries, keys)[:, None, None], scores, -jnp.inf), dcap


def _for_each_pair(options, queries, keys, step, carry):
    """Calls `carry = step(i, j, carry)` for the blocks i of queries and j of keys that see each other."""
    C, C_kv = queries.ids.shape[0], keys.ids.shape[0]
    if C * C_kv == 1:
        return step(0, 0, carry)
    seen_CC = blocks_that_see(options, queries, keys)
    (pairs,) = jnp.nonzero(seen_CC.reshape(-1), size=C * C_kv)
    body = lambda n, carry: step(pairs[n] // C_kv, pairs[n] % C_kv, carry)
    return jax.lax.fori_loop(0, jnp.sum(seen_CC), body, carry)


def _block_sizes(T, S):
    return (T, S) if T * S <= MAX_PAIRS_OF_ONE_BLOCK else (min(T, BLOCK_T), min(S, BLOCK_S))


def _blocks(a_BT, size):
    """Returns `[C B L ...]`, filled up with zeros, which as segment ids mean padding."""
    B, T = a_BT.shape[:2]
    a_BT = jnp.pad(a_BT, ((0, 0), (0, -T % size), *((0, 0) for _ in a_BT.shape[2:])))
    return a_BT.reshape(B, -1, size, *a_BT.shape[2:]).swapaxes(0, 1)


def _token_blocks(sides, T, S):
    blocks = lambda side, size: Tokens(*(_blocks(a, size) for a in side))
    return tuple(blocks(side, size) for side, size in zip(sides, _block_sizes(T, S), strict=True))


def _decay_blocks(g, sides, K):
    """Returns a function of i and j: how much the scores of blocks i of queries and j of keys have decayed, or None."""
    if g is None:
        return lambda i, j: None
    q_BTN2, k_BSN2 = decays.cumulative(g, sides)
    L, L_kv = _block_sizes(q_BTN2.shape[1], k_BSN2.shape[1])
    q_CBKGL2, k_CBKGS2 = _head_blocks(q_BTN2, K, L), _head_blocks(k_BSN2, K, L_kv)
    return lambda i, j: decays.between(q_CBKGL2[i], k_CBKGS2[j])


def _query_blocks(a_BTN, K, S):
    """Returns `[C B K G L ...]`."""
    return _head_blocks(a_BTN, K, _block_sizes(a_BTN.shape[1], S)[0])


def _head_blocks(a_BTN, K, L):
    B, _, N = a_BTN.shape[:3]
    return jnp.moveaxis(_blocks(a_BTN, L).reshape(-1, B, L, K, N // K, *a_BTN.shape[3:]), 2, 4)


def _key_blocks(a_BSK, T):
    """Returns `[C B K S ...]`, with S here the keys of a block."""
    _, L_kv = _block_sizes(T, a_BSK.shape[1])
    return jnp.moveaxis(_blocks(a_BSK, L_kv), 2, 3)


def _tokens_first(a_CBKGL, T):
    """Returns `[B T K G ...]`."""
    a_BCLKG = jnp.moveaxis(a_CBKGL, (1, 0, 4), (0, 1, 2))
    return a_BCLKG.reshape(a_BCLKG.shape[0], -1, *a_BCLKG.shape[3:])[:, :T]


def _computed_once(a):
    """Keeps the CPU backend from fusing, and so computing, exponentials into each of their several uses."""
    return jax.lax.optimization_barrier(a)


def _at(side, i):
    return Tokens(*(a[i] for a in side))
