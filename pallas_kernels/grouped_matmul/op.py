"""Each group of rows times its own matrix: the experts of a mixture, without capacity and without padding."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.dispatch import check_impl, dispatch, supported
from pallas_kernels.grouped_matmul import ref, tpu, xla


def grouped_matmul(
    x: Float[Array, "R D"],
    w: Float[Array, "E D F"],
    group_sizes: Int[Array, "E"],
    *,
    impl: Literal["ref", "xla", "tpu"] | None = None,
) -> Float[Array, "R F"]:
    """Returns `x[r] @ w[e]` for each row r, where e is its group; in the dtype of `x`.

    The first `group_sizes[0]` rows are group 0, those after them group 1, and so on. Groups may be empty. Rows after
    the last group give zeros, and have no gradient. Sums are float32 (of float64 operands, float64).

    Raises:
      ValueError: an unknown `impl`, or shapes that do not fit.
    """
    check_impl("grouped_matmul", impl, ("ref", "xla", "tpu"))
    if w.shape[1] != x.shape[1]:
        raise ValueError(f"w has matrices of {w.shape[1]} rows and x has width {x.shape[1]}; w is [E D F]")
    if group_sizes.shape != (w.shape[0],):
        raise ValueError(f"group_sizes is {group_sizes.shape}; it has to be {(w.shape[0],)}: one size per matrix of w")
    chosen = supported("grouped_matmul", impl, tpu.unsupported(x, w))
    if chosen == "ref" or x.shape[0] == 0:
        return ref.grouped_matmul(x, w, group_sizes)
    return _grouped_matmul(chosen, x, w, jnp.asarray(group_sizes, jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(impl, x, w, group_sizes):
    return dispatch(impl, {"xla": xla.forward, "tpu": tpu.forward}, x, w, group_sizes)


def _forward(impl, *args):
    return _grouped_matmul(impl, *args), args


def _backward(impl, residuals, dy):
    x, w, group_sizes = residuals
    return *dispatch(impl, {"xla": xla.backward, "tpu": tpu.backward}, x, w, group_sizes, dy), None


_grouped_matmul.defvjp(_forward, _backward)
