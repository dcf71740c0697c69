"""Values that no gradient trains: they follow what the forward pass measures, one step after the other.

A measurement leaves the forward pass as the gradient of its buffer. So it comes out of scanned, recomputed and sharded
layers, and adds up over parts of a batch, by the same rules as all gradients; the training step tells the two apart.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Buffer(nnx.Variable):
    """A value, saved with the model, and the rule that it follows."""

    def following(self, measured: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the next value, given the measurement summed over the batch and divided by its number of tokens."""
        raise NotImplementedError


def measure(buffer: Buffer, measured: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `x`; whoever differentiates it finds `measured` where the gradient of the buffer would be."""
    return _measure(buffer[...], measured, x)


@jax.custom_vjp
def _measure(value, measured, x):
    return x


_measure.defvjp(lambda value, measured, x: (x, measured), lambda measured, dx: (measured, None, dx))


def split(grads: Any) -> tuple[Any, Any]:
    """Returns the gradients of a model, zero at buffers, and what was measured, None elsewhere."""
    zero = lambda v: jax.tree.map(jnp.zeros_like, v) if isinstance(v, Buffer) else v
    measured = lambda v: v[...] if isinstance(v, Buffer) else None
    return _per_variable(zero, grads), _per_variable(measured, grads)


def follow(model: Any, measured: Any) -> Any:
    """Returns the model with its buffers at their next values."""
    following = lambda v, m: v.copy(v.following(m)) if isinstance(v, Buffer) else v
    return _per_variable(following, model, measured)


def _per_variable(fn: Any, *trees: Any) -> Any:
    return jax.tree.map(fn, *trees, is_leaf=lambda x: x is None or isinstance(x, nnx.Variable))
