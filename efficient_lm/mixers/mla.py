"""Multi-head latent attention (https://arxiv.org/abs/2405.04434): keys and values are made of one small latent vector.

With several latent heads, each for its own group of query heads, it is grouped latent attention
(https://arxiv.org/abs/2505.21487), whose cache can be split between devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from efficient_lm import context
from efficient_lm.layers import Einsum, RMSNorm, rms_normalize
from efficient_lm.mixers.base import HeadsMixer, MixerConfig
from efficient_lm.mixers.cache import Cache, Places, attend, init_cache
from efficient_lm.rotary import RotaryConfig, document_positions, rotate
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig(MixerConfig):
    num_heads: int
    num_latent_heads: int = 1
    """Groups of heads with a latent of their own. The cache holds latent_dim + rotary_dim numbers for each."""
    latent_dim: int
    """Width of the latent that keys and values are made of."""
    query_rank: int | None = None
    """Width of the latent that queries are made of; None: they are made of the input."""
    key_dim: int
    """Width of a head's keys without position."""
    rotary_dim: int
    """Width of the rotated key that all heads share."""
    value_dim: int
    rotary: RotaryConfig = RotaryConfig()
    scale: float | None = None
    """Multiplies the scores; None: (key_dim + rotary_dim) ** -0.5. DeepSeek multiplies this with the square of
    0.1 * mscale_all_dim * log(factor) + 1 where YaRN stretches the rotation."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MLA":
        if self.num_heads % self.num_latent_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_latent_heads={self.num_latent_heads}: "
                "every latent serves the same number of heads"
            )
        if int(self.rotary_dim * self.rotary.fraction) % 2:
            raise ValueError(
                f"rotary turns pairs of channels: rotary_dim={self.rotary_dim} times "
                f"fraction={self.rotary.fraction} must be even"
            )
        return MLA(self, d_model, rngs=rngs)


class MLA(HeadsMixer):
    def __init__(self, cfg: MLAConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, K, R, U = d_model, cfg.num_heads, cfg.num_latent_heads, cfg.latent_dim, cfg.query_rank
        H, P = cfg.key_dim, cfg.value_dim
        self.cfg = cfg
        # A mesh splits the heads. Latents go with their heads; one that serves them all is whole on every device.
        self.latent_letter = "K" if K > 1 else "J"
        self.q_down_proj = None if U is None else Einsum("BTD,DU->BTU", D=D, U=U, rngs=rngs)
        self.q_norm = None if U is None else RMSNorm(U)
        if U is None:
            self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H + cfg.rotary_dim, rngs=rngs)
        else:
            self.q_proj = Einsum("BTU,UNH->BTNH", U=U, N=N, H=H + cfg.rotary_dim, rngs=rngs)
        latent_dims = f"{self.latent_letter}R"
        self.latent_proj = Einsum(f"BTD,D{latent_dims}->BT{latent_dims}", D=D, K=K, J=K, R=R, rngs=rngs)
        self.latent_scale = nnx.Param(shard(jnp.ones((K, R), jnp.float32), latent_dims))
        self.shared_proj = Einsum("BTD,DH->BTH", D=D, H=cfg.rotary_dim, rngs=rngs)
        # Each head reads the latent of its group.
        self.k_proj = Einsum("BTR,RNH->BTNH", R=R, N=N, H=H, rngs=rngs)
        self.v_proj = Einsum("BTR,RNP->BTNP", R=R, N=N, P=P, rngs=rngs)
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> Cache:
        sizes = {self.latent_letter: self.cfg.num_latent_heads, "R": self.cfg.latent_dim + self.cfg.rotary_dim}
        return init_cache((f"BS{self.latent_letter}R", dtype), batch_size=batch_size, max_len=max_len, **sizes)

    def flops_per_token(self, seq_len: int) -> float:
        cfg = self.cfg
        return cfg.num_heads * (cfg.key_dim + cfg.rotary_dim + cfg.value_dim) * (seq_len + 1.0)

    @jax.named_scope("mla")
    def heads(
        self, x: Float[Array, "B T D"], state: Cache | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T N P"], Cache | None]:
        cfg = self.cfg
        ids_BT = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        positions_BT, length_B = document_positions(ids_BT, state and state.length)
        turn = lambda x_BTNH: rotate(x_BTNH, positions_BT, cfg.rotary)
        q_latent = x
        if self.q_down_proj is not None and self.q_norm is not None:
            q_latent = self.q_norm(self.q_down_proj(x))
        q_BTNH = self.q_proj(q_latent)
        q_BTNH = jnp.concatenate([q_BTNH[..., : cfg.key_dim], turn(q_BTNH[..., cfg.key_dim :])], axis=3)

        latent_dims = f"BT{self.latent_letter}R"
        latent_BTKR = rms_normalize(self.latent_proj(x).astype(jnp.float32)) * self.latent_scale[...]
        shared_BT1H = turn(self.shared_proj(x)[:, :, None])
        # Each latent with the key that all share behind it: what a head needs, and all that a cache holds.
        shared_BTKH = jnp.broadcast_to(shared_BT1H, (*latent_BTKR.shape[:3], cfg.rotary_dim))
        memory_BTKR = jnp.concatenate([latent_BTKR.astype(x.dtype), shard(shared_BTKH, latent_dims)], axis=3)
        weights = [proj.kernel[...].astype(x.dtype) for proj in (self.k_proj, self.v_proj)]
        scale = (cfg.key_dim + cfg.rotary_dim) ** -0.5 if cfg.scale is None else cfg.scale

        def read(arrays, places, is_cache):
            fn = functools.partial(_absorbed if is_cache else _expanded, scale)
            run = per_shard(fn, f"BTNH,{latent_dims},RNH,RNP,{Places.dims}", "BTNP,BNT", split_tokens=True)
            return run(q_BTNH, *arrays, *weights, *places)

        o_BTNP, state = attend(read, (memory_BTKR,), state, ids_BT, positions_BT, length_B)
        return o_BTNP, state


def _expanded(scale, q_BTNH, memory_BSKR, k_RNH, v_RNP, *places):
    """Attention to the keys and values that the latents stand for."""
    (memory_BSKR,), where = context.gather_keys((memory_BSKR,), *places)
    latent_BSKR, shared_BSKH = jnp.split(memory_BSKR, [k_RNH.shape[0]], axis=3)
    K, N = latent_BSKR.shape[2], k_RNH.shape[1]

    def of_heads(w_RNH):
        o_BSKGH = jnp.einsum("BSKR,RKGH->BSKGH", latent_BSKR, w_RNH.reshape(w_RNH.shape[0], K, -1, w_RNH.shape[2]))
        return o_BSKGH.reshape(*o_BSKGH.shape[:2], N, w_RNH.shape[2])

    k_BSNH = jnp.concatenate([of_heads(k_RNH), jnp.repeat(shared_BSKH, N // K, axis=2)], axis=3)
    return kernels.attention(q_BTNH, k_BSNH, of_heads(v_RNP), scale=scale, **where)


def _absorbed(scale, q_BTNH, memory_BSKR, k_RNH, v_RNP, *places):
    """The same, to the latents themselves: what makes keys of them is applied to queries, what makes values to outputs.

    So the cache is read as it is. Values have the shared key behind them too, rather than being copied without it.
    """
    (memory_BSKR,), where = context.gather_keys((memory_BSKR,), *places)
    (B, T, N, _), K, (R, _, H) = q_BTNH.shape, memory_BSKR.shape[2], k_RNH.shape
    grouped = lambda x_BTNH: x_BTNH.reshape(B, T, K, N // K, x_BTNH.shape[3])
    weights = lambda w_RNH: w_RNH.reshape(R, K, N // K, w_RNH.shape[2])
    q_BTKGR = jnp.einsum("BTKGH,RKGH->BTKGR", grouped(q_BTNH[..., :H]), weights(k_RNH))
    q_BTNR = jnp.concatenate([q_BTKGR.reshape(B, T, N, R), q_BTNH[..., H:]], axis=3)
    o_BTNR, lse_BNT = kernels.attention(q_BTNR, memory_BSKR, memory_BSKR, scale=scale, **where)
    o_BTKGP = jnp.einsum("BTKGR,RKGP->BTKGP", grouped(o_BTNR[..., :R]), weights(v_RNP))
    return o_BTKGP.reshape(B, T, N, v_RNP.shape[2]), lse_BNT
