"""Mixture of depths: a block that works on some of the tokens and lets the others pass (https://arxiv.org/abs/2404.02258).

In the paper a block takes the tokens of a row that it scores best. That looks ahead: whether a token gets in depends on
later ones, and a model that writes has none. The paper's remedy for sampling, a classifier that learns to foretell the
choice, is the choice itself here, in training too: a token is taken if its own score is positive, and a loss teaches
the scores to be positive for those that are the best of their row. Only this loss sees the row as a whole.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from efficient_lm.ffns.base import Aux
from efficient_lm.layers import Einsum
from efficient_lm.mixers.base import Shared, SharingMixer, State
from efficient_lm.model import Block, BlockConfig
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOfDepthsConfig(BlockConfig):
    """To the block, a document is the tokens of it that are taken: rotations and windows count them alone."""

    share: float = 0.125
    """Part of the tokens that the loss aims at."""
    capacity_factor: float = 1.25
    """Room for tokens of a row, as a multiple of that; the first ones get in. Without room for all that are taken, a
    row in parts, each with its own room, gives something else than the row at once."""
    loss: float = 0.01
    """Weight of the loss."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MixtureOfDepths":
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} is not in (0, 1]")
        return MixtureOfDepths(self, d_model, rngs=rngs)


class MixtureOfDepths(Block):
    """x + sigmoid(score) (block(x) - x) for tokens with a positive score, x for the others."""

    def __init__(self, cfg: MixtureOfDepthsConfig, d_model: int, *, rngs: nnx.Rngs):
        super().__init__(cfg, d_model, rngs=rngs)
        if isinstance(self.mixer, SharingMixer):
            raise ValueError(f"{type(cfg.mixer).__name__} needs what earlier layers leave of all tokens")
        self.depths, self.share = cfg, cfg.share
        self.score_proj = Einsum("BTD,D->BT", D=d_model, rngs=rngs)
        self.score_bias = nnx.Param(shard(jnp.zeros((), jnp.float32), ""))

    def __call__(
        self, x: Float[Array, "B T D"], state: State, shared: Shared, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State, Shared, Aux]:
        ids_BT = shard(jnp.ones(x.shape[:2], jnp.int32), "BT") if segment_ids is None else segment_ids
        scores_BT = self.score_proj(x.astype(jnp.float32)) + self.score_bias[...]
        # Rows of C tokens: those that are taken, in order, and padding.
        take = per_shard(self._take, "BTD,BT,BT", "BCD,BC,BC")
        x_BCD, ids_BC, at_BC = take(x, ids_BT, scores_BT)
        pick = per_shard(lambda tokens_BT, at_BC: jnp.take_along_axis(tokens_BT, at_BC, axis=1), "BT,BC", "BC")
        taken = {name: pick(value, at_BC) if name == "tokens" else value for name, value in shared.items()}
        y_BCD, state, _, aux = super().__call__(x_BCD, state, taken, segment_ids=ids_BC)
        y_BTD = per_shard(_put, "BTD,BT,BCD,BC,BC", "BTD")(x, jax.nn.sigmoid(scores_BT), y_BCD - x_BCD, ids_BC, at_BC)

        is_real_BT = ids_BT > 0
        num_real = jnp.maximum(jnp.sum(is_real_BT), 1)
        aux = aux | {"share_taken": jnp.sum((scores_BT > 0) & is_real_BT) / num_real}
        is_best_BT = per_shard(self._best, "BT,BT", "BT")(jax.lax.stop_gradient(scores_BT), is_real_BT)
        wrong_BT = jax.nn.softplus(jnp.where(is_best_BT, -scores_BT, scores_BT))
        aux["depth_loss"] = self.depths.loss * jnp.sum(jnp.where(is_real_BT, wrong_BT, 0.0)) / num_real
        return y_BTD, state, shared, aux

    def _take(self, x_BTD, ids_BT, scores_BT):
        T = x_BTD.shape[1]
        room = min(math.ceil(self.depths.share * self.depths.capacity_factor * T), T)
        ids_BT = jnp.where(scores_BT > 0, ids_BT, 0)
        at_BC = jnp.argsort(ids_BT == 0, axis=1, stable=True)[:, :room]
        take = lambda a: jnp.take_along_axis(a, at_BC, axis=1)
        return jnp.take_along_axis(x_BTD, at_BC[..., None], axis=1), take(ids_BT), at_BC

    def _best(self, scores_BT: Float[Array, "B T"], is_real_BT: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
        rank_BT = jnp.argsort(jnp.argsort(jnp.where(is_real_BT, -scores_BT, jnp.inf), axis=1), axis=1)
        return is_real_BT & (rank_BT < self.depths.share * jnp.sum(is_real_BT, axis=1, keepdims=True))


def _put(x_BTD, weights_BT, change_BCD, ids_BC, at_BC):
    weights_BC = jnp.where(ids_BC > 0, jnp.take_along_axis(weights_BT, at_BC, axis=1), 0.0)
    change_BCD = jnp.where(ids_BC[..., None] > 0, weights_BC[..., None] * change_BCD, 0.0).astype(x_BTD.dtype)
    rows_B1 = jnp.arange(x_BTD.shape[0])[:, None]
    return x_BTD.at[rows_B1, at_BC].add(change_BCD, unique_indices=True)
