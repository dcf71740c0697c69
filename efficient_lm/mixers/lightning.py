"""Lightning attention: linear attention with fixed decays per head and layer, as in TransNormerLLM and MiniMax-01.

https://arxiv.org/abs/2401.04658 has the algorithm, https://arxiv.org/abs/2501.08313 the layer that is built here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, rms_normalize
from efficient_lm.mixers.base import HeadsMixer, Leaf, MixerConfig
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningConfig(MixerConfig):
    num_heads: int
    key_dim: int
    """Width of a head's keys: rows of its state."""
    value_dim: int
    """Width of a head's values: columns of its state. The papers take key_dim."""
    slope_scale: float = 1.0
    """What the heads' rates of forgetting are multiplied by. The papers let layers forget less the deeper they are,
    1 - layer / (num_layers - 1): give each depth a block of its own, or one number to all layers of a block."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Lightning":
        if self.slope_scale < 0:
            raise ValueError(f"slope_scale={self.slope_scale} is negative: the state would grow with every token")
        return Lightning(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LightningState:
    S: Leaf  # BNHP


class Lightning(HeadsMixer):
    def __init__(self, cfg: LightningConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, H, P = d_model, cfg.num_heads, cfg.key_dim, cfg.value_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.gate_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.norm_scale = nnx.Param(shard(jnp.ones((N, P), jnp.float32), "NP"))
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> LightningState:
        del max_len, dtype  # The state does not grow, and keeps no activations.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim)
        return LightningState(shard(jnp.zeros(shape, jnp.float32), "BNHP"))

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: forget, write, read.
        return 5.0 * self.cfg.num_heads * self.cfg.key_dim * self.cfg.value_dim

    @jax.named_scope("lightning")
    def heads(
        self,
        x: Float[Array, "B T D"],
        state: LightningState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T N P"], LightningState | None]:
        q_BTNH, k_BTNH, v_BTNP = (jax.nn.silu(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        # The slopes of ALiBi (https://arxiv.org/abs/2108.12409): a geometric series down to 2^-8.
        N = self.cfg.num_heads
        g_N = shard(-self.cfg.slope_scale * 2.0 ** (-8.0 * jnp.arange(1, N + 1) / N), "N")

        def op(q, k, v, g, state, segment_ids):
            return context.linear_attention(q, k, v, g, state=state, segment_ids=segment_ids, scale=1.0)

        run = per_shard(op, "BTNH,BTNH,BTNP,N,BNHP,BT", "BTNP,BNHP", split_tokens=True)
        o_BTNP, S_BNHP = run(q_BTNH, k_BTNH, v_BTNP, g_N, state and state.S, segment_ids)

        # The norm runs over all heads at once.
        o_BTNP = rms_normalize(o_BTNP.astype(jnp.float32), axes=(-2, -1)) * self.norm_scale[...]
        o_BTNP = o_BTNP * jax.nn.sigmoid(self.gate_proj(x).astype(jnp.float32))
        return o_BTNP.astype(x.dtype), state and LightningState(S_BNHP)
