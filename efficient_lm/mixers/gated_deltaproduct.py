"""Gated DeltaProduct: several steps of the delta rule for every token (https://arxiv.org/abs/2502.10297).

A product of Householder reflections is any orthogonal map: with as many steps as a group needs, the state can follow
its permutations. Letter J: the steps of a token.
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
class GatedDeltaProductConfig(MixerConfig):
    num_steps: int = 2
    """Keys that a token writes to, one after the other; 1 is Gated DeltaNet."""
    num_heads: int
    """Heads of values, each with a state of its own."""
    num_key_heads: int | None = None
    """Heads of queries and keys; each serves num_heads / num_key_heads states. None: as many as there are states."""
    key_dim: int
    """Width of a head's keys: rows of its state."""
    value_dim: int
    """Width of a head's values: columns of its state."""
    conv_size: int = 4
    beta_max: float = 2.0
    """Largest writing strength; 2 permits reflections."""
    norm_eps: float = 1e-6
    """Added to the mean square of a head's output before the norm divides by its root."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "GatedDeltaProduct":
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1")
        if self.num_heads % (self.num_key_heads or self.num_heads):
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_key_heads={self.num_key_heads}: "
                "every key head serves the same number of value heads"
            )
        return GatedDeltaProduct(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedDeltaProductState:
    S: Leaf  # BNHP
    q_conv: Leaf  # BWKH
    k_conv: Leaf  # BWJKH
    v_conv: Leaf  # BWJNP


class GatedDeltaProduct(Mixer):
    def __init__(self, cfg: GatedDeltaProductConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, K, H, P = d_model, cfg.num_heads, cfg.num_key_heads or cfg.num_heads, cfg.key_dim, cfg.value_dim
        J = cfg.num_steps
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DJKH->BTJKH", D=D, J=J, K=K, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DJNP->BTJNP", D=D, J=J, N=N, P=P, rngs=rngs)
        self.q_conv = ShortConv("BTKH", width=cfg.conv_size, K=K, H=H, rngs=rngs)
        self.k_conv = ShortConv("BTJKH", width=cfg.conv_size, J=J, K=K, H=H, rngs=rngs)
        self.v_conv = ShortConv("BTJNP", width=cfg.conv_size, J=J, N=N, P=P, rngs=rngs)
        self.beta_proj = Einsum("BTD,DJN->BTJN", D=D, J=J, N=N, rngs=rngs)
        self.dt_proj = Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.A_log, self.dt_bias = decay_parameters(rngs.params(), "N", N=N)
        self.gate_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.norm = GatedRMSNorm(P, eps=cfg.norm_eps)
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> GatedDeltaProductState:
        del max_len  # The state does not grow.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim)
        convs = [conv.init_state(batch_size, dtype) for conv in (self.q_conv, self.k_conv, self.v_conv)]
        return GatedDeltaProductState(shard(jnp.zeros(shape, jnp.float32), "BNHP"), *convs)

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: forget; in each step read for the key and write; read for the query.
        per_entry = 1.0 + 4.0 * self.cfg.num_steps + 2.0
        return per_entry * self.cfg.num_heads * self.cfg.key_dim * self.cfg.value_dim

    @jax.named_scope("gated_deltaproduct")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: GatedDeltaProductState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], GatedDeltaProductState | None]:
        q_BTKH, q_conv = self.q_conv(self.q_proj(x), state and state.q_conv, segment_ids=segment_ids)
        k_BTJKH, k_conv = self.k_conv(self.k_proj(x), state and state.k_conv, segment_ids=segment_ids)
        v_BTJNP, v_conv = self.v_conv(self.v_proj(x), state and state.v_conv, segment_ids=segment_ids)

        beta_BTJN = self.cfg.beta_max * jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32))
        dt_BTN = jax.nn.softplus(self.dt_proj(x).astype(jnp.float32) + self.dt_bias[...])
        g_BTN = -jnp.exp(self.A_log[...]) * dt_BTN

        run = per_shard(_steps, "BTKH,BTJKH,BTJNP,BTJN,BTN,BNHP,BT", "BTNP,BNHP", split_tokens=True)
        q_BTKH, k_BTJKH = unit_normalize(q_BTKH), unit_normalize(k_BTJKH)
        o_BTNP, S_BNHP = run(q_BTKH, k_BTJKH, v_BTJNP, beta_BTJN, g_BTN, state and state.S, segment_ids)

        y_BTD = self.o_proj(self.norm(o_BTNP, self.gate_proj(x)))
        return y_BTD, state and GatedDeltaProductState(S_BNHP, q_conv, k_conv, v_conv)


def _steps(q_BTKH, k_BTJKH, v_BTJNP, beta_BTJN, g_BTN, S_BNHP, ids_BT):
    """The steps of a token are tokens of the delta rule: the first one forgets, the last one is asked."""
    B, T, J = k_BTJKH.shape[:3]
    interleave = lambda x_BTJ: x_BTJ.reshape(B, T * J, *x_BTJ.shape[3:])
    at = lambda step, x_BT: interleave(jnp.zeros((B, T, J, *x_BT.shape[2:]), x_BT.dtype).at[:, :, step].set(x_BT))
    o, S_BNHP = context.delta_rule(
        at(-1, q_BTKH),
        interleave(k_BTJKH),
        interleave(v_BTJNP),
        interleave(beta_BTJN),
        at(0, g_BTN),
        state=S_BNHP,
        segment_ids=None if ids_BT is None else jnp.repeat(ids_BT, J, axis=1),
    )
    return o[:, J - 1 :: J], S_BNHP
