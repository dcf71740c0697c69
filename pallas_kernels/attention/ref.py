"""The definition of `attention`: one query at a time, a softmax over all the keys that it sees."""

import jax
import jax.numpy as jnp


def attention(options, q, k, v, g, sinks, ids, kv_ids, positions, kv_positions):
    B, T, N, _ = q.shape
    S, G = k.shape[1], N // k.shape[2]
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    k_BSNH, v_BSNP = (jnp.repeat(a.astype(dtype), G, axis=2) for a in (k, v))
    # Padding is as if removed: places count the real keys before, of the row and of the key's own document.
    is_key_BS = kv_ids > 0
    place_BS = jnp.cumsum(is_key_BS, axis=1)
    same_BSS = kv_ids[:, :, None] == kv_ids[:, None, :]
    place_in_document_BS = jnp.sum(same_BSS & jnp.tri(S, k=-1, dtype=bool)[None], axis=2)
    place_BT = place_BS[:, jnp.clip(S - T + jnp.arange(T), 0, S - 1)]
    if positions is not None:
        place_BT, place_BS, place_in_document_BS = positions, kv_positions, kv_positions

    def step(carry, token):
        q_BNH, id_B, place_B = token
        ahead_BS = place_BS - place_B[:, None]
        sees_BS = is_key_BS & (kv_ids == id_B[:, None])
        if options.causal:
            sees_BS &= ahead_BS <= 0
        if options.window_size is not None:
            sees_BS &= (jnp.abs(ahead_BS) < options.window_size) | (place_in_document_BS < options.sink_tokens)
        scores_BNS = options.scale * jnp.einsum("BNH,BSNH->BNS", q_BNH, k_BSNH)
        if options.soft_cap is not None:
            scores_BNS = options.soft_cap * jnp.tanh(scores_BNS / options.soft_cap)
        if g is not None:  # The sum over the tokens after the key, up to the query.
            passed_BSN = jnp.where((is_key_BS & (ahead_BS <= 0))[..., None], g.astype(dtype), 0)
            decay_BSN = jnp.pad(jax.lax.cumsum(passed_BSN, axis=1, reverse=True)[:, 1:], ((0, 0), (0, 1), (0, 0)))
            scores_BNS = scores_BNS + jnp.moveaxis(decay_BSN, 1, 2)
        sees_BNS = jnp.broadcast_to(sees_BS[:, None], scores_BNS.shape)
        if sinks is not None:  # One more key, which every real query sees and whose value is 0.
            sinks_BN1 = jnp.broadcast_to(sinks.astype(dtype)[None, :, None], (B, N, 1))
            scores_BNS = jnp.concatenate([scores_BNS, sinks_BN1], axis=2)
            sees_BNS = jnp.concatenate([sees_BNS, jnp.broadcast_to((id_B > 0)[:, None, None], (B, N, 1))], axis=2)
        is_blind_BN = ~jnp.any(sees_BNS, axis=2)
        scores_BNS = jnp.where(sees_BNS, scores_BNS, -jnp.inf)
        # The inner where keeps the gradient of a query that sees nothing finite.
        lse_BN = jax.nn.logsumexp(jnp.where(is_blind_BN[..., None], 0, scores_BNS), axis=2)
        p_BNS = jnp.where(sees_BNS, jnp.exp(scores_BNS - lse_BN[..., None]), 0)
        o_BNP = jnp.einsum("BNS,BSNP->BNP", p_BNS[..., :S], v_BSNP)
        return carry, (o_BNP, jnp.where(is_blind_BN, -jnp.inf, lse_BN))

    tokens = (jnp.moveaxis(q.astype(dtype), 1, 0), ids.T, place_BT.T)
    _, (o_TBNP, lse_TBN) = jax.lax.scan(step, None, tokens)
    return jnp.moveaxis(o_TBNP, 0, 1).astype(v.dtype), jnp.moveaxis(lse_TBN, 0, 2)
