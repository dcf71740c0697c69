"""The delta rule on TPU: which kernels take which decays."""

from pallas_kernels.common.walk import unsupported as unsupported
from pallas_kernels.delta_rule import tpu_channel, tpu_scalar


def forward(keep, scale, *inputs):
    """Returns (o, state) and, if they are to be kept, the states before each chunk and the inverses."""
    *_, g, _, _ = inputs
    return _kernels(g).forward(keep, scale, *inputs)


def backward(scale, residuals, cotangents):
    """Returns the gradients of q, k, v, beta, g and state."""
    *_, g, _, _, _, _ = residuals
    return _kernels(g).backward(scale, residuals, cotangents)


def _kernels(g):
    return tpu_scalar if g.ndim == 3 else tpu_channel
