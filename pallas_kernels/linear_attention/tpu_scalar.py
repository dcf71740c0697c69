"""Linear attention with one decay per head and token, on TPU."""


def unsupported(q, k, v, g):
    """Returns why these arguments need another implementation, or None."""
    return "anything yet"


def forward(scale, before, q, k, v, g, state, segment_ids):
    """Returns (o, state)."""
    raise NotImplementedError


def backward(scale, before, inputs, cotangents):
    """Returns the gradients of q, k, v, g and state."""
    raise NotImplementedError
