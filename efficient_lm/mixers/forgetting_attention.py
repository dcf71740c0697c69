"""The Forgetting Transformer's attention: gates lower the scores of the past (https://arxiv.org/abs/2503.02130)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, RMSNorm
from efficient_lm.mixers.base import Mixer, MixerConfig
from efficient_lm.mixers.cache import Cache, Places, attend, init_cache
from efficient_lm.rotary import document_positions
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgettingAttentionConfig(MixerConfig):
    num_heads: int
    num_kv_heads: int | None = None
    """Heads of keys and values; None: as many as there are query heads."""
    head_dim: int
    qk_norm: bool = False
    """Root-mean-square norm of each query and key."""
    output_gate: bool = False
    """Each output channel is multiplied by a sigmoid of the input."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "ForgettingAttention":
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key/value head serves the same number of query heads"
            )
        return ForgettingAttention(self, d_model, rngs=rngs)


class ForgettingAttention(Mixer):
    """Head n sees a token as if each one after it had kept a share sigmoid(forget) of it. There are no positions."""

    def __init__(self, cfg: ForgettingAttentionConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, K, H = d_model, cfg.num_heads, cfg.num_kv_heads or cfg.num_heads, cfg.head_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.forget_proj = Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.forget_bias = nnx.Param(shard(jnp.zeros((N,), jnp.float32), "N"))
        self.q_norm = RMSNorm(H) if cfg.qk_norm else None
        self.k_norm = RMSNorm(H) if cfg.qk_norm else None
        self.gate_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs) if cfg.output_gate else None
        self.o_proj = Einsum("BTNH,NHD->BTD", N=N, H=H, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> Cache:
        cfg = self.cfg
        arrays = ("BSKH", dtype), ("BSKH", dtype), ("BSN", jnp.float32)
        sizes = {"N": cfg.num_heads, "K": cfg.num_kv_heads or cfg.num_heads, "H": cfg.head_dim}
        return init_cache(*arrays, batch_size=batch_size, max_len=max_len, **sizes)

    def flops_per_token(self, seq_len: int) -> float:
        # Per pair of tokens also one subtraction of decays.
        return self.cfg.num_heads * (2.0 * self.cfg.head_dim + 0.5) * (seq_len + 1.0)

    @jax.named_scope("forgetting_attention")
    def __call__(
        self, x: Float[Array, "B T D"], state: Cache | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        q_BTNH, k_BTKH, v_BTKH = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        g_BTN = jax.nn.log_sigmoid(self.forget_proj(x).astype(jnp.float32) + self.forget_bias[...])
        ids_BT = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        positions_BT, length_B = document_positions(ids_BT, state and state.length)

        def op(q, k, v, g, *places):
            return context.attention(q, k, v, g, **Places(*places)._asdict())

        def read(arrays, places, is_cache):
            run = per_shard(op, f"BTNH,BSKH,BSKH,BSN,{Places.dims}", "BTNH,BNT", split_tokens=True)
            o_BTNH, lse_BNT = run(q_BTNH, *arrays, *places)
            if is_cache and x.shape[1] > 1:  # What these tokens have forgotten of the cache, which they are not in.
                forgotten_BTN = jnp.cumsum(jnp.where(ids_BT[..., None] > 0, g_BTN, 0), axis=1)
                lse_BNT = lse_BNT + jnp.moveaxis(forgotten_BTN, 1, 2)
            return o_BTNH, lse_BNT

        o_BTNH, state = attend(read, (k_BTKH, v_BTKH, g_BTN), state, ids_BT, positions_BT, length_B)
        if self.gate_proj is not None:
            o_BTNH = o_BTNH * jax.nn.sigmoid(self.gate_proj(x))
        return self.o_proj(o_BTNH), state
