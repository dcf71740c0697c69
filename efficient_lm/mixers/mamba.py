"""Mamba: a state-space model whose steps, writes and reads depend on the token (https://arxiv.org/abs/2312.00752)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, RMSNorm, ShortConv, decay_parameters
from efficient_lm.mixers.base import HeadsMixer, Leaf, MixerConfig
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    d_inner: int
    """Channels of the scan. The paper takes 2 * d_model."""
    dt_rank: int
    """Rank of the projection that gives the sizes of the steps. The paper takes d_model / 16."""
    state_size: int = 16
    """Rows of the state per channel."""
    conv_size: int = 4
    inner_norms: bool = False
    """Norms of what dt, B and C are made of, as in Jamba (https://arxiv.org/abs/2403.19887)."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Mamba":
        return Mamba(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaState:
    h: Leaf  # BFH
    conv: Leaf  # BWF


class Mamba(HeadsMixer):
    def __init__(self, cfg: MambaConfig, d_model: int, *, rngs: nnx.Rngs):
        D, F, R, H = d_model, cfg.d_inner, cfg.dt_rank, cfg.state_size
        self.cfg = cfg
        self.in_proj = Einsum("BTD,DF->BTF", D=D, F=F, rngs=rngs)
        self.gate_proj = Einsum("BTD,DF->BTF", D=D, F=F, rngs=rngs)
        self.conv = ShortConv("BTF", width=cfg.conv_size, bias=True, F=F, rngs=rngs)
        self.x_proj = Einsum("BTF,FR->BTR", F=F, R=R + 2 * H, rngs=rngs)
        self.dt_proj = Einsum("BTR,RF->BTF", R=R, F=F, rngs=rngs)
        _, self.dt_bias = decay_parameters(rngs.params(), "F", F=F)
        rates_FH = jnp.broadcast_to(jnp.arange(1, H + 1, dtype=jnp.float32), (F, H))
        self.A_log = nnx.Param(shard(jnp.log(rates_FH), "FH"))
        self.skip = nnx.Param(shard(jnp.ones((F,), jnp.float32), "F"))
        self.dt_norm = RMSNorm(R) if cfg.inner_norms else None
        self.B_norm = RMSNorm(H) if cfg.inner_norms else None
        self.C_norm = RMSNorm(H) if cfg.inner_norms else None
        self.o_proj = Einsum("BTF,FD->BTD", F=F, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> MambaState:
        del max_len  # The state does not grow.
        h_BFH = jnp.zeros((batch_size, self.cfg.d_inner, self.cfg.state_size), jnp.float32)
        return MambaState(shard(h_BFH, "BFH"), self.conv.init_state(batch_size, dtype))

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: its decay (2), forget, write (2), read (2).
        return 7.0 * self.cfg.d_inner * self.cfg.state_size

    @jax.named_scope("mamba")
    def heads(
        self, x: Float[Array, "B T D"], state: MambaState | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T F"], MambaState | None]:
        x_BTF, conv = self.conv(self.in_proj(x), state and state.conv, segment_ids=segment_ids)
        R, H = self.cfg.dt_rank, self.cfg.state_size
        r_BTR, B_BTH, C_BTH = jnp.split(self.x_proj(x_BTF), (R, R + H), axis=-1)
        if self.dt_norm and self.B_norm and self.C_norm:
            r_BTR, B_BTH, C_BTH = self.dt_norm(r_BTR), self.B_norm(B_BTH), self.C_norm(C_BTH)
        dt_BTF = jax.nn.softplus(self.dt_proj(r_BTR).astype(jnp.float32) + self.dt_bias[...])

        def op(x, dt, A, B, C, D, state, segment_ids):
            return context.selective_scan(x, dt, A, B, C, D=D, state=state, segment_ids=segment_ids)

        run = per_shard(op, "BTF,BTF,FH,BTH,BTH,F,BFH,BT", "BTF,BFH", split_tokens=True)
        A_FH = -jnp.exp(self.A_log[...])
        y_BTF, h_BFH = run(x_BTF, dt_BTF, A_FH, B_BTH, C_BTH, self.skip[...], state and state.h, segment_ids)
        y_BTF = y_BTF.astype(jnp.float32) * jax.nn.silu(self.gate_proj(x).astype(jnp.float32))
        return y_BTF.astype(x.dtype), state and MambaState(h_BFH, conv)
