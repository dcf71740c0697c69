"""Expert choice: each expert takes the tokens of a row that it scores best (https://arxiv.org/abs/2202.09368).

The load is even by construction. But a token's experts depend on all tokens of its row, later ones and those of other
documents included: a language model that is trained so has seen the future, and when it writes token by token there is
nothing to choose from.
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
from efficient_lm.layers import Einsum
from efficient_lm.sharding import per_shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoiceConfig(RouterConfig):
    """It looks at the future: for models that read whole rows, such as those of masked diffusion."""

    experts_per_token_on_average: float
    """The number of tokens that an expert takes from each row is this many times the row's length / experts."""

    def build(self, d_model: int, num_experts: int, *, rngs: nnx.Rngs) -> "ExpertChoice":
        if not 0 < self.experts_per_token_on_average <= num_experts:
            raise ValueError(
                f"experts_per_token_on_average={self.experts_per_token_on_average} is not in (0, {num_experts}]"
            )
        return ExpertChoice(self, d_model, num_experts, rngs=rngs)

    def experts_per_token(self, num_experts: int) -> float:
        return self.experts_per_token_on_average


class ExpertChoice(Router):
    def __init__(self, cfg: ExpertChoiceConfig, d_model: int, num_experts: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.proj = Einsum("BTD,DE->BTE", D=d_model, E=num_experts, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        is_real: Bool[Array, "B T"],
        experts: Experts,
        tokens: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        scores_BTE = jax.nn.softmax(self.proj(x.astype(jnp.float32)))
        tokens_BEC, weights_BEC = per_shard(self._choose, "BTe,BT", "Bec,Bec")(scores_BTE, is_real)
        return experts.gathered(x, tokens_BEC, weights_BEC), {}

    def _choose(self, scores_BTE, is_real_BT):
        _, T, E = scores_BTE.shape
        num_slots = math.ceil(self.cfg.experts_per_token_on_average * T / E)
        scores_BET = jnp.swapaxes(jnp.where(is_real_BT[..., None], scores_BTE, 0.0), 1, 2)
        weights_BEC, tokens_BEC = jax.lax.top_k(scores_BET, num_slots)
        is_real_BEC = jnp.take_along_axis(is_real_BT[:, None], tokens_BEC, axis=2)
        return jnp.where(is_real_BEC, tokens_BEC, T), weights_BEC
