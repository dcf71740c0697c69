"""Kimi Delta Attention: the delta rule with a decay for every channel of the key (https://arxiv.org/abs/2510.26692)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, GatedRMSNorm, ShortConv, decay_parameters, unit_normalize
from efficient_lm.mixers.base import HeadsMixer, Leaf, MixerConfig
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class KimiDeltaAttentionConfig(MixerConfig):
    num_heads: int
    key_dim: int = 128
    """Width of a head's keys: rows of its state."""
    value_dim: int = 128
    """Width of a head's values: columns of its state."""
    decay_rank: int = 128
    """Rank of the projection that gives the decays. The paper takes the width of a head."""
    gate_rank: int = 128
    """Rank of the projection that gives the output gates. The paper takes the width of a head."""
    conv_size: int = 4
    beta_max: float = 1.0
    """Largest writing strength; 2 permits negative eigenvalues (https://arxiv.org/abs/2411.12537)."""
    norm_eps: float = 1e-5
    """Added to the mean square of a head's output before the norm divides by its root."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "KimiDeltaAttention":
        return KimiDeltaAttention(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KimiDeltaAttentionState:
    S: Leaf  # BNHP
    q_conv: Leaf  # BWNH
    k_conv: Leaf  # BWNH
    v_conv: Leaf  # BWNP


class KimiDeltaAttention(HeadsMixer):
    def __init__(self, cfg: KimiDeltaAttentionConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, H, P = d_model, cfg.num_heads, cfg.key_dim, cfg.value_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.q_conv = ShortConv("BTNH", width=cfg.conv_size, N=N, H=H, rngs=rngs)
        self.k_conv = ShortConv("BTNH", width=cfg.conv_size, N=N, H=H, rngs=rngs)
        self.v_conv = ShortConv("BTNP", width=cfg.conv_size, N=N, P=P, rngs=rngs)
        self.beta_proj = Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.decay_down_proj = Einsum("BTD,DR->BTR", D=D, R=cfg.decay_rank, rngs=rngs)
        self.decay_up_proj = Einsum("BTR,RNH->BTNH", R=cfg.decay_rank, N=N, H=H, rngs=rngs)
        # One rate for a head, one step size for each of its channels.
        self.A_log, _ = decay_parameters(rngs.params(), "N", N=N)
        _, self.dt_bias = decay_parameters(rngs.params(), "NH", N=N, H=H)
        self.gate_down_proj = Einsum("BTD,DR->BTR", D=D, R=cfg.gate_rank, rngs=rngs)
        self.gate_up_proj = Einsum("BTR,RNP->BTNP", R=cfg.gate_rank, N=N, P=P, rngs=rngs)
        self.norm = GatedRMSNorm(P, activation="sigmoid", eps=cfg.norm_eps)
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> KimiDeltaAttentionState:
        del max_len  # The state does not grow.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim)
        convs = [conv.init_state(batch_size, dtype) for conv in (self.q_conv, self.k_conv, self.v_conv)]
        return KimiDeltaAttentionState(shard(jnp.zeros(shape, jnp.float32), "BNHP"), *convs)

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: forget, read for the key, write, read for the query.
        return 7.0 * self.cfg.num_heads * self.cfg.key_dim * self.cfg.value_dim

    @jax.named_scope("kimi_delta_attention")
    def heads(
        self,
        x: Float[Array, "B T D"],
        state: KimiDeltaAttentionState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T N P"], KimiDeltaAttentionState | None]:
        q_BTNH, q_conv = self.q_conv(self.q_proj(x), state and state.q_conv, segment_ids=segment_ids)
        k_BTNH, k_conv = self.k_conv(self.k_proj(x), state and state.k_conv, segment_ids=segment_ids)
        v_BTNP, v_conv = self.v_conv(self.v_proj(x), state and state.v_conv, segment_ids=segment_ids)

        beta_BTN = self.cfg.beta_max * jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32))
        dt_BTNH = self.decay_up_proj(self.decay_down_proj(x)).astype(jnp.float32) + self.dt_bias[...]
        g_BTNH = -jnp.exp(self.A_log[...])[:, None] * jax.nn.softplus(dt_BTNH)

        def op(q, k, v, beta, g, state, segment_ids):
            return context.delta_rule(q, k, v, beta, g, state=state, segment_ids=segment_ids)

        run = per_shard(op, "BTNH,BTNH,BTNP,BTN,BTNH,BNHP,BT", "BTNP,BNHP", split_tokens=True)
        q_BTNH, k_BTNH = unit_normalize(q_BTNH), unit_normalize(k_BTNH)
        o_BTNP, S_BNHP = run(q_BTNH, k_BTNH, v_BTNP, beta_BTN, g_BTNH, state and state.S, segment_ids)

        o_BTNP = self.norm(o_BTNP, self.gate_up_proj(self.gate_down_proj(x)))
        return o_BTNP, state and KimiDeltaAttentionState(S_BNHP, q_conv, k_conv, v_conv)
