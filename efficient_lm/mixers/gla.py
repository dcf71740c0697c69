"""Gated linear attention: a decay of its own for every channel of the key (https://arxiv.org/abs/2312.06635)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, GatedRMSNorm
from efficient_lm.mixers.base import HeadsMixer, Leaf, MixerConfig
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLAConfig(MixerConfig):
    num_heads: int
    key_dim: int
    """Width of a head's keys: rows of its state. The paper takes d_model / (2 * num_heads)."""
    value_dim: int
    """Width of a head's values: columns of its state. The paper takes d_model / num_heads."""
    decay_rank: int = 16
    """Rank of the projection that gives the decays."""
    decay_temperature: float = 16.0
    """Log-decays are log_sigmoid(.) divided by this, so that the memory starts long."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "GLA":
        return GLA(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GLAState:
    S: Leaf  # BNHP


class GLA(HeadsMixer):
    def __init__(self, cfg: GLAConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, H, P, R = d_model, cfg.num_heads, cfg.key_dim, cfg.value_dim, cfg.decay_rank
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.decay_down_proj = Einsum("BTD,DR->BTR", D=D, R=R, rngs=rngs)
        self.decay_up_proj = Einsum("BTR,RNH->BTNH", R=R, N=N, H=H, rngs=rngs)
        self.decay_bias = nnx.Param(shard(jnp.zeros((N, H), jnp.float32), "NH"))
        self.gate_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.norm = GatedRMSNorm(P)
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> GLAState:
        del max_len, dtype  # The state does not grow, and keeps no activations.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim)
        return GLAState(shard(jnp.zeros(shape, jnp.float32), "BNHP"))

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: forget, write, read.
        return 5.0 * self.cfg.num_heads * self.cfg.key_dim * self.cfg.value_dim

    @jax.named_scope("gla")
    def heads(
        self, x: Float[Array, "B T D"], state: GLAState | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T N P"], GLAState | None]:
        decay_BTNH = self.decay_up_proj(self.decay_down_proj(x)).astype(jnp.float32) + self.decay_bias[...]
        g_BTNH = jax.nn.log_sigmoid(decay_BTNH) / self.cfg.decay_temperature

        def op(q, k, v, g, state, segment_ids):
            return context.linear_attention(q, k, v, g, state=state, segment_ids=segment_ids)

        run = per_shard(op, "BTNH,BTNH,BTNP,BTNH,BNHP,BT", "BTNP,BNHP", split_tokens=True)
        o_BTNP, S_BNHP = run(self.q_proj(x), self.k_proj(x), self.v_proj(x), g_BTNH, state and state.S, segment_ids)
        return self.norm(o_BTNP, self.gate_proj(x)), state and GLAState(S_BNHP)
