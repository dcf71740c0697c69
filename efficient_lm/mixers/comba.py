"""Comba: a delta rule whose feedback has a strength of its own (https://arxiv.org/abs/2506.02475).

    S = exp(g) S_old + beta k (v - feedback S_old^T k)^T
    o = S^T (q - correction k)

The feedback reads the state before it decays. That is no `delta_rule` with decays of at most 1 and beta of at most 2:
what remains along k is exp(g) - beta feedback, where the delta rule leaves exp(g) (1 - beta'), so that beta' would be
beta feedback exp(-g), without bound. It is a `generalized_delta_rule`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, GatedRMSNorm, ShortConv, decay_parameters, unit_normalize
from efficient_lm.mixers.base import Leaf, Mixer, MixerConfig
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombaConfig(MixerConfig):
    num_heads: int
    key_dim: int
    """Width of a head's keys: rows of its state."""
    value_dim: int
    """Width of a head's values: columns of its state."""
    correction: float = 1.0
    """How much of its own key is taken out of a query, at first; the authors found 0.02 better for small models."""
    conv_size: int = 4
    norm_eps: float = 1e-6
    """Added to the mean square of a head's output before the norm divides by its root."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Comba":
        return Comba(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CombaState:
    S: Leaf  # BNHP
    q_conv: Leaf  # BWNH
    k_conv: Leaf  # BWNH
    v_conv: Leaf  # BWNP


class Comba(Mixer):
    def __init__(self, cfg: CombaConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, H, P = d_model, cfg.num_heads, cfg.key_dim, cfg.value_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.q_conv = ShortConv("BTNH", width=cfg.conv_size, N=N, H=H, rngs=rngs)
        self.k_conv = ShortConv("BTNH", width=cfg.conv_size, N=N, H=H, rngs=rngs)
        self.v_conv = ShortConv("BTNP", width=cfg.conv_size, N=N, P=P, rngs=rngs)
        self.feedback_logit = nnx.Param(shard(jnp.ones((N,), jnp.float32), "N"))
        self.correction = nnx.Param(shard(jnp.full((N,), cfg.correction, jnp.float32), "N"))
        self.beta_proj = Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.dt_proj = Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.A_log, self.dt_bias = decay_parameters(rngs.params(), "N", N=N)
        self.gate_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.norm = GatedRMSNorm(P, activation="sigmoid", eps=cfg.norm_eps)
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> CombaState:
        del max_len  # The state does not grow.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim)
        convs = [conv.init_state(batch_size, dtype) for conv in (self.q_conv, self.k_conv, self.v_conv)]
        return CombaState(shard(jnp.zeros(shape, jnp.float32), "BNHP"), *convs)

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: forget, read for the key, write, read for the query.
        return 7.0 * self.cfg.num_heads * self.cfg.key_dim * self.cfg.value_dim

    @jax.named_scope("comba")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: CombaState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], CombaState | None]:
        q_BTNH, q_conv = self.q_conv(self.q_proj(x), state and state.q_conv, segment_ids=segment_ids)
        k_BTNH, k_conv = self.k_conv(self.k_proj(x), state and state.k_conv, segment_ids=segment_ids)
        v_BTNP, v_conv = self.v_conv(self.v_proj(x), state and state.v_conv, segment_ids=segment_ids)

        beta_BTN = jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32))
        dt_BTN = jax.nn.softplus(self.dt_proj(x).astype(jnp.float32) + self.dt_bias[...])
        g_BTN = -jnp.exp(self.A_log[...]) * dt_BTN
        feedback_N1 = jax.nn.sigmoid(self.feedback_logit[...])[:, None]
        q_BTNH = unit_normalize(q_BTNH - self.correction[...][:, None] * feedback_N1 * k_BTNH)
        k_BTNH = unit_normalize(k_BTNH.astype(jnp.float32))
        keys = q_BTNH, beta_BTN[..., None] * k_BTNH, feedback_N1 * k_BTNH
        q_BTNH, write_BTNH, read_BTNH = (key.astype(x.dtype) for key in keys)

        def op(q, write, v, read, g, state, segment_ids):
            return context.generalized_delta_rule(q, write, v, read, -write, g, state=state, segment_ids=segment_ids)

        run = per_shard(op, "BTNH,BTNH,BTNP,BTNH,BTN,BNHP,BT", "BTNP,BNHP", split_tokens=True)
        o_BTNP, S_BNHP = run(q_BTNH, write_BTNH, v_BTNP, read_BTNH, g_BTN, state and state.S, segment_ids)
        y_BTD = self.o_proj(self.norm(o_BTNP, self.gate_proj(x)))
        return y_BTD, state and CombaState(S_BNHP, q_conv, k_conv, v_conv)
