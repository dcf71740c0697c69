"""HGRN2: linear attention that writes as much as it forgets, channel by channel (https://arxiv.org/abs/2404.07904).

The paper's output gate, forget gate and input are the queries, the decays and the values here; the keys are one minus
what the decays keep.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, rms_normalize
from efficient_lm.mixers.base import Leaf, Mixer, MixerConfig
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class HGRN2Config(MixerConfig):
    num_heads: int
    key_dim: int
    """Width of a head's keys: rows of its state, by which the paper expands a recurrence of width d_model."""
    value_dim: int
    """Width of a head's values: columns of its state. The paper takes d_model / num_heads."""
    lower_bound: float = 0.0
    """The least that a channel keeps of its state at a token, in [0, 1). In the paper it is 0 in the first layer and
    rises with depth, learned for all layers together; here it is one number for all layers of a block."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "HGRN2":
        if not 0 <= self.lower_bound < 1:
            raise ValueError(f"lower_bound={self.lower_bound} is not in [0, 1)")
        return HGRN2(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HGRN2State:
    S: Leaf  # BNHP


class HGRN2(Mixer):
    def __init__(self, cfg: HGRN2Config, d_model: int, *, rngs: nnx.Rngs):
        D, N, H, P = d_model, cfg.num_heads, cfg.key_dim, cfg.value_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.forget_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.norm_scale = nnx.Param(shard(jnp.ones((N, P), jnp.float32), "NP"))
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> HGRN2State:
        del max_len, dtype  # The state does not grow, and keeps no activations.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim)
        return HGRN2State(shard(jnp.zeros(shape, jnp.float32), "BNHP"))

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: forget, write, read.
        return 5.0 * self.cfg.num_heads * self.cfg.key_dim * self.cfg.value_dim

    @jax.named_scope("hgrn2")
    def __call__(
        self, x: Float[Array, "B T D"], state: HGRN2State | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], HGRN2State | None]:
        forget_BTNH, bound = self.forget_proj(x).astype(jnp.float32), self.cfg.lower_bound
        # The logarithm of bound + (1 - bound) * sigmoid, and one minus it, both without cancellation.
        g_BTNH = jax.nn.log_sigmoid(forget_BTNH)
        if bound > 0:
            g_BTNH = jnp.logaddexp(math.log(bound), math.log1p(-bound) + g_BTNH)
        k_BTNH = ((1 - bound) * jax.nn.sigmoid(-forget_BTNH)).astype(x.dtype)

        def op(q, k, v, g, state, segment_ids):
            return context.linear_attention(q, k, v, g, state=state, segment_ids=segment_ids)

        run = per_shard(op, "BTNH,BTNH,BTNP,BTNH,BNHP,BT", "BTNP,BNHP", split_tokens=True)
        q_BTNH = jax.nn.silu(self.q_proj(x))
        o_BTNP, S_BNHP = run(q_BTNH, k_BTNH, self.v_proj(x), g_BTNH, state and state.S, segment_ids)

        # The norm runs over all heads at once.
        o_BTNP = rms_normalize(o_BTNP.astype(jnp.float32), axes=(-2, -1), eps=1e-5) * self.norm_scale[...]
        return self.o_proj(o_BTNP.astype(x.dtype)), state and HGRN2State(S_BNHP)
