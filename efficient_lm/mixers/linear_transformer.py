"""The linear transformer: attention with weights phi(q) . phi(k) instead of a softmax (https://arxiv.org/abs/2006.16236).

phi is elu + 1. The weights of a token sum to one: the values carry a column of ones, so that the state's last column
sums the keys and the last channel read from it is the sum of the weights.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum
from efficient_lm.mixers.base import Leaf, Mixer, MixerConfig
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearTransformerConfig(MixerConfig):
    num_heads: int
    key_dim: int
    """Width of a head's keys: rows of its state. The paper takes d_model / num_heads."""
    value_dim: int
    """Width of a head's values: columns of its state, but for the one that sums the keys."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "LinearTransformer":
        return LinearTransformer(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearTransformerState:
    S: Leaf  # BNHP, P = value_dim + 1


class LinearTransformer(Mixer):
    def __init__(self, cfg: LinearTransformerConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, H, P = d_model, cfg.num_heads, cfg.key_dim, cfg.value_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> LinearTransformerState:
        del max_len, dtype  # The state does not grow, and keeps no activations.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim + 1)
        return LinearTransformerState(shard(jnp.zeros(shape, jnp.float32), "BNHP"))

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: write, read.
        return 4.0 * self.cfg.num_heads * self.cfg.key_dim * (self.cfg.value_dim + 1)

    @jax.named_scope("linear_transformer")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: LinearTransformerState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LinearTransformerState | None]:
        def op(q, k, v, state, segment_ids):
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
            o, state = context.linear_attention(q, k, v, state=state, segment_ids=segment_ids, scale=1.0)
            sums, total = o[..., :-1].astype(jnp.float32), o[..., -1:].astype(jnp.float32)
            # The small number is for queries that no key meets, padding's for one: their sums are 0, too.
            return (sums / (total + 1e-6)).astype(v.dtype), state

        run = per_shard(op, "BTNH,BTNH,BTNP,BNHP,BT", "BTNP,BNHP", split_tokens=True)
        q_BTNH, k_BTNH = _elu_plus_one(self.q_proj(x)), _elu_plus_one(self.k_proj(x))
        o_BTNP, S_BNHP = run(q_BTNH, k_BTNH, self.v_proj(x), state and state.S, segment_ids)
        return self.o_proj(o_BTNP), state and LinearTransformerState(S_BNHP)


def _elu_plus_one(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns elu(x) + 1, which is exp(x) below zero: adding the one would round small weights away."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))
