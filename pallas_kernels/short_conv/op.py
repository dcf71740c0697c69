"""Causal depthwise convolution over a few tokens, with state: y_t = act(bias + sum_j w_j x_{t-W+1+j})."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import check_impl, dispatch
from pallas_kernels.short_conv import ref, step, tpu, xla

MAX_WIDTH = 8


def short_conv(
    x: Float[Array, "B T D"],
    w: Float[Array, "D W"],
    *,
    bias: Float[Array, "D"] | None = None,
    activation: Literal["silu"] | None = None,
    state: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: Literal["ref", "xla", "tpu"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Returns the outputs and the last W-1 inputs, oldest first, in the dtype of `state` (of `x` without one).

    `w[:, -1]` multiplies the current token. A document reads zeros before its first token, only the row's first one
    reads `state`. Padding (segment id 0) is as if removed, wherever it stands; its outputs are 0.

    Raises:
      ValueError: an unknown `impl` or `activation`, shapes that do not fit, or a width over 8.
    """
    check_impl("short_conv", impl, ("ref", "xla", "tpu"))
    B, _, D = x.shape
    W = w.shape[1]
    if w.shape[0] != D:
        raise ValueError(f"w has {w.shape[0]} channels and x has {D}; w is [D W]")
    if not 1 <= W <= MAX_WIDTH:
        raise ValueError(f"width {W} is not in 1..{MAX_WIDTH}; a longer convolution wants a scan or an FFT")
    if activation not in (None, "silu"):
        raise ValueError(f"activation {activation!r} is unknown; it is 'silu' or None")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias is {bias.shape}; it has to be {(D,)}")
    if state is None:
        state = jnp.zeros((B, W - 1, D), x.dtype)
    if state.shape != (B, W - 1, D):
        raise ValueError(f"state is {state.shape}; it has to be {(B, W - 1, D)}: the last W-1 inputs")
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
        raise ValueError(f"segment_ids is {segment_ids.shape}; it has to be {x.shape[:2]}")
    if x.shape[1] == 0:
        segment_ids = None
    if impl is None and x.shape[1] < 64:
        impl = "xla"  # Not worth a block of a kernel.
    if impl == "ref":
        return ref.short_conv(x, w, bias, state, segment_ids, activation)
    if x.shape[1] == 1:
        return step.short_conv(x, w, bias, state, segment_ids, activation)
    return _short_conv(impl, activation, x, w, bias, state, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _short_conv(impl, activation, *args):
    return _forward(impl, activation, *args)[0]


def _forward(impl, activation, *args):
    return dispatch(impl, _bind(activation, xla=xla.forward, tpu=tpu.forward), *args)


def _backward(impl, activation, *args):
    return *dispatch(impl, _bind(activation, xla=xla.backward, tpu=tpu.backward), *args), None


def _bind(activation, **implementations):
    return {name: functools.partial(fn, activation) for name, fn in implementations.items()}


_short_conv.defvjp(_forward, _backward)
