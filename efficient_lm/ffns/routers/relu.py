"""ReMoE: an expert works on a token if its score is positive; no choice, so everything is differentiable.

The paper is https://arxiv.org/abs/2412.14711.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from efficient_lm.buffers import Buffer, measure
from efficient_lm.ffns.base import Aux
from efficient_lm.ffns.experts import Experts
from efficient_lm.ffns.routers.base import Router, RouterConfig, load_report, loads, mean_over_tokens
from efficient_lm.layers import Einsum
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReLUConfig(RouterConfig):
    """A loss on the scores, of experts with much load more than of others, keeps most of them at zero.

    Its weight goes up by `step` at every step in which tokens use more experts than they are meant to, and down
    otherwise.
    """

    expected_experts: float
    """For one token, on average: what the loss aims at."""
    max_experts: int
    """For one token; those with the largest scores. All of them are made room for, however few are chosen."""
    loss: float = 1e-8
    """Weight of the loss at the first step."""
    step: float = 1.2

    def build(self, d_model: int, num_experts: int, *, rngs: nnx.Rngs) -> "ReLU":
        if not 0 < self.expected_experts <= self.max_experts <= num_experts:
            raise ValueError(
                f"expected_experts={self.expected_experts} <= max_experts={self.max_experts} <= {num_experts}, the "
                "number of experts, does not hold"
            )
        return ReLU(self, d_model, num_experts, rngs=rngs)

    def experts_per_token(self, num_experts: int) -> float:
        return self.expected_experts


class LossWeight(Buffer):
    def following(self, measured: Float[Array, "..."]) -> Float[Array, "..."]:
        is_too_many = jnp.sign(measured - self.get_metadata("expected"))
        return self[...] * self.get_metadata("step") ** is_too_many


class ReLU(Router):
    def __init__(self, cfg: ReLUConfig, d_model: int, num_experts: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.proj = Einsum("BTD,DE->BTE", D=d_model, E=num_experts, rngs=rngs)
        weight = jnp.full((), cfg.loss, jnp.float32)
        self.loss_weight = LossWeight(shard(weight, ""), expected=cfg.expected_experts, step=cfg.step)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        is_real: Bool[Array, "B T"],
        experts: Experts,
        tokens: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        scores_BTE = jax.nn.relu(self.proj(x.astype(jnp.float32)))
        experts_BTK, weights_BTK = per_shard(self._choose, "BTe,BT", "BTk,BTk")(scores_BTE, is_real)
        load_E = loads(experts_BTK, experts.num_experts)
        per_token = jnp.sum(load_E) / jnp.maximum(jnp.sum(is_real), 1)
        weights_BTK = measure(self.loss_weight, jnp.sum(load_E), weights_BTK)
        # Even loads give every score the same price.
        prices_E = load_E * (load_E.size / jnp.maximum(jnp.sum(load_E), 1.0))
        loss = jnp.mean(prices_E * mean_over_tokens(scores_BTE, is_real))
        aux = {"sparsity_loss": jax.lax.stop_gradient(self.loss_weight[...]) * loss, "experts_per_token": per_token}
        y_BTD, sent = experts.chosen(x, experts_BTK, weights_BTK)
        return y_BTD, load_report(load_E) | aux | sent

    def _choose(self, scores_BTE, is_real_BT):
        weights_BTK, experts_BTK = jax.lax.top_k(scores_BTE, self.cfg.max_experts)
        is_taken_BTK = is_real_BT[..., None] & (weights_BTK > 0)
        return jnp.where(is_taken_BTK, experts_BTK, scores_BTE.shape[2]), jnp.where(is_taken_BTK, weights_BTK, 0)
