"""The definition of `block_sparse_attention`: a softmax over all keys, masked by what was chosen."""

import jax
import jax.numpy as jnp


def block_sparse_attention(options, q, k, v, block_ids, segment_ids):
    """Takes canonical ids and the documents of all S positions; returns o and lse."""
    (_, T, N, _), (_, S, K, _) = q.shape, k.shape
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    k_BSNH, v_BSNP = (jnp.repeat(a.astype(dtype), N // K, axis=2) for a in (k, v))
    chosen_BUKS = jnp.any(block_ids[..., None] == jnp.arange(S) // options.block_size, axis=3)
    chosen_BTKS = jnp.repeat(chosen_BUKS, options.query_block, axis=1)[:, :T]
    # Padding is as if removed: a token's place is the number of real tokens up to it.
    place_BS = jnp.cumsum(segment_ids > 0, axis=1)
    place_BT, ids_BT = place_BS[:, S - T :], segment_ids[:, S - T :]
    behind_BTS = place_BT[:, :, None] - place_BS[:, None, :]
    sees_BTS = (ids_BT[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, None, :] & (behind_BTS >= 0)
    if options.window_size is not None:
        sees_BTS &= behind_BTS < options.window_size
    sees_BNTS = jnp.repeat(jnp.moveaxis(chosen_BTKS, 2, 1), N // K, axis=1) & sees_BTS[:, None]
    scores_BNTS = options.scale * jnp.einsum("BTNH,BSNH->BNTS", q.astype(dtype), k_BSNH)
    scores_BNTS = jnp.where(sees_BNTS, scores_BNTS, -jnp.inf)
    is_blind_BNT = ~jnp.any(sees_BNTS, axis=3)
    # The inner where keeps the gradient of a query that sees nothing finite.
    lse_BNT = jax.nn.logsumexp(jnp.where(is_blind_BNT[..., None], 0, scores_BNTS), axis=3)
    p_BNTS = jnp.where(sees_BNTS, jnp.exp(scores_BNTS - lse_BNT[..., None]), 0)
    o_BTNP = jnp.einsum("BNTS,BSNP->BTNP", p_BNTS, v_BSNP)
    return o_BTNP.astype(v.dtype), jnp.where(is_blind_BNT, -jnp.inf, lse_BNT)
