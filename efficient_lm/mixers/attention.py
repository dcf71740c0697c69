"""Softmax attention with grouped keys and values (https://arxiv.org/abs/2305.13245)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from efficient_lm.layers import Einsum, RMSNorm
from efficient_lm.mixers.base import Leaf, Mixer, MixerConfig
from efficient_lm.rotary import RotaryConfig, document_positions, rotate
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    num_heads: int
    num_kv_heads: int | None = None
    """Heads of keys and values; None: as many as there are query heads."""
    head_dim: int
    rotary: RotaryConfig | None = RotaryConfig()
    """None: no positions at all (NoPE)."""
    window_size: int | None = None
    """Tokens that a query sees, itself included; None: all that came before."""
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all tokens so far; slot i holds the i-th token that came, padding included."""

    k: Leaf  # BSKH
    v: Leaf  # BSKH
    segment_ids: Leaf  # BS
    """0 where a slot is empty or holds padding: never attended to."""
    length: Leaf
    """Slots in use."""
    document_length: Leaf  # B
    """Tokens so far of the last document."""


class Attention(Mixer):
    def __init__(self, cfg: AttentionConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, K, H = d_model, cfg.num_heads, cfg.num_kv_heads or cfg.num_heads, cfg.head_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.q_norm = RMSNorm(H) if cfg.qk_norm else None
        self.k_norm = RMSNorm(H) if cfg.qk_norm else None
        self.sinks = nnx.Param(shard(jnp.zeros((N,), jnp.float32), "N")) if cfg.sink_logits else None
        self.gate_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs) if cfg.output_gate else None
        self.o_proj = Einsum("BTNH,NHD->BTD", N=N, H=H, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> KVCache:
        K, H = self.cfg.num_kv_heads or self.cfg.num_heads, self.cfg.head_dim
        zeros_BSKH = shard(jnp.zeros((batch_size, max_len, K, H), dtype), "BSKH")
        return KVCache(
            k=zeros_BSKH,
            v=zeros_BSKH,
            segment_ids=shard(jnp.zeros((batch_size, max_len), jnp.int32), "BS"),
            length=jnp.zeros((), jnp.int32),
            document_length=shard(jnp.zeros((batch_size,), jnp.int32), "B"),
        )

    def flops_per_token(self, seq_len: int) -> float:
        window = min(self.cfg.window_size or seq_len, seq_len)
        # The first tokens see fewer than a window.
        seen = window - window * (window - 1) / (2 * seq_len)
        return 4.0 * self.cfg.num_heads * self.cfg.head_dim * seen

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "B T D"], state: KVCache | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        cfg, (B, T, _) = self.cfg, x.shape
        q_BTNH, k_BSKH, v_BSKH = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BSKH = self.q_norm(q_BTNH), self.k_norm(k_BSKH)

        ids_BT = segment_ids
        if ids_BT is None and state is not None:  # All tokens go on with the cache's document.
            ids_B1 = jnp.max(state.segment_ids, axis=1, keepdims=True, initial=1)
            ids_BT = jnp.broadcast_to(ids_B1, (B, T))
        past_B = None if state is None else state.document_length
        if ids_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        else:
            positions_BT, past_B = document_positions(ids_BT, past_B)
        if cfg.rotary is not None:
            q_BTNH, k_BSKH = rotate(q_BTNH, positions_BT, cfg.rotary), rotate(k_BSKH, positions_BT, cfg.rotary)

        start, ids_BS = None, None
        if state is not None:
            assert ids_BT is not None
            assert past_B is not None
            start = state.length
            write = lambda cache, new: jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), start, 1)
            k_BSKH, v_BSKH = write(state.k, k_BSKH), write(state.v, v_BSKH)
            ids_BS = write(state.segment_ids, ids_BT)
            state = KVCache(k_BSKH, v_BSKH, ids_BS, start + T, past_B)

        def op(q, k, v, sinks, ids_BT, ids_BS, start):
            o, _ = kernels.attention(
                q,
                k,
                v,
                window_size=cfg.window_size,
                sinks=sinks,
                sink_tokens=cfg.sink_tokens,
                soft_cap=cfg.soft_cap,
                segment_ids=ids_BT,
                kv_segment_ids=ids_BS,
                q_start=start,
            )
            return o

        run = per_shard(op, "BTNH,BSKH,BSKH,N,BT,BS,", "BTNH")
        o_BTNH = run(q_BTNH, k_BSKH, v_BSKH, self.sinks and self.sinks[...], ids_BT, ids_BS, start)
        if self.gate_proj is not None:
            o_BTNH = o_BTNH * jax.nn.sigmoid(self.gate_proj(x))
        return self.o_proj(o_BTNH), state
