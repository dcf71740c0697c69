"""The definition of `linear_cross_entropy`: one position at a time."""

import jax
import jax.numpy as jnp


def linear_cross_entropy(x, w, labels, weights, z_loss, soft_cap):
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    w_DV = w.astype(dtype)

    def step(carry, token):
        x_BD, label_B, weight_B = token
        logits_BV = jnp.einsum("BD,DV->BV", x_BD, w_DV)
        if soft_cap is not None:
            logits_BV = soft_cap * jnp.tanh(logits_BV / soft_cap)
        lse_B = jax.nn.logsumexp(logits_BV, axis=1)
        # A label outside the vocabulary matches nothing: its logit counts as 0.
        is_label_BV = label_B[:, None] == jnp.arange(logits_BV.shape[1])[None]
        nll_B = lse_B - jnp.sum(jnp.where(is_label_BV, logits_BV, 0), axis=1)
        return carry, (weight_B * (nll_B + z_loss * lse_B**2), lse_B)

    tokens = (x.astype(dtype), labels, weights.astype(dtype))
    _, (loss_TB, lse_TB) = jax.lax.scan(step, None, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tokens))
    return loss_TB.T, lse_TB.T
