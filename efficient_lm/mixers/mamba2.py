"""Mamba-2: a state-space model as linear attention with a scalar decay (https://arxiv.org/abs/2405.21060).

The paper's C, B and x are the queries, keys and values here: a state of `key_dim` rows per head, keys and queries
shared by the heads of a group.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, ShortConv, decay_parameters, rms_normalize
from efficient_lm.mixers.base import HeadsMixer, Leaf, MixerConfig
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    num_heads: int
    """The paper takes 2 * d_model / value_dim."""
    num_groups: int = 1
    """Heads of queries (C) and keys (B)."""
    key_dim: int = 128
    """Size of the state, N in the paper."""
    value_dim: int = 64
    """Width of a head, P in the paper."""
    conv_size: int = 4
    norm: bool = True
    """Of the heads of each group, after the gate. Falcon-H1 has none."""
    norm_eps: float = 1e-6
    """Added to the mean square before the norm divides by its root."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Mamba2":
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_groups={self.num_groups}")
        return Mamba2(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mamba2State:
    S: Leaf  # BNHP
    q_conv: Leaf  # BWKH
    k_conv: Leaf  # BWKH
    v_conv: Leaf  # BWNP


class Mamba2(HeadsMixer):
    def __init__(self, cfg: Mamba2Config, d_model: int, *, rngs: nnx.Rngs):
        D, N, K, H, P = d_model, cfg.num_heads, cfg.num_groups, cfg.key_dim, cfg.value_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.q_conv = ShortConv("BTKH", width=cfg.conv_size, bias=True, K=K, H=H, rngs=rngs)
        self.k_conv = ShortConv("BTKH", width=cfg.conv_size, bias=True, K=K, H=H, rngs=rngs)
        self.v_conv = ShortConv("BTNP", width=cfg.conv_size, bias=True, N=N, P=P, rngs=rngs)
        self.dt_proj = Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.A_log, self.dt_bias = decay_parameters(rngs.params(), "N", N=N)
        self.skip = nnx.Param(shard(jnp.ones((N,), jnp.float32), "N"))
        self.gate_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.norm_scale = nnx.Param(shard(jnp.ones((N, P), jnp.float32), "NP")) if cfg.norm else None
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> Mamba2State:
        del max_len  # The state does not grow.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim)
        convs = [conv.init_state(batch_size, dtype) for conv in (self.q_conv, self.k_conv, self.v_conv)]
        return Mamba2State(shard(jnp.zeros(shape, jnp.float32), "BNHP"), *convs)

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: forget, write, read.
        return 5.0 * self.cfg.num_heads * self.cfg.key_dim * self.cfg.value_dim

    @jax.named_scope("mamba2")
    def heads(
        self,
        x: Float[Array, "B T D"],
        state: Mamba2State | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T N P"], Mamba2State | None]:
        q_BTKH, q_conv = self.q_conv(self.q_proj(x), state and state.q_conv, segment_ids=segment_ids)
        k_BTKH, k_conv = self.k_conv(self.k_proj(x), state and state.k_conv, segment_ids=segment_ids)
        v_BTNP, v_conv = self.v_conv(self.v_proj(x), state and state.v_conv, segment_ids=segment_ids)

        dt_BTN = jax.nn.softplus(self.dt_proj(x).astype(jnp.float32) + self.dt_bias[...])
        g_BTN = -jnp.exp(self.A_log[...]) * dt_BTN
        write_BTNP = (v_BTNP * dt_BTN[..., None]).astype(x.dtype)

        def op(q, k, v, g, state, segment_ids):
            return context.linear_attention(q, k, v, g, state=state, segment_ids=segment_ids, scale=1.0)

        run = per_shard(op, "BTKH,BTKH,BTNP,BTN,BNHP,BT", "BTNP,BNHP", split_tokens=True)
        o_BTNP, S_BNHP = run(q_BTKH, k_BTKH, write_BTNP, g_BTN, state and state.S, segment_ids)

        o_BTNP = o_BTNP.astype(jnp.float32) + self.skip[...][:, None] * v_BTNP
        o_BTNP = o_BTNP * jax.nn.silu(self.gate_proj(x).astype(jnp.float32))
        if self.norm_scale is not None:
            # The norm runs over all heads of a group at once, after the gate.
            (B, T, N, P), K = o_BTNP.shape, self.cfg.num_groups
            o_BTKGP = rms_normalize(o_BTNP.reshape(B, T, K, N // K, P), axes=(-2, -1), eps=self.cfg.norm_eps)
            o_BTNP = o_BTKGP.reshape(o_BTNP.shape) * self.norm_scale[...]
        return o_BTNP.astype(x.dtype), state and Mamba2State(S_BNHP, q_conv, k_conv, v_conv)
