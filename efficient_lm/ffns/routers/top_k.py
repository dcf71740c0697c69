"""Token choice: each token takes the k experts with the best scores (https://arxiv.org/abs/1701.06538)."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from efficient_lm.buffers import Buffer, measure
from efficient_lm.ffns.base import Aux
from efficient_lm.ffns.experts import Experts
from efficient_lm.ffns.routers.base import Router, RouterConfig, balance, load_report, loads, z_value
from efficient_lm.ffns.routers.capacity import fill_slots
from efficient_lm.layers import Einsum
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupLimitConfig:
    """A token chooses groups of experts first, then experts in them (DeepSeek-V2 and V3)."""

    num_groups: int
    top_k: int
    """Groups that a token may use."""
    num_best: int
    """A group counts as much as this many of its best experts together: 1 in V2, 2 in V3."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKConfig(RouterConfig):
    """Mixtral, OLMoE, Qwen-MoE, DeepSeek-MoE: how scores are made, and what keeps the load even."""

    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    """The weights of the chosen experts sum to one."""
    scale: float = 1.0
    """Of the weights, after that."""
    groups: GroupLimitConfig | None = None
    bias_rate: float | None = None
    """Balance without a loss (https://arxiv.org/abs/2408.15664): a bias, which counts for the choice only, goes up by
    this much at every step for experts with less than the mean load, and down for the others. None: no bias."""
    balance_loss: float = 0.0
    """Weight of the loss that is least when the load, over the whole batch of all devices, is even."""
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of the logits."""
    capacity_factor: float | None = None
    """Tokens of a row that an expert takes at most, as a multiple of the even share; the first ones get in, the others
    go without, so that what a token gets depends on those before it. None: nobody is dropped."""

    def build(self, d_model: int, num_experts: int, *, rngs: nnx.Rngs) -> "TopK":
        if not 1 <= self.top_k <= num_experts:
            raise ValueError(f"top_k={self.top_k} is not in 1..{num_experts}, the number of experts")
        if self.groups is not None:
            size, rest = divmod(num_experts, self.groups.num_groups)
            if rest or not self.groups.num_best <= size or self.groups.top_k * size < self.top_k:
                raise ValueError(
                    f"{self.groups} does not fit {num_experts} experts: groups must be of one size, of at least "
                    f"num_best, and the chosen ones must hold top_k={self.top_k} experts"
                )
        return TopK(self, d_model, num_experts, rngs=rngs)

    def experts_per_token(self, num_experts: int) -> float:
        return float(self.top_k)


class LoadBias(Buffer):
    def following(self, measured: Float[Array, "... E"]) -> Float[Array, "... E"]:
        missing_E = jnp.mean(measured, axis=-1, keepdims=True) - measured
        return self[...] + self.get_metadata("rate") * jnp.sign(missing_E)


class TopK(Router):
    def __init__(self, cfg: TopKConfig, d_model: int, num_experts: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.proj = Einsum("BTD,DE->BTE", D=d_model, E=num_experts, rngs=rngs)
        bias_E = shard(jnp.zeros((num_experts,), jnp.float32), "e")
        self.bias = None if cfg.bias_rate is None else LoadBias(bias_E, rate=cfg.bias_rate)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        is_real: Bool[Array, "B T"],
        experts: Experts,
        tokens: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        cfg, E = self.cfg, experts.num_experts
        logits_BTE = self.proj(x.astype(jnp.float32))
        squash = jax.nn.sigmoid if cfg.scores == "sigmoid" else jax.nn.softmax
        scores_BTE = squash(logits_BTE)
        ranking_BTE = jax.lax.stop_gradient(scores_BTE if self.bias is None else scores_BTE + self.bias[...])
        choose = per_shard(self._choose, "BTe,BTe,BT", "BTk,BTk")
        experts_BTK, weights_BTK = choose(scores_BTE, ranking_BTE, is_real)
        load_E = loads(experts_BTK, E)
        if self.bias is not None:
            weights_BTK = measure(self.bias, load_E, weights_BTK)

        if cfg.capacity_factor is None:
            y_BTD, aux = experts.chosen(x, experts_BTK, weights_BTK)
        else:
            capacity = math.ceil(cfg.capacity_factor * x.shape[1] * cfg.top_k / E)
            tokens_BEC, weights_BEC = fill_slots(experts_BTK, weights_BTK, E, capacity)
            y_BTD = experts.gathered(x, tokens_BEC, weights_BEC)
            aux = {"dropped": 1.0 - jnp.sum(tokens_BEC < x.shape[1]) / jnp.maximum(jnp.sum(load_E), 1.0)}

        aux |= load_report(load_E)
        if cfg.balance_loss > 0:
            shares_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
            aux["balance_loss"] = cfg.balance_loss * balance(shares_BTE, load_E, is_real)
        if cfg.z_loss > 0:
            aux["router_z_loss"] = cfg.z_loss * z_value(logits_BTE, is_real)
        return y_BTD, aux

    def _choose(self, scores_BTE, ranking_BTE, is_real_BT):
        cfg, (B, T, E) = self.cfg, scores_BTE.shape
        if cfg.groups is not None:
            grouped = ranking_BTE.reshape(B, T, cfg.groups.num_groups, E // cfg.groups.num_groups)
            values_BTG = jnp.sum(jax.lax.top_k(grouped, cfg.groups.num_best)[0], axis=-1)
            _, chosen_BTK = jax.lax.top_k(values_BTG, cfg.groups.top_k)
            is_open_BTG = jnp.any(chosen_BTK[..., None] == jnp.arange(cfg.groups.num_groups), axis=2)
            ranking_BTE = jnp.where(is_open_BTG[..., None], grouped, -jnp.inf).reshape(B, T, E)
        _, experts_BTK = jax.lax.top_k(ranking_BTE, cfg.top_k)
        weights_BTK = jnp.take_along_axis(scores_BTE, experts_BTK, axis=-1)
        if cfg.renormalize:  # Sigmoids may all be zero.
            weights_BTK /= jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20
        is_real_BT1 = is_real_BT[..., None]
        return jnp.where(is_real_BT1, experts_BTK, E), jnp.where(is_real_BT1, cfg.scale * weights_BTK, 0.0)
