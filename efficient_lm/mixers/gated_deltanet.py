"""Gated DeltaNet: a matrix memory that forgets and overwrites (https://arxiv.org/abs/2412.06464)."""

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
class GatedDeltaNetConfig(MixerConfig):
    num_heads: int
    """Heads of values, each with a state of its own."""
    num_key_heads: int | None = None
    """Heads of queries and keys; each serves num_heads / num_key_heads states. None: as many as there are states."""
    key_dim: int
    """Width of a head's keys: rows of its state."""
    value_dim: int
    """Width of a head's values: columns of its state."""
    conv_size: int = 4
    beta_max: float = 1.0
    """Largest writing strength; 2 permits negative eigenvalues (https://arxiv.org/abs/2411.12537)."""
    norm_eps: float = 1e-6
    """Added to the mean square of a head's output before the norm divides by its root."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "GatedDeltaNet":
        if self.num_heads % (self.num_key_heads or self.num_heads):
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_key_heads={self.num_key_heads}: "
                "every key head serves the same number of value heads"
            )
        return GatedDeltaNet(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedDeltaNetState:
    S: Leaf  # BNHP
    q_conv: Leaf  # BWKH
    k_conv: Leaf  # BWKH
    v_conv: Leaf  # BWNP


class GatedDeltaNet(HeadsMixer):
    def __init__(self, cfg: GatedDeltaNetConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, K, H, P = d_model, cfg.num_heads, cfg.num_key_heads or cfg.num_heads, cfg.key_dim, cfg.value_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.q_conv = ShortConv("BTKH", width=cfg.conv_size, K=K, H=H, rngs=rngs)
        self.k_conv = ShortConv("BTKH", width=cfg.conv_size, K=K, H=H, rngs=rngs)
        self.v_conv = ShortConv("BTNP", width=cfg.conv_size, N=N, P=P, rngs=rngs)
        self.beta_proj = Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.dt_proj = Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.A_log, self.dt_bias = decay_parameters(rngs.params(), "N", N=N)
        self.gate_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.norm = GatedRMSNorm(P, eps=cfg.norm_eps)
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> GatedDeltaNetState:
        del max_len  # The state does not grow.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim)
        convs = [conv.init_state(batch_size, dtype) for conv in (self.q_conv, self.k_conv, self.v_conv)]
        return GatedDeltaNetState(shard(jnp.zeros(shape, jnp.float32), "BNHP"), *convs)

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: forget, read for the key, write, read for the query.
        return 7.0 * self.cfg.num_heads * self.cfg.key_dim * self.cfg.value_dim

    @jax.named_scope("gated_deltanet")
    def heads(
        self,
        x: Float[Array, "B T D"],
        state: GatedDeltaNetState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T N P"], GatedDeltaNetState | None]:
        q_BTKH, q_conv = self.q_conv(self.q_proj(x), state and state.q_conv, segment_ids=segment_ids)
        k_BTKH, k_conv = self.k_conv(self.k_proj(x), state and state.k_conv, segment_ids=segment_ids)
        v_BTNP, v_conv = self.v_conv(self.v_proj(x), state and state.v_conv, segment_ids=segment_ids)

        beta_BTN = self.cfg.beta_max * jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32))
        dt_BTN = jax.nn.softplus(self.dt_proj(x).astype(jnp.float32) + self.dt_bias[...])
        g_BTN = -jnp.exp(self.A_log[...]) * dt_BTN

        def op(q, k, v, beta, g, state, segment_ids):
            return context.delta_rule(q, k, v, beta, g, state=state, segment_ids=segment_ids)

        run = per_shard(op, "BTKH,BTKH,BTNP,BTN,BTN,BNHP,BT", "BTNP,BNHP", split_tokens=True)
        q_BTKH, k_BTKH = unit_normalize(q_BTKH), unit_normalize(k_BTKH)
        o_BTNP, S_BNHP = run(q_BTKH, k_BTKH, v_BTNP, beta_BTN, g_BTN, state and state.S, segment_ids)

        return self.norm(o_BTNP, self.gate_proj(x)), state and GatedDeltaNetState(S_BNHP, q_conv, k_conv, v_conv)
