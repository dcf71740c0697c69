"""Softmax attention with grouped keys and values (https://arxiv.org/abs/2305.13245)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, RMSNorm
from efficient_lm.mixers.base import HeadsMixer, MixerConfig
from efficient_lm.mixers.cache import Cache, Places, attend, init_cache
from efficient_lm.rotary import RotaryConfig, document_positions, rotate
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    num_heads: int
    num_kv_heads: int | None = None
    """Heads of keys and values; None: as many as there are query heads."""
    head_dim: int
    value_dim: int | None = None
    """Width of a head's values; None: head_dim."""
    rotary: RotaryConfig | None = RotaryConfig()
    """None: no positions at all (NoPE)."""
    window_size: int | None = None
    """Tokens that a query sees, itself included, and a cache holds; None: all that came before."""
    sink_tokens: int = 0
    """First tokens of each document that stay visible beside the window (https://arxiv.org/abs/2309.17453)."""
    sink_logits: bool = False
    """A learned logit per head in the softmax's denominator, so that a head may attend to nothing."""
    soft_cap: float | None = None
    """Scores are capped to soft_cap * tanh(score / soft_cap)."""
    qk_norm: bool = False
    """Root-mean-square norm of each query and key before the rotation."""
    output_gate: bool = False
    """Each output channel is multiplied by a sigmoid of the input."""
    output_bias: bool = False

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Attention":
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key/value head serves the same number of query heads"
            )
        if self.rotary is not None and int(self.head_dim * self.rotary.fraction) % 2:
            raise ValueError(
                f"rotary turns pairs of channels: head_dim={self.head_dim} times "
                f"fraction={self.rotary.fraction} must be even"
            )
        return Attention(self, d_model, rngs=rngs)


class Attention(HeadsMixer):
    def __init__(self, cfg: AttentionConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, K, H = d_model, cfg.num_heads, cfg.num_kv_heads or cfg.num_heads, cfg.head_dim
        P = cfg.value_dim or H
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DKP->BTKP", D=D, K=K, P=P, rngs=rngs)
        self.q_norm = RMSNorm(H) if cfg.qk_norm else None
        self.k_norm = RMSNorm(H) if cfg.qk_norm else None
        self.sinks = nnx.Param(shard(jnp.zeros((N,), jnp.float32), "N")) if cfg.sink_logits else None
        self.gate_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs) if cfg.output_gate else None
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, bias=cfg.output_bias, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> Cache:
        """Returns a cache for `max_len` tokens, or for a window and its sinks if that is less."""
        cfg = self.cfg
        sizes = {"K": cfg.num_kv_heads or cfg.num_heads, "H": cfg.head_dim, "P": cfg.value_dim or cfg.head_dim}
        window = {"window": cfg.window_size, "sinks": cfg.sink_tokens}
        return init_cache(("BSKH", dtype), ("BSKP", dtype), batch_size=batch_size, max_len=max_len, **window, **sizes)

    def flops_per_token(self, seq_len: int) -> float:
        cfg = self.cfg
        window = min((cfg.window_size or seq_len) + cfg.sink_tokens, seq_len)
        # The first tokens see fewer than that.
        seen = window - window * (window - 1) / (2 * seq_len)
        return 2.0 * cfg.num_heads * (cfg.head_dim + (cfg.value_dim or cfg.head_dim)) * seen

    @jax.named_scope("attention")
    def heads(
        self, x: Float[Array, "B T D"], state: Cache | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T N P"], Cache | None]:
        cfg, T = self.cfg, x.shape[1]
        q_BTNH, k_BTKH, v_BTKP = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        ids_BT = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        positions_BT, length_B = document_positions(ids_BT, state and state.length)
        if cfg.rotary is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, positions_BT, cfg.rotary), rotate(k_BTKH, positions_BT, cfg.rotary)

        def op(q, k, v, sinks, *places):
            options = {"window_size": cfg.window_size, "sink_tokens": cfg.sink_tokens, "soft_cap": cfg.soft_cap}
            return context.attention(q, k, v, sinks=sinks, **options, **Places(*places)._asdict())

        def read(arrays, places, is_cache):
            # Of what is read in two parts, the tokens' own has the sinks: they count once.
            sinks_N = None if self.sinks is None or (is_cache and T > 1) else self.sinks[...]
            run = per_shard(op, f"BTNH,BSKH,BSKP,N,{Places.dims}", "BTNP,BNT", split_tokens=True)
            return run(q_BTNH, *arrays, sinks_N, *places)

        o_BTNP, state = attend(read, (k_BTKH, v_BTKP), state, ids_BT, positions_BT, length_B)
        if self.gate_proj is not None:
            o_BTNP = o_BTNP * jax.nn.sigmoid(self.gate_proj(x))
        return o_BTNP, state
