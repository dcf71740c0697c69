"""Differential attention: the difference of two softmax maps, which cancels noise (https://arxiv.org/abs/2410.05258)."""

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
from efficient_lm.rotary import RotaryConfig, document_positions, rotate
from efficient_lm.sharding import per_shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentialAttentionConfig(MixerConfig):
    num_heads: int
    """Pairs of maps: half of the heads of an attention of the same size."""
    num_kv_heads: int | None = None
    """Pairs of keys, each with its values; None: as many as there are pairs of queries."""
    head_dim: int
    """Width of each query and key; values have twice of it."""
    rotary: RotaryConfig | None = RotaryConfig()
    """None: no positions at all."""
    lambda_init: float = 0.8
    """The second map's weight at first. The paper takes 0.8 - 0.6 * exp(-0.3 * l) in layer l = 0, 1 .."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "DifferentialAttention":
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
        return DifferentialAttention(self, d_model, rngs=rngs)


class DifferentialAttention(Mixer):
    def __init__(self, cfg: DifferentialAttentionConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, K, H = d_model, cfg.num_heads, cfg.num_kv_heads or cfg.num_heads, cfg.head_dim
        self.cfg = cfg
        queries = lambda: Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        keys = lambda: Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.q_proj, self.q2_proj, self.k_proj, self.k2_proj = queries(), queries(), keys(), keys()
        self.v_proj = Einsum("BTD,DKP->BTKP", D=D, K=K, P=2 * H, rngs=rngs)
        # lambda = exp(q k) - exp(q2 k2) + lambda_init, with one vector each for all heads.
        draw = lambda: nnx.Param(0.1 * jax.random.normal(rngs.params(), (H,), jnp.float32))
        self.lambda_q, self.lambda_k, self.lambda_q2, self.lambda_k2 = draw(), draw(), draw(), draw()
        self.norm = RMSNorm(2 * H)
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=2 * H, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> Cache:
        K, H = self.cfg.num_kv_heads or self.cfg.num_heads, self.cfg.head_dim
        arrays = ("BSKH", dtype), ("BSKH", dtype), ("BSKP", dtype)
        return init_cache(*arrays, batch_size=batch_size, max_len=max_len, K=K, H=H, P=2 * H)

    def flops_per_token(self, seq_len: int) -> float:
        return 6.0 * self.cfg.num_heads * self.cfg.head_dim * (seq_len + 1.0)

    @jax.named_scope("differential_attention")
    def __call__(
        self, x: Float[Array, "B T D"], state: Cache | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        cfg = self.cfg
        ids_BT = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        positions_BT, length_B = document_positions(ids_BT, state and state.length)
        turn = lambda x_BTNH: x_BTNH if cfg.rotary is None else rotate(x_BTNH, positions_BT, cfg.rotary)
        q_BTNH, q2_BTNH = turn(self.q_proj(x)), turn(self.q2_proj(x))
        arrays = turn(self.k_proj(x)), turn(self.k2_proj(x)), self.v_proj(x)

        def op(q, q2, k, k2, v, *places):
            read_by = lambda q, k: context.attention(q, k, v, **Places(*places)._asdict())
            (o_BTNP, lse_BNT), (o2_BTNP, lse2_BNT) = read_by(q, k), read_by(q2, k2)
            # Two maps of one head are two heads side by side, until they are subtracted.
            flat = lambda a, axis: a.reshape(*a.shape[: axis - 1], 2 * a.shape[axis - 1], *a.shape[axis + 1 :])
            return flat(jnp.stack([o_BTNP, o2_BTNP], 3), 3), flat(jnp.stack([lse_BNT, lse2_BNT], 2), 2)

        def read(arrays, places, is_cache):
            del is_cache
            run = per_shard(op, f"BTNH,BTNH,BSKH,BSKH,BSKP,{Places.dims}", "BTNP,BNT", split_tokens=True)
            return run(q_BTNH, q2_BTNH, *arrays, *places)

        o_BTNP, state = attend(read, arrays, state, ids_BT, positions_BT, length_B)
        products = (self.lambda_q, self.lambda_k), (self.lambda_q2, self.lambda_k2)
        lambda_1, lambda_2 = (jnp.exp(jnp.sum(q_H[...] * k_H[...])) for q_H, k_H in products)
        o_BTNP = per_shard(_difference, "BTNP,", "BTNP", split_tokens=True)(
            o_BTNP, lambda_1 - lambda_2 + cfg.lambda_init
        )
        return self.o_proj((1 - cfg.lambda_init) * self.norm(o_BTNP)), state


def _difference(o_BTNP, weight):
    """Subtracts every second head from the one before it."""
    B, T, N, P = o_BTNP.shape
    pairs_BTNGP = o_BTNP.reshape(B, T, N // 2, 2, P).astype(jnp.float32)
    return (pairs_BTNGP[:, :, :, 0] - weight * pairs_BTNGP[:, :, :, 1]).astype(o_BTNP.dtype)
