"""RWKV-7 "Goose": a generalized delta rule whose rates of replacement, like its decays, are one per channel and token.

https://arxiv.org/abs/2503.14456. The paper's receptance is the query here. What each of the six projections sees is a
mix of the token and the one before it. All layers but the first mix the first layer's values into their own.

A token multiplies the state by Diag(decay) - k (rate k)^T: not diagonal, and with eigenvalues below 0 (to -0.45) where
decays are strong. The paper shows that layers of such transitions track states: they recognize all regular languages.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, layer_normalize, token_before, unit_normalize
from efficient_lm.mixers.base import Leaf, MixerConfig, Shared, SharingMixer
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV7Config(MixerConfig):
    num_heads: int
    """The paper takes d_model / 64."""
    key_dim: int = 64
    """Width of a head's keys: rows of its state."""
    value_dim: int = 64
    """Width of a head's values: columns of its state."""
    decay_rank: int = 64
    """Ranks of the projections that give the decays,"""
    rate_rank: int = 64
    """the rates at which old values are replaced,"""
    gate_rank: int = 128
    """the output gates,"""
    value_rank: int | None = None
    """and how much of the first layer's values each token takes. None: this is the first layer. In a model it stands in
    the prefix: `prefix="F", pattern="R"`."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "RWKV7":
        return RWKV7(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RWKV7State:
    S: Leaf  # BNHP
    x: Leaf  # BWD, W = 1
    """The last token's input."""


class LowRank(nnx.Module):
    """A projection of low rank from tokens to heads, float32: `LowRank("NH", rank, D=D, N=N, H=H, rngs=rngs)`.

    With a bias, what depends on the data starts small beside it.
    """

    def __init__(
        self,
        dims: str,
        rank: int,
        bias: Float[Array, "N X"] | None = None,
        *,
        activation: Callable[[jax.Array], jax.Array] = lambda x: x,
        rngs: nnx.Rngs,
        **sizes: Any,
    ):
        self.activation = activation
        self.down_proj = Einsum("BTD,DR->BTR", R=rank, rngs=rngs, **sizes)
        self.up_proj = Einsum(f"BTR,R{dims}->BT{dims}", R=rank, rngs=rngs, **sizes)
        self.bias = None if bias is None else nnx.Param(shard(bias, dims))
        if bias is not None:
            self.up_proj.kernel[...] *= 0.1

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N X"]:
        y_BTNX = self.up_proj(self.activation(self.down_proj(x))).astype(jnp.float32)
        return y_BTNX if self.bias is None else y_BTNX + self.bias[...]


class RWKV7(SharingMixer):
    def __init__(self, cfg: RWKV7Config, d_model: int, *, rngs: nnx.Rngs):
        D, N, H, P = d_model, cfg.num_heads, cfg.key_dim, cfg.value_dim
        self.cfg = cfg
        # Everything starts as in the authors' first layer. What is mixed: the inputs of queries, decays, keys, values,
        # rates and gates; channels go from the token before to the token itself.
        powers = jnp.array([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])[:, None]
        self.mix = nnx.Param(1 - (jnp.arange(D) / D) ** powers)
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj.kernel[...] *= 0.1
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        ramp = lambda low, high, width: jnp.linspace(low, high, N * width).reshape(N, width)
        bend = jnp.linspace(-1.0, 1.0, H) * jnp.abs(jnp.linspace(-1.0, 1.0, H))  # Within each head.
        keys, values = {"D": D, "N": N, "H": H, "rngs": rngs}, {"D": D, "N": N, "P": P, "rngs": rngs}
        self.decay = LowRank("NH", cfg.decay_rank, ramp(-5.5, 0.5, H) + 2.5 * bend, activation=jnp.tanh, **keys)
        self.rate = LowRank("NH", cfg.rate_rank, ramp(-0.39, 0.01, H) + 0.3 * bend, **keys)
        self.gate = LowRank("NP", cfg.gate_rank, activation=jax.nn.sigmoid, **values)
        share = lambda rank: LowRank("NP", rank, ramp(0.93, 0.53, P), **values)
        self.first_share = None if cfg.value_rank is None else share(cfg.value_rank)
        self.replaced_scale = nnx.Param(shard(ramp(0.76, 0.66, H), "NH"))
        self.rate_scale = nnx.Param(shard(jnp.full((N, H), 1.02), "NH"))
        self.bonus = nnx.Param(shard(jnp.full((N, H), -0.04), "NH"))
        self.norm_scale = nnx.Param(shard(jnp.ones((N, P), jnp.float32), "NP"))
        self.norm_bias = nnx.Param(shard(jnp.zeros((N, P), jnp.float32), "NP"))
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> RWKV7State:
        del max_len  # The state does not grow.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim)
        return RWKV7State(
            S=shard(jnp.zeros(shape, jnp.float32), "BNHP"),
            x=shard(jnp.zeros((batch_size, 1, self.mix.shape[-1]), dtype), "BWD"),
        )

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: forget, read what is replaced, replace it, write, read.
        return 9.0 * self.cfg.num_heads * self.cfg.key_dim * self.cfg.value_dim

    @jax.named_scope("rwkv7")
    def share(
        self,
        x: Float[Array, "B T D"],
        state: RWKV7State | None,
        shared: Shared,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RWKV7State | None, Shared]:
        before_BTD, last_BWD = token_before(x, state and state.x, segment_ids=segment_ids)
        mix_MD = self.mix[...].astype(x.dtype)
        mixed = [x + (before_BTD - x) * mix_D for mix_D in mix_MD]
        for_q, for_decay, for_k, for_v, for_rate, for_gate = mixed

        # Decays lie in [exp(-exp(-1/2)), 1].
        g_BTNH = -jnp.exp(-0.5) * jax.nn.sigmoid(self.decay(for_decay))
        rate_BTNH = jax.nn.sigmoid(self.rate(for_rate))
        q_BTNH, k_BTNH, v_BTNP = self.q_proj(for_q), self.k_proj(for_k), self.v_proj(for_v)
        if self.first_share is None:
            shared = {**shared, "rwkv7_values": v_BTNP}
        elif "rwkv7_values" not in shared:
            raise ValueError(
                "an RWKV7 with value_rank mixes in the first layer's values: put one without into the prefix"
            )
        else:
            share_BTNP = jax.nn.sigmoid(self.first_share(for_v))
            v_BTNP = v_BTNP + (share_BTNP * (shared["rwkv7_values"] - v_BTNP)).astype(x.dtype)

        # Each token replaces, at its rates, what the state holds for one key, and writes another.
        replaced_BTNH = unit_normalize(k_BTNH.astype(jnp.float32) * self.replaced_scale[...], eps=1e-12)
        k_BTNH = (k_BTNH * (1 + (rate_BTNH - 1) * self.rate_scale[...])).astype(x.dtype)
        a_BTNH, b_BTNH = -replaced_BTNH.astype(x.dtype), (rate_BTNH * replaced_BTNH).astype(x.dtype)

        def op(q, k, v, a, b, g, state, segment_ids):
            return context.generalized_delta_rule(q, k, v, a, b, g, state=state, segment_ids=segment_ids, scale=1.0)

        run = per_shard(op, "BTNH,BTNH,BTNP,BTNH,BTNH,BTNH,BNHP,BT", "BTNP,BNHP", split_tokens=True)
        o_BTNP, S_BNHP = run(q_BTNH, k_BTNH, v_BTNP, a_BTNH, b_BTNH, g_BTNH, state and state.S, segment_ids)

        # The authors' epsilon, 1e-5 for each of 64 channels.
        o_BTNP = layer_normalize(o_BTNP.astype(jnp.float32), eps=64e-5) * self.norm_scale[...] + self.norm_bias[...]
        itself_BTN1 = jnp.sum(self.bonus[...] * q_BTNH * k_BTNH, axis=-1, keepdims=True)
        o_BTNP = (o_BTNP + itself_BTN1 * v_BTNP) * self.gate(for_gate)
        return self.o_proj(o_BTNP.astype(x.dtype)), state and RWKV7State(S_BNHP, last_BWD), shared
