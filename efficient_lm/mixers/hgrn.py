"""Hierarchically gated recurrent network: forget gates with a lower bound (https://arxiv.org/abs/2311.04823)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, GatedRMSNorm
from efficient_lm.mixers.base import Leaf, Mixer, MixerConfig
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class HGRNConfig(MixerConfig):
    width: int
    """Channels of the recurrence. The paper takes d_model."""
    lower_bound: float = 0.0
    """Lower bound of the forget gates. The paper's bounds rise from 0 with the layer, so that upper layers see far."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "HGRN":
        if not 0 <= self.lower_bound < 1:
            raise ValueError(f"lower_bound={self.lower_bound} is not in [0, 1)")
        return HGRN(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HGRNState:
    h: Leaf  # BF


class HGRN(Mixer):
    def __init__(self, cfg: HGRNConfig, d_model: int, *, rngs: nnx.Rngs):
        D, F = d_model, cfg.width
        self.cfg = cfg
        self.x_proj = Einsum("BTD,DF->BTF", D=D, F=F, rngs=rngs)
        self.forget_proj = Einsum("BTD,DF->BTF", D=D, F=F, rngs=rngs)
        self.gate_proj = Einsum("BTD,DF->BTF", D=D, F=F, rngs=rngs)
        self.norm = GatedRMSNorm(F)
        self.o_proj = Einsum("BTF,FD->BTD", F=F, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> HGRNState:
        del max_len, dtype  # The state does not grow, and keeps no activations.
        return HGRNState(shard(jnp.zeros((batch_size, self.cfg.width), jnp.float32), "BF"))

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per channel: forget and write.
        return 3.0 * self.cfg.width

    @jax.named_scope("hgrn")
    def __call__(
        self, x: Float[Array, "B T D"], state: HGRNState | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], HGRNState | None]:
        # What is not kept is what is written; sigmoid(-z) is 1 - sigmoid(z) without its rounding.
        write_BTF = (1 - self.cfg.lower_bound) * jax.nn.sigmoid(-self.forget_proj(x).astype(jnp.float32))
        x_BTF = write_BTF * jax.nn.silu(self.x_proj(x).astype(jnp.float32))

        def op(a, x, state, segment_ids):
            return context.diagonal_scan(a, x, state=state, segment_ids=segment_ids)

        run = per_shard(op, "BTF,BTF,BF,BT", "BTF,BF", split_tokens=True)
        h_BTF, h_BF = run(1 - write_BTF, x_BTF, state and state.h, segment_ids)
        return self.o_proj(self.norm(h_BTF, self.gate_proj(x)).astype(x.dtype)), state and HGRNState(h_BF)
