"""RWKV-6 "Finch": linear attention with decays per channel and token, and a bonus for the token itself.

https://arxiv.org/abs/2404.05892. The paper's receptance is the query here. What each of the five projections sees is a
mix of the token and the one before it, in proportions that depend on both.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, layer_normalize, token_before
from efficient_lm.mixers.base import Leaf, Mixer, MixerConfig
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV6Config(MixerConfig):
    num_heads: int
    """The paper takes d_model / 64."""
    key_dim: int = 64
    """Width of a head's keys: rows of its state."""
    value_dim: int = 64
    """Width of a head's values: columns of its state."""
    mix_rank: int = 32
    """Rank of the projections that mix each token with the one before."""
    decay_rank: int = 64
    """Rank of the projection that gives the decays."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "RWKV6":
        return RWKV6(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RWKV6State:
    S: Leaf  # BNHP
    x: Leaf  # BWD, W = 1
    """The last token's input."""


class RWKV6(Mixer):
    def __init__(self, cfg: RWKV6Config, d_model: int, *, rngs: nnx.Rngs):
        D, N, H, P, R = d_model, cfg.num_heads, cfg.key_dim, cfg.value_dim, cfg.mix_rank
        M = 5  # What is mixed: the inputs of queries, decays, keys, values and gates.
        self.cfg = cfg
        # Channels start from the token before alone to the token alone, decays from exp(-e^-6) to exp(-e^-1).
        self.mix = nnx.Param(jnp.linspace(1.0, 0.0, D))
        self.mix_down_proj = Einsum("BTD,DMR->BTMR", D=D, M=M, R=R, rngs=rngs)
        self.mix_up_proj = Einsum("BTMR,MRD->BTMD", M=M, R=R, D=D, rngs=rngs)
        self.mix_bias = nnx.Param(jnp.tile(jnp.linspace(1.0, 0.0, D), (M, 1)))
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.decay_down_proj = Einsum("BTD,DR->BTR", D=D, R=cfg.decay_rank, rngs=rngs)
        self.decay_up_proj = Einsum("BTR,RNH->BTNH", R=cfg.decay_rank, N=N, H=H, rngs=rngs)
        self.decay_bias = nnx.Param(shard(jnp.linspace(-6.0, -1.0, N * H).reshape(N, H), "NH"))
        self.bonus = nnx.Param(shard(jnp.zeros((N, H), jnp.float32), "NH"))
        self.gate_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.norm_scale = nnx.Param(shard(jnp.ones((N, P), jnp.float32), "NP"))
        self.norm_bias = nnx.Param(shard(jnp.zeros((N, P), jnp.float32), "NP"))
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)
        # What depends on the data starts small.
        for proj in (self.mix_up_proj, self.decay_up_proj):
            proj.kernel[...] *= 0.1

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> RWKV6State:
        del max_len  # The state does not grow.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim)
        return RWKV6State(
            S=shard(jnp.zeros(shape, jnp.float32), "BNHP"),
            x=shard(jnp.zeros((batch_size, 1, self.mix.shape[-1]), dtype), "BWD"),
        )

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: forget, write, read.
        return 5.0 * self.cfg.num_heads * self.cfg.key_dim * self.cfg.value_dim

    @jax.named_scope("rwkv6")
    def __call__(
        self, x: Float[Array, "B T D"], state: RWKV6State | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], RWKV6State | None]:
        before_BTD, last_BWD = token_before(x, state and state.x, segment_ids=segment_ids)
        change_BTD = before_BTD - x
        mixed_BTD = x + change_BTD * self.mix[...].astype(x.dtype)
        mix_BTMD = self.mix_up_proj(jnp.tanh(self.mix_down_proj(mixed_BTD))) + self.mix_bias[...].astype(x.dtype)
        mixed_BTMD = x[:, :, None] + change_BTD[:, :, None] * mix_BTMD
        for_q, for_decay, for_k, for_v, for_gate = (mixed_BTMD[:, :, i] for i in range(mixed_BTMD.shape[2]))

        decay_BTNH = self.decay_up_proj(jnp.tanh(self.decay_down_proj(for_decay))).astype(jnp.float32)
        # exp(-e^5) is 0 in float32: larger numbers would change nothing but overflow.
        g_BTNH = -jnp.exp(jnp.minimum(decay_BTNH + self.decay_bias[...], 5.0))

        def op(q, k, v, g, bonus, state, segment_ids):
            return context.linear_attention(q, k, v, g, bonus=bonus, state=state, segment_ids=segment_ids, scale=1.0)

        run = per_shard(op, "BTNH,BTNH,BTNP,BTNH,NH,BNHP,BT", "BTNP,BNHP", split_tokens=True)
        q_BTNH, k_BTNH, v_BTNP = self.q_proj(for_q), self.k_proj(for_k), self.v_proj(for_v)
        o_BTNP, S_BNHP = run(q_BTNH, k_BTNH, v_BTNP, g_BTNH, self.bonus[...], state and state.S, segment_ids)

        # The authors' epsilon: they divide what they normalize by 8, and add 1e-5.
        o_BTNP = layer_normalize(o_BTNP.astype(jnp.float32), eps=64e-5) * self.norm_scale[...] + self.norm_bias[...]
        o_BTNP = o_BTNP * jax.nn.silu(self.gate_proj(for_gate).astype(jnp.float32))
        return self.o_proj(o_BTNP.astype(x.dtype)), state and RWKV6State(S_BNHP, last_BWD)
