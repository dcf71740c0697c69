"""Token choice of a number that depends on the token: as few experts as have the probability p together.

The paper is https://arxiv.org/abs/2403.07652.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from efficient_lm.ffns.base import Aux
from efficient_lm.ffns.experts import Experts
from efficient_lm.ffns.routers.base import Router, RouterConfig, balance, load_report, loads, mean_over_tokens
from efficient_lm.layers import Einsum
from efficient_lm.sharding import per_shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopPConfig(RouterConfig):
    """Their weights are their probabilities, which sum to p or more."""

    top_p: float
    max_experts: int
    """For one token. All of them are made room for, however few are chosen."""
    expected_experts: float
    """For one token, on average; to count FLOPs by."""
    entropy_loss: float = 0.0
    """Weight of the entropy of the probabilities: without it, all experts become equally likely, and are all chosen."""
    balance_loss: float = 0.0
    """As in TopKConfig."""

    def build(self, d_model: int, num_experts: int, *, rngs: nnx.Rngs) -> "TopP":
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if not 1 <= self.max_experts <= num_experts:
            raise ValueError(f"max_experts={self.max_experts} is not in 1..{num_experts}, the number of experts")
        return TopP(self, d_model, num_experts, rngs=rngs)

    def experts_per_token(self, num_experts: int) -> float:
        return self.expected_experts


class TopP(Router):
    def __init__(self, cfg: TopPConfig, d_model: int, num_experts: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.proj = Einsum("BTD,DE->BTE", D=d_model, E=num_experts, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        is_real: Bool[Array, "B T"],
        experts: Experts,
        tokens: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        cfg, E = self.cfg, experts.num_experts
        logits_BTE = self.proj(x.astype(jnp.float32))
        probabilities_BTE = jax.nn.softmax(logits_BTE)
        experts_BTK, weights_BTK = per_shard(self._choose, "BTe,BT", "BTk,BTk")(probabilities_BTE, is_real)
        load_E = loads(experts_BTK, E)
        aux = load_report(load_E) | {"experts_per_token": jnp.sum(load_E) / jnp.maximum(jnp.sum(is_real), 1)}
        if cfg.entropy_loss > 0:
            entropy_BT = -jnp.sum(probabilities_BTE * jax.nn.log_softmax(logits_BTE), axis=-1)
            aux["entropy_loss"] = cfg.entropy_loss * mean_over_tokens(entropy_BT, is_real)
        if cfg.balance_loss > 0:
            aux["balance_loss"] = cfg.balance_loss * balance(probabilities_BTE, load_E, is_real)
        y_BTD, sent = experts.chosen(x, experts_BTK, weights_BTK)
        return y_BTD, aux | sent

    def _choose(self, probabilities_BTE, is_real_BT):
        weights_BTK, experts_BTK = jax.lax.top_k(probabilities_BTE, self.cfg.max_experts)
        # An expert is taken if those likelier than it fall short of p; the likeliest always is.
        likelier_BTK = jnp.cumsum(weights_BTK, axis=-1) - weights_BTK
        is_taken_BTK = is_real_BT[..., None] & (likelier_BTK < self.cfg.top_p)
        return jnp.where(is_taken_BTK, experts_BTK, probabilities_BTE.shape[2]), jnp.where(is_taken_BTK, weights_BTK, 0)
