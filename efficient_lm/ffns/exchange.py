"""Rows of different numbers between the devices of a mesh axis; for use inside `jax.shard_map`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# PQ: from device P of the axis to device Q. R: rows of one device.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def exchange(axis: str, num_rows: int, x_RD, sizes_PQ, from_PQ, to_PQ):
    """Sends `sizes[p, q]` rows from device p to device q: those from row `from[p, q]` on, to row `to[p, q]` on.

    Returns the `num_rows` rows of this device; what nobody wrote is zero. All devices know all sizes.
    """
    send = functools.partial(_ragged, axis, num_rows)
    padded = functools.partial(_padded, axis, num_rows)
    run: Any = jax.lax.platform_dependent
    return run(x_RD, sizes_PQ, from_PQ, to_PQ, tpu=send, cuda=send, default=padded)


def _forward(axis, num_rows, x_RD, sizes_PQ, from_PQ, to_PQ):
    return exchange(axis, num_rows, x_RD, sizes_PQ, from_PQ, to_PQ), (x_RD, sizes_PQ, from_PQ, to_PQ)


def _backward(axis, num_rows, residuals, dy_RD):
    # Gradients go back to where the rows came from.
    x_RD, sizes_PQ, from_PQ, to_PQ = residuals
    return exchange(axis, x_RD.shape[0], dy_RD, sizes_PQ.T, to_PQ.T, from_PQ.T), None, None, None


exchange.defvjp(_forward, _backward)


def _ragged(axis, num_rows, x_RD, sizes_PQ, from_PQ, to_PQ):
    me = jax.lax.axis_index(axis)
    zeros_RD = jnp.zeros((num_rows, x_RD.shape[1]), x_RD.dtype)
    offsets = from_PQ[me], sizes_PQ[me], to_PQ[me], sizes_PQ[:, me]
    return jax.lax.ragged_all_to_all(x_RD, zeros_RD, *offsets, axis_name=axis)


def _padded(axis, num_rows, x_RD, sizes_PQ, from_PQ, to_PQ):
    """The same where there is no collective for ragged rows, as on a CPU: all are padded to the longest they can be."""
    me, longest_L = jax.lax.axis_index(axis), jnp.arange(min(x_RD.shape[0], num_rows))
    index_QL = from_PQ[me][:, None] + longest_L
    sent_QLD = jnp.where((longest_L < sizes_PQ[me][:, None])[..., None], x_RD.at[index_QL].get(mode="clip"), 0)
    got_PLD = jax.lax.all_to_all(sent_QLD, axis, split_axis=0, concat_axis=0)
    index_PL = jnp.where(longest_L < sizes_PQ[:, me][:, None], to_PQ[:, me][:, None] + longest_L, num_rows)
    return jnp.zeros((num_rows, x_RD.shape[1]), x_RD.dtype).at[index_PL].set(got_PLD, mode="drop")
