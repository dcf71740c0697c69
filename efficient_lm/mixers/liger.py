"""Liger: gated linear attention with no parameters of its own, and a window (https://arxiv.org/abs/2503.01496).

Both read the queries, keys and values of a softmax layer, and the output is half of each. Linear attention takes
softmax(q) and softmax(k), over channels and not rotated, and its decays from the keys: log_sigmoid(k) / 16. The paper
pools keys for them; the published code averages as many channels to as many, which leaves them as they are.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum
from efficient_lm.mixers.base import HeadsMixer, Leaf, MixerConfig
from efficient_lm.mixers.cache import Cache, Places, attend, init_cache
from efficient_lm.rotary import RotaryConfig, document_positions, rotate
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class LigerConfig(MixerConfig):
    num_heads: int
    num_kv_heads: int | None = None
    """Heads of keys and values; None: as many as there are query heads. Each query head has a state."""
    head_dim: int
    window_size: int = 64
    """Tokens that a query sees by softmax attention, itself included."""
    rotary: RotaryConfig | None = RotaryConfig()
    """Of softmax attention. None: no positions at all (NoPE)."""
    decay_temperature: float = 16.0
    """Log-decays are log_sigmoid(k) divided by this."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Liger":
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key/value head serves the same number of query heads"
            )
        return Liger(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LigerState:
    S: Leaf  # BNHP
    window: Cache


class Liger(HeadsMixer):
    def __init__(self, cfg: LigerConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, K, H = d_model, cfg.num_heads, cfg.num_kv_heads or cfg.num_heads, cfg.head_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DKP->BTKP", D=D, K=K, P=H, rngs=rngs)
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=H, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> LigerState:
        """Returns the state of linear attention, and a cache of a window, or of `max_len` tokens if that is less."""
        cfg, N, K, H = self.cfg, self.cfg.num_heads, self.cfg.num_kv_heads or self.cfg.num_heads, self.cfg.head_dim
        sizes = {"batch_size": batch_size, "max_len": max_len, "window": cfg.window_size, "K": K, "H": H, "P": H}
        S_BNHP = shard(jnp.zeros((batch_size, N, H, H), jnp.float32), "BNHP")
        return LigerState(S_BNHP, init_cache(("BSKH", dtype), ("BSKP", dtype), **sizes))

    def flops_per_token(self, seq_len: int) -> float:
        cfg = self.cfg
        window = min(cfg.window_size, seq_len)
        # The first tokens see fewer than that. Per entry of the state: forget, write, read.
        seen = window - window * (window - 1) / (2 * seq_len)
        return cfg.num_heads * (4.0 * cfg.head_dim * seen + 5.0 * cfg.head_dim**2)

    @jax.named_scope("liger")
    def heads(
        self, x: Float[Array, "B T D"], state: LigerState | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T N P"], LigerState | None]:
        cfg = self.cfg
        q_BTNH, k_BTKH, v_BTKP = self.q_proj(x), self.k_proj(x), self.v_proj(x)

        def linear(q_BTNH, k_BTKH, v_BTKP, S_BNHP, segment_ids):
            wide = lambda a: jnp.repeat(a, q_BTNH.shape[2] // k_BTKH.shape[2], axis=2)
            softmax = lambda a: jax.nn.softmax(a.astype(jnp.float32), axis=-1).astype(a.dtype)
            g_BTKH = jax.nn.log_sigmoid(k_BTKH.astype(jnp.float32)) / cfg.decay_temperature
            args = softmax(q_BTNH), wide(softmax(k_BTKH)), wide(v_BTKP), wide(g_BTKH)
            return context.linear_attention(*args, state=S_BNHP, segment_ids=segment_ids, scale=1.0)

        run = per_shard(linear, "BTNH,BTKH,BTKP,BNHP,BT", "BTNP,BNHP", split_tokens=True)
        far_BTNP, S_BNHP = run(q_BTNH, k_BTKH, v_BTKP, state and state.S, segment_ids)

        ids_BT = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        positions_BT, length_B = document_positions(ids_BT, state and state.window.length)
        if cfg.rotary is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, positions_BT, cfg.rotary), rotate(k_BTKH, positions_BT, cfg.rotary)

        def softmax_attention(q, k, v, *places):
            return context.attention(q, k, v, window_size=cfg.window_size, **Places(*places)._asdict())

        def read(arrays, places, _):
            run = per_shard(softmax_attention, f"BTNH,BSKH,BSKP,{Places.dims}", "BTNP,BNT", split_tokens=True)
            return run(q_BTNH, *arrays, *places)

        arrays = k_BTKH, v_BTKP
        near_BTNP, window = attend(read, arrays, state and state.window, ids_BT, positions_BT, length_B)
        return (near_BTNP + far_BTNP) / 2, None if window is None else LigerState(S_BNHP, window)
