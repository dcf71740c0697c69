"""A mixture of experts: every token has its own few of many networks (https://arxiv.org/abs/2401.06066)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from efficient_lm.ffns.base import FFN, Aux, FFNConfig
from efficient_lm.ffns.experts import Experts
from efficient_lm.ffns.mlp import MLP, MLPConfig
from efficient_lm.ffns.routers import RouterConfig
from efficient_lm.layers import Einsum
from efficient_lm.sharding import shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(FFNConfig):
    router: RouterConfig
    """How tokens and experts come together."""
    num_experts: int
    """Beside the shared ones."""
    d_ff: int
    """Width of the hidden layer of one expert. Fine-grained experts are many narrow ones."""
    activation: Literal["swiglu", "gelu", "squared_relu"] = "swiglu"
    """As in MLPConfig."""
    shared: MLPConfig | None = None
    """A network for all tokens; n shared experts are one, n times as wide."""
    shared_gate: bool = False
    """The shared network counts as much as a sigmoid of the token says (Qwen2-MoE)."""

    room: float | None = None
    """Rows that a device of the expert axis takes from all of them, as a multiple of the rows that it sends; more are
    dropped and counted. None: as many as there are, so that nobody is dropped; memory is set aside for all of them."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MoE":
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate=True needs a network to gate: set shared")
        return MoE(self, d_model, rngs=rngs)


class MoE(FFN):
    def __init__(self, cfg: MoEConfig, d_model: int, *, rngs: nnx.Rngs):
        self.router = cfg.router.build(d_model, cfg.num_experts, rngs=rngs)
        self.experts = Experts(
            d_model=d_model,
            d_ff=cfg.d_ff,
            num_experts=cfg.num_experts,
            activation=cfg.activation,
            share=cfg.router.experts_per_token(cfg.num_experts) / cfg.num_experts,
            room=cfg.room,
            rngs=rngs,
        )
        self.shared = None if cfg.shared is None else MLP(cfg.shared, d_model, rngs=rngs)
        self.shared_gate = Einsum("BTD,D->BT", D=d_model, rngs=rngs) if cfg.shared_gate else None

    def flops_per_token(self, seq_len: int) -> float:
        return self.router.flops_per_token(seq_len)

    @jax.named_scope("moe")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        tokens: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        is_real_BT = shard(jnp.ones(x.shape[:2], bool), "BT") if segment_ids is None else segment_ids > 0
        y_BTD, aux = self.router(x, is_real_BT, self.experts, tokens)
        if self.shared is not None:
            shared_BTD, _ = self.shared(x)
            if self.shared_gate is not None:
                shared_BTD *= jax.nn.sigmoid(self.shared_gate(x))[..., None]
            y_BTD += shared_BTD
        return y_BTD, aux
