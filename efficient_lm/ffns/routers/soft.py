"""Soft MoE: experts work on mixtures of all tokens of a row (https://arxiv.org/abs/2308.00951).

Nothing is chosen, so everything is differentiable. Each token sees all others of its row, later ones and those of other
documents included.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from efficient_lm.ffns.base import Aux
from efficient_lm.ffns.experts import Experts
from efficient_lm.ffns.routers.base import Router, RouterConfig
from efficient_lm.layers import unit_normalize
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftConfig(RouterConfig):
    """It looks at the future: for models that read whole rows."""

    num_slots: int
    """Mixtures of tokens, for each expert and row."""
    seq_len: int
    """Tokens of a row, to count FLOPs by."""

    def build(self, d_model: int, num_experts: int, *, rngs: nnx.Rngs) -> "Soft":
        return Soft(self, d_model, num_experts, rngs=rngs)

    def experts_per_token(self, num_experts: int) -> float:
        return self.num_slots * num_experts / self.seq_len


class Soft(Router):
    def __init__(self, cfg: SoftConfig, d_model: int, num_experts: int, *, rngs: nnx.Rngs):
        D, E, C = d_model, num_experts, cfg.num_slots
        kernel_DEC = jax.random.normal(rngs.params(), (D, E, C), jnp.float32) * D**-0.5
        self.kernel = nnx.Param(shard(kernel_DEC, "Dec"), dims="DEC", contracted="D")
        self.scale = nnx.Param(shard(jnp.ones((), jnp.float32), ""))

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # To mix the token into every slot, and every slot into the token.
        return 4.0 * math.prod(self.kernel.shape)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        is_real: Bool[Array, "B T"],
        experts: Experts,
        tokens: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        kernel_DEC = (
            self.scale[...] * self.kernel[...] * jax.lax.rsqrt(jnp.sum(jnp.square(self.kernel[...]), axis=0) + 1e-6)
        )
        logits = lambda x, kernel: jnp.einsum("BTD,DEC->BTEC", unit_normalize(x.astype(jnp.float32)), kernel)
        logits_BTEC = per_shard(logits, "BTD,dec", "BTec")(x, shard(kernel_DEC, "dec"))
        mixed_BECD = per_shard(self._mix, "BTD,BTec,BT", "BecD")(x, logits_BTEC, is_real)
        y_BECD = experts.slots(mixed_BECD)
        return per_shard(self._unmix, "BecD,BTec", "BTD")(y_BECD, logits_BTEC), {}

    def _mix(self, x_BTD, logits_BTEC, is_real_BT):
        # Rows of padding alone mix evenly, whatever that means: nobody reads them.
        logits_BTEC = jnp.where(is_real_BT[:, :, None, None], logits_BTEC, -1e30)
        return jnp.einsum("BTEC,BTD->BECD", jax.nn.softmax(logits_BTEC, axis=1).astype(x_BTD.dtype), x_BTD)

    def _unmix(self, y_BECD, logits_BTEC):
        weights_BTEC = jax.nn.softmax(logits_BTEC, axis=(2, 3)).astype(y_BECD.dtype)
        return jnp.einsum("BTEC,BECD->BTD", weights_BTEC, y_BECD)
