"""Linear attention on TPU: which kernels take which decays."""

from pallas_kernels.common.walk import unsupported as unsupported
from pallas_kernels.linear_attention import tpu_channel, tpu_scalar


def forward(scale, before, q, k, v, g, state, segment_ids):
    """Returns (o, state), as `xla.forward`. segment_ids are the user's: 0 is padding, where v and g may be anything."""
    return _kernels(g).forward(scale, before, q, k, v, g, state, segment_ids)


def backward(scale, before, inputs, cotangents):
    """Returns the gradients of q, k, v, g and state, given the arguments of `forward` and the gradients of o and state.

    No states are kept from forward to backward: the residuals are the inputs.
    """
    return _kernels(inputs[3]).backward(scale, before, inputs, cotangents)


def _kernels(g):
    return tpu_scalar if g.ndim == 3 else tpu_channel
