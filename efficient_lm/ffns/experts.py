"""Experts: networks side by side, each of which works on its own rows."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from efficient_lm.ffns.base import Aux
from efficient_lm.ffns.exchange import exchange
from efficient_lm.ffns.mlp import activate
from efficient_lm.sharding import einsum, per_shard, shard

# A: what is sent to an expert, K for each token. C: slots of an expert. PQ: from device P of the expert axis to Q.


class Experts(nnx.Module):
    def __init__(
        self,
        *,
        d_model: int,
        d_ff: int,
        num_experts: int,
        activation: Literal["swiglu", "gelu", "squared_relu"],
        share: float,
        room: float | None = None,
        rngs: nnx.Rngs,
    ):
        """`share` is the part of the experts that one token uses; FLOPs are counted with it. `room`: see MoEConfig."""
        self.num_experts, self.room = num_experts, room
        self.activation: Literal["swiglu", "gelu", "squared_relu"] = activation
        E, D, F = num_experts, d_model, d_ff

        def draw(shape, dims):
            kernel = jax.random.normal(rngs.params(), shape, jnp.float32) * shape[1] ** -0.5
            return nnx.Param(shard(kernel, dims), dims=dims, contracted=dims[1], stacked="E", share=share)

        self.up_proj = draw((E, D, F), "EDF")
        self.gate_proj = draw((E, D, F), "EDF") if activation == "swiglu" else None
        self.down_proj = draw((E, F, D), "EFD")

    def chosen(
        self, x: Float[Array, "B T D"], experts: Int[Array, "B T K"], weights: Float[Array, "B T K"]
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """Returns the weighted sum of what each token's experts make of it; expert number E is none.

        No token is dropped, however many choose the same expert, unless devices have no `room` for all. Devices of the
        expert axis send tokens to each other.
        """
        run = per_shard(self._sorted, "BTD,BTk,BTk,EdF,EdF,EFd", "BTD,B")
        y_BTD, lost_B = run(x, experts, weights, *self._kernels(x.dtype, "EdF"))
        if self.room is None:
            return y_BTD, {}
        return y_BTD, {"dropped": jnp.sum(lost_B) / jnp.maximum(jnp.sum(experts < self.num_experts), 1)}

    @jax.named_scope("experts")
    def _sorted(self, x_BTD, experts_BTK, weights_BTK, *matrices):
        D, K = x_BTD.shape[2], experts_BTK.shape[2]
        experts_A = experts_BTK.reshape(-1)
        order_A, inverse_A = _sorting(experts_A)
        sizes_E = jnp.sum(experts_A[:, None] == jnp.arange(self.num_experts), axis=0, dtype=jnp.int32)
        x_AD = _permute(K, x_BTD.reshape(-1, D), order_A, inverse_A)
        if _axis_size("expert") == 1:
            y_AD, is_lost_A = self._network(x_AD, sizes_E, *matrices), jnp.zeros(experts_A.shape, bool)
        else:
            y_AD, is_lost_A = self._elsewhere(x_AD, sizes_E, *matrices)
        y_BTKD = _permute(1, y_AD, inverse_A, order_A).reshape(*experts_BTK.shape, D)
        y_BTD = jnp.einsum("BTKD,BTK->BTD", y_BTKD, weights_BTK, preferred_element_type=weights_BTK.dtype)
        if _axis_size("model") > 1:  # Each device has some of the hidden channels.
            y_BTD = jax.lax.psum(y_BTD, "model")
        return y_BTD.astype(x_BTD.dtype), jnp.sum(is_lost_A[inverse_A].reshape(experts_BTK.shape), axis=(1, 2))

    def _elsewhere(self, x_AD, sizes_E, *matrices):
        """Sends sorted rows to where their experts are, and back; returns them, and which found no room."""
        P, me, num_rows = _axis_size("expert"), jax.lax.axis_index("expert"), x_AD.shape[0]
        E = self.num_experts // P
        counts_PQE = jax.lax.all_gather(sizes_E, "expert").reshape(P, P, E)
        sizes_PQ = jnp.sum(counts_PQE, axis=2)
        from_PQ = jnp.cumsum(sizes_PQ, axis=1) - sizes_PQ
        # Without a limit, all rows of all devices may come here.
        capacity = P * num_rows if self.room is None else min(math.ceil(self.room * num_rows), P * num_rows)
        if self.room is not None:  # The last rows of the last devices stay away.
            ends_QX = jnp.minimum(jnp.cumsum(counts_PQE.swapaxes(0, 1).reshape(P, P * E), axis=1), capacity)
            counts_PQE = jnp.diff(ends_QX, axis=1, prepend=0).reshape(P, P, E).swapaxes(0, 1)
            sizes_PQ = jnp.sum(counts_PQE, axis=2)
        to_PQ = jnp.cumsum(sizes_PQ, axis=0) - sizes_PQ

        x_RD = exchange("expert", capacity, x_AD, sizes_PQ, from_PQ, to_PQ)
        # They come device by device, and sorted from each of them.
        counts_PE = counts_PQE[:, me]
        block_R = jnp.searchsorted(jnp.cumsum(counts_PE), jnp.arange(capacity), side="right")
        order_R, inverse_R = _sorting(jnp.where(block_R < P * E, block_R % E, E))
        y_RD = self._network(_permute(1, x_RD, order_R, inverse_R), jnp.sum(counts_PE, axis=0), *matrices)
        y_RD = _permute(1, y_RD, inverse_R, order_R)
        y_AD = exchange("expert", num_rows, y_RD, sizes_PQ.T, to_PQ.T, from_PQ.T)

        row_A1 = jnp.arange(num_rows)[:, None]
        is_sent_A = jnp.any((row_A1 >= from_PQ[me]) & (row_A1 < from_PQ[me] + sizes_PQ[me]), axis=1)
        return y_AD, (row_A1[:, 0] < jnp.sum(sizes_E)) & ~is_sent_A

    def _network(self, x_AD, sizes_E, up_EDF, gate_EDF, down_EFD):
        gate_AF = None if gate_EDF is None else kernels.grouped_matmul(x_AD, gate_EDF, sizes_E)
        hidden_AF = activate(self.activation, kernels.grouped_matmul(x_AD, up_EDF, sizes_E), gate_AF)
        return kernels.grouped_matmul(hidden_AF, down_EFD, sizes_E)

    @jax.named_scope("experts")
    def gathered(
        self, x: Float[Array, "B T D"], tokens: Int[Array, "B E C"], weights: Float[Array, "B E C"]
    ) -> Float[Array, "B T D"]:
        """Returns for each token the weighted sum over the slots that hold it; slots with token T are empty."""
        rows = lambda B: jnp.arange(B)[:, None, None]
        take = per_shard(lambda x, at: x.at[rows(len(x)), at].get(mode="fill", fill_value=0), "BTD,Bec", "BecD")

        def add(y_BECD, at, weights):
            y_BTD = jnp.zeros((len(at), *x.shape[1:]), weights.dtype)
            return y_BTD.at[rows(len(at)), at].add(weights[..., None] * y_BECD, mode="drop").astype(x.dtype)

        y_BECD = self.slots(take(x, tokens))
        return per_shard(add, "BecD,Bec,Bec", "BTD")(y_BECD, tokens, weights)

    def slots(self, x: Float[Array, "B E C D"]) -> Float[Array, "B E C D"]:
        """Returns what each expert makes of its slots. Devices of the expert axis send slots to each other."""
        # The same array in another layout: with experts on the expert axis instead of rows. XLA does the rest.
        x_EBCD = shard(jnp.swapaxes(x, 0, 1), "EBCD")
        up_EDF, gate_EDF, down_EFD = self._kernels(x.dtype, "EDF")
        gate_EBCF = None if gate_EDF is None else einsum("EBCD,EDF->EBCF", x_EBCD, gate_EDF)
        hidden_EBCF = activate(self.activation, einsum("EBCD,EDF->EBCF", x_EBCD, up_EDF), gate_EBCF)
        y_EBCD = einsum("EBCF,EFD->EBCD", hidden_EBCF, down_EFD)
        return shard(jnp.swapaxes(y_EBCD, 0, 1), "BecD")

    def _kernels(self, dtype: DTypeLike, dims: str) -> tuple[Any, Any, Any]:
        back = dims[0] + dims[2] + dims[1]
        place = lambda kernel, dims: None if kernel is None else shard(kernel[...].astype(dtype), dims)
        return place(self.up_proj, dims), place(self.gate_proj, dims), place(self.down_proj, back)


def _axis_size(name):
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def _sorting(experts_A):
    """Returns the order in which experts have their rows together, and the order that undoes it."""
    order_A = jnp.argsort(experts_A, stable=True)
    return order_A, jnp.argsort(order_A)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _permute(K, x_RD, order_A, inverse_A):
    """Returns the rows of x, each of them K times, in the given order."""
    return x_RD[order_A // K]


def _permute_backward(K, inverse_A, dy_AD):
    # The gradient of a gather would be a scatter, which accelerators do one row after the other.
    dy_RKD = dy_AD[inverse_A].reshape(-1, K, dy_AD.shape[1])
    return jnp.sum(dy_RKD, axis=1, dtype=jnp.promote_types(jnp.float32, dy_AD.dtype)).astype(dy_AD.dtype), None, None


_permute.defvjp(lambda K, x, order, inverse: (_permute(K, x, order, inverse), inverse), _permute_backward)
