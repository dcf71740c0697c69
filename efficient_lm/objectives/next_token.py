"""The next token: cross-entropy of each target given what came before it in its document."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels as kernels
from efficient_lm.data import Batch
from efficient_lm.model import LanguageModel
from efficient_lm.objectives.base import Objective, ObjectiveConfig, Sums
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextTokenConfig(ObjectiveConfig):
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of the logits, which keeps them from drifting."""

    def build(self) -> "NextToken":
        return NextToken(self)


class NextToken(Objective):
    def __init__(self, cfg: NextTokenConfig):
        self.cfg = cfg

    def __call__(self, model: LanguageModel, batch: Batch) -> tuple[Float[Array, ""], Sums]:
        x_BTD, _, aux = model.hidden(batch.tokens, segment_ids=batch.segment_ids)
        loss_BT, lse_BT = _head_loss(model, x_BTD, batch, self.cfg.z_loss)
        tokens = jnp.sum(batch.is_target).astype(jnp.float32)
        z_loss = self.cfg.z_loss * jnp.sum(jnp.where(batch.is_target, jnp.square(lse_BT), 0.0))
        # What feed-forward networks report per token, such as the balance of experts, counts once per token.
        reported = {name: value * tokens for name, value in aux.items()}
        loss = jnp.sum(loss_BT) + sum(value for name, value in reported.items() if name.endswith("_loss"))
        return loss, {"tokens": tokens, "nll": jnp.sum(loss_BT) - z_loss, "z_loss": z_loss, **reported}

    def token_nll(self, model: LanguageModel, batch: Batch) -> Float[Array, "B T"]:
        x_BTD, _, _ = model.hidden(batch.tokens, segment_ids=batch.segment_ids)
        return _head_loss(model, x_BTD, batch, z_loss=0.0)[0]


def _head_loss(
    model: LanguageModel, x_BTD: Float[Array, "B T D"], batch: Batch, z_loss: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    def op(x, w, targets, weights_BT):
        options = {"z_loss": z_loss, "soft_cap": model.cfg.logits_soft_cap}
        return kernels.linear_cross_entropy(x, w, targets, weights=weights_BT, **options)

    # Every device needs the whole head for its own tokens.
    run = per_shard(op, "BTD,,BT,BT", "BT,BT", split_tokens=True)
    return run(x_BTD, shard(model.head_DV(), ""), batch.targets, batch.is_target.astype(jnp.float32))
