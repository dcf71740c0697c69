"""MoE++: beside the experts, choices that cost next to nothing (https://arxiv.org/abs/2410.07348).

A token may go to nobody (null), be itself (copy), or be mixed with a learned vector (constant): so easy tokens leave
the experts to hard ones. With null experts alone it is AdaMoE (https://arxiv.org/abs/2406.13233).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from efficient_lm.ffns.base import Aux
from efficient_lm.ffns.experts import Experts
from efficient_lm.ffns.routers.base import Router, RouterConfig, load_report, loads, mean_over_tokens
from efficient_lm.layers import Einsum
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroComputationConfig(RouterConfig):
    """Weights are the probabilities of a softmax over all choices."""

    top_k: int
    """Choices of a token, of all kinds."""
    num_null: int = 0
    num_copy: int = 0
    num_constant: int = 0
    expected_experts: float
    """Of the choices of a token, how many are experts, on average; to count FLOPs by."""
    balance_loss: float = 0.0
    """Weight of the loss that is least when loads go with prices."""
    price: float = 0.75
    """In that loss, of a choice that is no expert; experts have 1. The less, the more tokens go there."""

    def build(self, d_model: int, num_experts: int, *, rngs: nnx.Rngs) -> "ZeroComputation":
        num_choices = num_experts + self.num_null + self.num_copy + self.num_constant
        if not 1 <= self.top_k <= num_choices:
            raise ValueError(f"top_k={self.top_k} is not in 1..{num_choices}, the number of choices")
        if not 0 < self.expected_experts <= min(self.top_k, num_experts):
            raise ValueError(f"expected_experts={self.expected_experts} are more than a token may have, or none")
        return ZeroComputation(self, d_model, num_experts, rngs=rngs)

    def experts_per_token(self, num_experts: int) -> float:
        return self.expected_experts


class ZeroComputation(Router):
    def __init__(self, cfg: ZeroComputationConfig, d_model: int, num_experts: int, *, rngs: nnx.Rngs):
        D, J = d_model, cfg.num_constant
        self.cfg = cfg
        C = num_experts + cfg.num_null + cfg.num_copy + J
        # In this order: experts, null, copy, constant.
        self.proj = Einsum("BTD,DC->BTC", D=D, C=C, rngs=rngs)
        vectors_JD = jax.random.normal(rngs.params(), (J, D), jnp.float32)
        self.vectors = nnx.Param(shard(vectors_JD, "jd")) if J else None
        # How much of a constant expert's output is the token, and how much its vector: Z = 2.
        self.mix_proj = Einsum("BTD,DJZ->BTJZ", D=D, J=J, Z=2, rngs=rngs) if J else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        is_real: Bool[Array, "B T"],
        experts: Experts,
        tokens: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        E, x32_BTD = experts.num_experts, x.astype(jnp.float32)
        scores_BTC = jax.nn.softmax(self.proj(x32_BTD))
        choices_BTK, weights_BTK = per_shard(self._choose, "BTc,BT", "BTk,BTk")(scores_BTC, is_real)
        y_BTD, sent = experts.chosen(x, jnp.minimum(choices_BTK, E), jnp.where(choices_BTK < E, weights_BTK, 0.0))
        vectors_JD, mix_BTJZ = None, None
        if self.vectors is not None and self.mix_proj is not None:
            vectors_JD, mix_BTJZ = self.vectors[...], jax.nn.softmax(self.mix_proj(x32_BTD))
        free = per_shard(self._free, "BTD,BTk,BTk,jd,BTjz", "BTD")
        y_BTD += free(x32_BTD, choices_BTK - E, weights_BTK, vectors_JD, mix_BTJZ).astype(x.dtype)

        load_C = loads(choices_BTK, scores_BTC.shape[-1])
        load_E = load_C[:E]
        aux = sent | load_report(load_E) | {"experts_per_token": jnp.sum(load_E) / jnp.maximum(jnp.sum(is_real), 1)}
        if self.cfg.balance_loss > 0:
            prices_C = jnp.where(jnp.arange(load_C.size) < E, 1.0, self.cfg.price)
            shares_C = load_C / jnp.maximum(jnp.sum(load_C), 1.0)
            even = load_C.size * jnp.sum(prices_C * shares_C * mean_over_tokens(scores_BTC, is_real))
            aux["balance_loss"] = self.cfg.balance_loss * even
        return y_BTD, aux

    def _choose(self, scores_BTC, is_real_BT):
        weights_BTK, choices_BTK = jax.lax.top_k(scores_BTC, self.cfg.top_k)
        is_real_BT1 = is_real_BT[..., None]
        return jnp.where(is_real_BT1, choices_BTK, scores_BTC.shape[2]), jnp.where(is_real_BT1, weights_BTK, 0.0)

    def _free(self, x_BTD, choices_BTK, weights_BTK, vectors_JD, mix_BTJZ):
        """Returns what the choices add that are no experts; they are counted from the first null one."""
        first_copy = self.cfg.num_null
        first_constant = first_copy + self.cfg.num_copy
        is_copy_BTK = (choices_BTK >= first_copy) & (choices_BTK < first_constant)
        of_token_BT = jnp.sum(jnp.where(is_copy_BTK, weights_BTK, 0.0), axis=-1)
        if vectors_JD is None:
            return of_token_BT[..., None] * x_BTD
        is_chosen_BTKJ = choices_BTK[..., None] - first_constant == jnp.arange(vectors_JD.shape[0])
        weights_BTJ = jnp.sum(jnp.where(is_chosen_BTKJ, weights_BTK[..., None], 0.0), axis=2)
        of_token_BT += jnp.sum(weights_BTJ * mix_BTJZ[..., 0], axis=-1)
        return of_token_BT[..., None] * x_BTD + jnp.einsum("BTJ,JD->BTD", weights_BTJ * mix_BTJZ[..., 1], vectors_JD)
