"""The delta rule on TPU: which kernels take which decays."""

import jax.numpy as jnp

from pallas_kernels.delta_rule import tpu_scalar


def unsupported(q, k, v, g):
    """Returns why these arguments need another implementation, or None."""
    if g.ndim == 4:
        return "decays per channel"
    if any(x.dtype not in (jnp.float32, jnp.bfloat16) for x in (q, k, v)) or g.dtype != jnp.float32:
        return f"q {q.dtype}, k {k.dtype} and v {v.dtype}; they have to be float32 or bfloat16"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"heads wider than 256, and here keys have {q.shape[3]} and values {v.shape[3]}"
    return None


def forward(keep, scale, *inputs):
    """Returns (o, state) and the residuals, as `xla.forward`."""
    outputs, kept = tpu_scalar.forward(keep, scale, *inputs)
    return outputs, (*inputs, *kept) if keep else None


def backward(scale, residuals, cotangents):
    """Returns the gradients of q, k, v, beta, g and state."""
    return tpu_scalar.backward(scale, residuals, cotangents)
