"""Grouped-tied attention: keys and values are one array, of half the size of a cache (https://arxiv.org/abs/2505.21487)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from efficient_lm import context
from efficient_lm.layers import Einsum
from efficient_lm.mixers.base import Mixer, MixerConfig
from efficient_lm.mixers.cache import Cache, Places, attend, init_cache
from efficient_lm.rotary import RotaryConfig, document_positions, rotate
from efficient_lm.sharding import per_shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedTiedAttentionConfig(MixerConfig):
    num_heads: int
    num_kv_heads: int
    """Heads of what is key and value at once; each serves the same number of query heads."""
    head_dim: int
    rotary_dim: int
    """Width of the one rotated key that all heads share, in place of the last channels of their own. The paper takes
    half of head_dim."""
    rotary: RotaryConfig = RotaryConfig()

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "GroupedTiedAttention":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key/value head serves the same number of query heads"
            )
        if not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim={self.rotary_dim} is the share of head_dim={self.head_dim} with a position")
        if int(self.rotary_dim * self.rotary.fraction) % 2:
            raise ValueError(
                f"rotary turns pairs of channels: rotary_dim={self.rotary_dim} times "
                f"fraction={self.rotary.fraction} must be even"
            )
        return GroupedTiedAttention(self, d_model, rngs=rngs)


class GroupedTiedAttention(Mixer):
    def __init__(self, cfg: GroupedTiedAttentionConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, K, H, R = d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.rotary_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.kv_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.shared_proj = Einsum("BTD,DR->BTR", D=D, R=R, rngs=rngs)
        self.o_proj = Einsum("BTNH,NHD->BTD", N=N, H=H, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> Cache:
        sizes = {"K": self.cfg.num_kv_heads, "H": self.cfg.head_dim, "R": self.cfg.rotary_dim}
        return init_cache(("BSKH", dtype), ("BSR", dtype), batch_size=batch_size, max_len=max_len, **sizes)

    def flops_per_token(self, seq_len: int) -> float:
        return 2.0 * self.cfg.num_heads * self.cfg.head_dim * (seq_len + 1.0)

    @jax.named_scope("grouped_tied_attention")
    def __call__(
        self, x: Float[Array, "B T D"], state: Cache | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        own = self.cfg.head_dim - self.cfg.rotary_dim  # Channels of a head's own key.
        ids_BT = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        positions_BT, length_B = document_positions(ids_BT, state and state.length)
        turn = lambda x_BTNH: rotate(x_BTNH, positions_BT, self.cfg.rotary)
        q_BTNH = self.q_proj(x)
        q_BTNH = jnp.concatenate([q_BTNH[..., :own], turn(q_BTNH[..., own:])], axis=3)
        shared_BTR = turn(self.shared_proj(x)[:, :, None])[:, :, 0]

        def op(q, kv, shared, *places):
            (kv, shared), places = context.gather_keys((kv, shared), *places)
            shared_BSKR = jnp.broadcast_to(shared[:, :, None], (*kv.shape[:3], shared.shape[2]))
            k_BSKH = jnp.concatenate([kv[..., :own], shared_BSKR], axis=3)
            return kernels.attention(q, k_BSKH, kv, **places)

        def read(arrays, places, is_cache):
            del is_cache
            run = per_shard(op, f"BTNH,BSKH,BSR,{Places.dims}", "BTNH,BNT", split_tokens=True)
            return run(q_BTNH, *arrays, *places)

        o_BTNH, state = attend(read, (self.kv_proj(x), shared_BTR), state, ids_BT, positions_BT, length_B)
        return self.o_proj(o_BTNH), state
