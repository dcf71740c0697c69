"""Retention: linear attention whose heads forget at fixed rates of their own (https://arxiv.org/abs/2307.08621).

Gated retention is the one whose rates depend on the data (https://arxiv.org/abs/2405.05254).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, GatedRMSNorm
from efficient_lm.mixers.base import HeadsMixer, Leaf, MixerConfig
from efficient_lm.rotary import RotaryConfig, document_positions, rotate
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetNetConfig(MixerConfig):
    num_heads: int
    key_dim: int
    """Width of a head's keys: rows of its state. The paper takes d_model / num_heads."""
    value_dim: int
    """Width of a head's values: columns of its state. The paper takes 2 * d_model / num_heads."""
    rotary: RotaryConfig = RotaryConfig()
    """The paper's xPos: its rotation; the decays that go with it are those of the heads."""
    decay_temperature: float | None = None
    """Gated retention: log-decays are log_sigmoid(.) of a projection divided by this, 16 in its paper. None: fixed."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "RetNet":
        if int(self.key_dim * self.rotary.fraction) % 2:
            raise ValueError(
                f"rotary turns pairs of channels: key_dim={self.key_dim} times "
                f"fraction={self.rotary.fraction} must be even"
            )
        return RetNet(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RetNetState:
    S: Leaf  # BNHP
    document_length: Leaf  # B
    """Tokens so far of the last document."""


class RetNet(HeadsMixer):
    def __init__(self, cfg: RetNetConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, H, P = d_model, cfg.num_heads, cfg.key_dim, cfg.value_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.gate_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.decay_proj = None if cfg.decay_temperature is None else Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.norm = GatedRMSNorm(P)
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> RetNetState:
        del max_len, dtype  # The state does not grow, and keeps no activations.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim)
        return RetNetState(
            S=shard(jnp.zeros(shape, jnp.float32), "BNHP"),
            document_length=shard(jnp.zeros((batch_size,), jnp.int32), "B"),
        )

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: forget, write, read.
        return 5.0 * self.cfg.num_heads * self.cfg.key_dim * self.cfg.value_dim

    @jax.named_scope("retnet")
    def heads(
        self,
        x: Float[Array, "B T D"],
        state: RetNetState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T N P"], RetNetState | None]:
        ids_BT = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        positions_BT, length_B = document_positions(ids_BT, state and state.document_length)
        q_BTNH = rotate(self.q_proj(x), positions_BT, self.cfg.rotary)
        k_BTNH = rotate(self.k_proj(x), positions_BT, self.cfg.rotary)
        if self.decay_proj is None or self.cfg.decay_temperature is None:
            # Head n keeps 1 - 2^(-5 - n) of its state at each token.
            g, g_dims = shard(jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.cfg.num_heads)))), "N"), "N"
        else:
            decay_BTN = self.decay_proj(x).astype(jnp.float32)
            g, g_dims = jax.nn.log_sigmoid(decay_BTN) / self.cfg.decay_temperature, "BTN"

        def op(q, k, v, g, state, segment_ids):
            return context.linear_attention(q, k, v, g, state=state, segment_ids=segment_ids)

        run = per_shard(op, f"BTNH,BTNH,BTNP,{g_dims},BNHP,BT", "BTNP,BNHP", split_tokens=True)
        o_BTNP, S_BNHP = run(q_BTNH, k_BTNH, self.v_proj(x), g, state and state.S, segment_ids)
        return self.norm(o_BTNP, self.gate_proj(x)), state and RetNetState(S_BNHP, length_B)
