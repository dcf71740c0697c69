"""`linear_cross_entropy` over chunks of tokens, forward and backward."""

import jax
import jax.numpy as jnp

# Logits of one chunk: a small part of memory. And tokens, at least: each chunk reads and writes the gradient of w once,
# which as many tokens make cheap beside the matmuls on accelerators (on a CPU all sizes took equally long).
CHUNK_LOGITS = 2**22
MIN_CHUNK = 1024


def forward(z_loss, soft_cap, x, w, labels, weights):
    """Returns `(loss, lse)` and the residuals."""

    def step(carry, chunk):
        x_LD, label_L = chunk
        logits_LV = _logits(x_LD, w, soft_cap)
        max_L = jnp.max(logits_LV, axis=1)
        lse_L = max_L + jnp.log(jnp.sum(jnp.exp(logits_LV - max_L[:, None]), axis=1))
        # A label outside the vocabulary, which only a weight of 0 may have, reads a logit of 0. -1 is not the last one.
        label_L = jnp.where(label_L < 0, w.shape[1], label_L)
        label_logit_L = jnp.take_along_axis(logits_LV, label_L[:, None], axis=1, mode="fill", fill_value=0)[:, 0]
        return carry, (lse_L, lse_L - label_logit_L)

    _, rows = jax.lax.scan(step, None, tuple(_chunks(a, w.shape[1]) for a in (x, labels)))
    lse_BT, nll_BT = (a.reshape(-1)[: labels.size].reshape(labels.shape) for a in rows)
    loss_BT = weights * (nll_BT + z_loss * lse_BT**2)
    return (loss_BT, lse_BT), (x, w, labels, weights, nll_BT, lse_BT)


def backward(z_loss, soft_cap, residuals, cotangents):
    """Returns the gradients of x, w and weights.

    The logits are computed again. Gradients cannot be formed on the way forward, because the cotangents differ from
    token to token.
    """
    x, w, labels, weights, nll_BT, lse_BT = residuals
    dloss_BT, dlse_BT = cotangents
    # d loss / d logits = all_BT * softmax - hit_BT * one_hot(label)
    hit_BT = dloss_BT * weights
    all_BT = hit_BT * (1 + 2 * z_loss * lse_BT) + dlse_BT

    def step(dw_DV, chunk):
        x_LD, label_L, hit_L, all_L, lse_L = chunk
        logits_LV = _logits(x_LD, w, soft_cap)
        is_label_LV = label_L[:, None] == jnp.arange(w.shape[1])[None]
        dlogits_LV = jnp.exp(logits_LV - lse_L[:, None]) * all_L[:, None] - jnp.where(is_label_LV, hit_L[:, None], 0)
        if soft_cap is not None:
            dlogits_LV *= 1 - (logits_LV / soft_cap) ** 2
        dlogits_LV = dlogits_LV.astype(jnp.result_type(x, w))
        dx_LD = jnp.einsum("LV,DV->LD", dlogits_LV, w, preferred_element_type=logits_LV.dtype)
        return dw_DV + jnp.einsum("LD,LV->DV", x_LD, dlogits_LV, preferred_element_type=dw_DV.dtype), dx_LD

    chunks = tuple(_chunks(a, w.shape[1]) for a in (x, labels, hit_BT, all_BT, lse_BT))
    dw_DV, dx_CLD = jax.lax.scan(step, jnp.zeros(w.shape, lse_BT.dtype), chunks)
    dx = dx_CLD.reshape(-1, x.shape[2])[: labels.size].reshape(x.shape)
    dweights = dloss_BT * (nll_BT + z_loss * lse_BT**2)
    return dx.astype(x.dtype), dw_DV.astype(w.dtype), dweights.astype(weights.dtype)


def _logits(x_LD, w_DV, soft_cap):
    dtype = jnp.promote_types(jnp.float32, x_LD.dtype)
    logits_LV = jnp.einsum("LD,DV->LV", x_LD, w_DV, preferred_element_type=dtype)
    return logits_LV if soft_cap is None else soft_cap * jnp.tanh(logits_LV / soft_cap)


def _chunks(a_BT, V):
    """Returns `[C L ...]`: the tokens of all rows, in chunks of equal size, filled up with zeros."""
    tokens = a_BT.reshape(-1, *a_BT.shape[2:])
    size = min(max(CHUNK_LOGITS // V, MIN_CHUNK), tokens.shape[0])
    num_chunks = -(-tokens.shape[0] // max(size, 1))
    size = -(-tokens.shape[0] // max(num_chunks, 1))
    tokens = jnp.pad(tokens, ((0, num_chunks * size - tokens.shape[0]), *((0, 0) for _ in tokens.shape[1:])))
    return tokens.reshape(num_chunks, size, *a_BT.shape[2:])
