"""The output head and its cross entropy in one, without the logits of all tokens in memory."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import check_impl, dispatch
from pallas_kernels.linear_cross_entropy import ref, xla


def linear_cross_entropy(
    x: Float[Array, "B T D"],
    w: Float[Array, "D V"],
    labels: Int[Array, "B T"],
    *,
    weights: Float[Array, "B T"] | None = None,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    impl: Literal["ref", "xla"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns `weights * (nll + z_loss * lse**2)` per token, and lse, the log-sum-exp of the logits; both float32.

    The logits are `x @ w`, or `soft_cap * tanh(x @ w / soft_cap)`. A label may lie outside 0..V-1 only where its
    weight is 0.

    Raises:
      ValueError: an unknown `impl`, shapes that do not fit, or a `soft_cap` that is not positive.
    """
    check_impl("linear_cross_entropy", impl, ("ref", "xla"))
    if w.shape[0] != x.shape[2]:
        raise ValueError(f"w has {w.shape[0]} rows and x has width {x.shape[2]}; w is [D V]")
    for name, array in (("labels", labels), ("weights", weights)):
        if array is not None and array.shape != x.shape[:2]:
            raise ValueError(f"{name} is {array.shape}; it has to be {x.shape[:2]}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap is {soft_cap}; it has to be positive, or None for no cap")
    if weights is None:
        weights = jnp.ones(labels.shape, jnp.float32)
    if impl == "ref":
        return ref.linear_cross_entropy(x, w, labels, weights, z_loss, soft_cap)
    return _linear_cross_entropy(impl, z_loss, soft_cap, x, w, labels, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _linear_cross_entropy(impl, z_loss, soft_cap, *args):
    return _forward(impl, z_loss, soft_cap, *args)[0]


def _forward(impl, z_loss, soft_cap, *args):
    return dispatch(impl, {"xla": functools.partial(xla.forward, z_loss, soft_cap)}, *args)


def _backward(impl, z_loss, soft_cap, *args):
    dx, dw, dweights = dispatch(impl, {"xla": functools.partial(xla.backward, z_loss, soft_cap)}, *args)
    return dx, dw, None, dweights


_linear_cross_entropy.defvjp(_forward, _backward)
