"""Experts with a fixed number of slots for the tokens of each row (https://arxiv.org/abs/2006.16668)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_lm.sharding import per_shard


def fill_slots(
    experts: Int[Array, "B T K"], weights: Float[Array, "B T K"], num_experts: int, capacity: int
) -> tuple[Int[Array, "B E C"], Float[Array, "B E C"]]:
    """Returns which token each slot holds, T in empty ones, and its weight. Whoever comes late goes without.

    The order is that of the tokens, so that no token loses its place to a later one.
    """

    def fill(experts_TK, weights_TK):
        T, K = experts_TK.shape
        experts_A, tokens_A = experts_TK.reshape(-1), jnp.repeat(jnp.arange(T), K)
        is_chosen_AE = experts_A[:, None] == jnp.arange(num_experts)
        place_A = jnp.sum(jnp.where(is_chosen_AE, jnp.cumsum(is_chosen_AE, axis=0) - 1, 0), axis=1)
        slot_A = jnp.where(place_A < capacity, experts_A * capacity + place_A, num_experts * capacity)
        put = lambda empty, values_A: (
            jnp.full(num_experts * capacity, empty, values_A.dtype)
            .at[slot_A]
            .set(values_A, mode="drop")
            .reshape(num_experts, capacity)
        )
        return put(T, tokens_A), put(0, weights_TK.reshape(-1))

    return per_shard(jax.vmap(fill), "BTk,BTk", "Bec,Bec")(experts, weights)
