"""MesaNet: at every token, the best linear map from keys to values so far (https://arxiv.org/abs/2506.05233).

Ridge regression in context: `o = V^T (A + Diag(ridge))^-1 q`, where A and V are states of linear attention that hold
what keys say of keys, and of values. The system is solved by conjugate gradients. A product of every token's query with
every token's A is linear attention too: no A is ever made but at the borders of chunks.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from efficient_lm import context
from efficient_lm.layers import Einsum, RMSNorm, ShortConv, unit_normalize
from efficient_lm.mixers.base import Leaf, Mixer, MixerConfig
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class MesaNetConfig(MixerConfig):
    num_heads: int
    key_dim: int
    """Width of a head's keys."""
    value_dim: int
    """Width of a head's values."""
    num_iterations: int = 30
    """Of conjugate gradients, for each token; key_dim of them are exact but for rounding."""
    ridge_min: float = 0.25
    """Smallest ridge of a channel, which starts at 1: the smaller, the more iterations it takes."""
    conv_size: int = 4
    norm_eps: float = 1e-6
    """Added to the mean square of a head's output before the norm divides by its root."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MesaNet":
        if not 0 < self.ridge_min < 1:
            raise ValueError(f"ridge_min={self.ridge_min} must be between 0 and 1, where ridges start")
        return MesaNet(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MesaNetState:
    A: Leaf  # BNHH: keys times keys
    V: Leaf  # BNHP: keys times values
    q_conv: Leaf  # BWNH
    k_conv: Leaf  # BWNH


class MesaNet(Mixer):
    def __init__(self, cfg: MesaNetConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, H, P = d_model, cfg.num_heads, cfg.key_dim, cfg.value_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.q_conv = ShortConv("BTNH", width=cfg.conv_size, N=N, H=H, rngs=rngs)
        self.k_conv = ShortConv("BTNH", width=cfg.conv_size, N=N, H=H, rngs=rngs)
        self.beta_proj = Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.beta_bias = nnx.Param(shard(jnp.zeros((N,), jnp.float32), "N"))
        self.decay_proj = Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.decay_bias = nnx.Param(shard(jnp.zeros((N,), jnp.float32), "N"))
        inverse_softplus = math.log(math.expm1(1.0 - cfg.ridge_min))
        self.ridge = nnx.Param(shard(jnp.full((N, H), inverse_softplus, jnp.float32), "NH"))
        self.norm = RMSNorm(P, eps=cfg.norm_eps)
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> MesaNetState:
        del max_len  # The state does not grow.
        N, H, P = self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim
        A, V = (jnp.zeros((batch_size, N, H, columns), jnp.float32) for columns in (H, P))
        convs = [conv.init_state(batch_size, dtype) for conv in (self.q_conv, self.k_conv)]
        return MesaNetState(shard(A, "BNHH"), shard(V, "BNHP"), *convs)

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        N, H, P = self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim
        # Per entry of the states: forget and write; A is read in every iteration, V once.
        return N * H * (3.0 * (H + P) + 2.0 * H * self.cfg.num_iterations + 2.0 * P)

    @jax.named_scope("mesanet")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MesaNetState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MesaNetState | None]:
        q_BTNH, q_conv = self.q_conv(self.q_proj(x), state and state.q_conv, segment_ids=segment_ids)
        k_BTNH, k_conv = self.k_conv(self.k_proj(x), state and state.k_conv, segment_ids=segment_ids)
        beta_BTN = jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32) + self.beta_bias[...])
        g_BTN = jax.nn.log_sigmoid(self.decay_proj(x).astype(jnp.float32) + self.decay_bias[...])
        ridge_NH = jax.nn.softplus(self.ridge[...]) + self.cfg.ridge_min

        run = per_shard(
            functools.partial(_regression, self.cfg.num_iterations),
            "BTNH,BTNH,BTNP,BTN,BTN,NH,BNHH,BNHP,BT",
            "BTNP,BNHH,BNHP",
            split_tokens=True,
        )
        # In float32: conjugate gradients amplify what is rounded.
        q_BTNH, k_BTNH = (unit_normalize(x.astype(jnp.float32)) for x in (q_BTNH, k_BTNH))
        states = state and state.A, state and state.V
        o_BTNP, A, V = run(q_BTNH, k_BTNH, self.v_proj(x), beta_BTN, g_BTN, ridge_NH, *states, segment_ids)
        y_BTD = self.o_proj(self.norm(o_BTNP.astype(x.dtype)))
        return y_BTD, state and MesaNetState(A, V, q_conv, k_conv)


def _regression(num_iterations, q_BTNH, k_BTNH, v_BTNP, beta_BTN, g_BTN, ridge_NH, A_BNHH, V_BNHP, ids_BT):
    write_BTNH = beta_BTN[..., None] * k_BTNH
    # Every iteration reads the state that comes in: tokens in parts find it once.
    entering_BNHH, A_BNHH = context.linear_attention_states(write_BTNH, k_BTNH, g_BTN, state=A_BNHH, segment_ids=ids_BT)
    x_BTNH = _solve(num_iterations, q_BTNH, (write_BTNH, k_BTNH, g_BTN, ridge_NH, entering_BNHH, ids_BT))
    o_BTNP, V_BNHP = context.linear_attention(
        x_BTNH, write_BTNH, v_BTNP, g_BTN, state=V_BNHP, segment_ids=ids_BT, scale=1.0
    )
    return o_BTNP, A_BNHH, V_BNHP


def _product(x_BTNH, system):
    """Returns (A + Diag(ridge)) x, with every token's own A."""
    write_BTNH, k_BTNH, g_BTN, ridge_NH, A_BNHH, ids_BT = system
    y_BTNH, _ = kernels.linear_attention(x_BTNH, write_BTNH, k_BTNH, g_BTN, state=A_BNHH, segment_ids=ids_BT, scale=1.0)
    return y_BTNH + ridge_NH * x_BTNH


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(num_iterations, y_BTNH, system):
    """Returns the x whose product is y, by conjugate gradients; differentiated as the solution, not through them."""
    dot = lambda a_BTNH, b_BTNH: jnp.sum(a_BTNH * b_BTNH, axis=-1, keepdims=True)
    ratio = lambda a, b: a / jnp.maximum(b, 1e-30)  # Both are 0 where there is nothing left to do.

    def step(_, carry):
        x_BTNH, rest_BTNH, direction_BTNH, square_BTN1 = carry
        image_BTNH = _product(direction_BTNH, system)
        length_BTN1 = ratio(square_BTN1, dot(direction_BTNH, image_BTNH))
        x_BTNH += length_BTN1 * direction_BTNH
        rest_BTNH -= length_BTN1 * image_BTNH
        new_BTN1 = dot(rest_BTNH, rest_BTNH)
        return x_BTNH, rest_BTNH, rest_BTNH + ratio(new_BTN1, square_BTN1) * direction_BTNH, new_BTN1

    start = (jnp.zeros_like(y_BTNH), y_BTNH, y_BTNH, dot(y_BTNH, y_BTNH))
    return jax.lax.fori_loop(0, num_iterations, step, start)[0]


def _solve_forward(num_iterations, y_BTNH, system):
    x_BTNH = _solve(num_iterations, y_BTNH, system)
    return x_BTNH, (x_BTNH, system)


def _solve_backward(num_iterations, residuals, dx_BTNH):
    x_BTNH, (*arrays, ids_BT) = residuals
    dy_BTNH = _solve(num_iterations, dx_BTNH, (*arrays, ids_BT))  # The system is symmetric.
    _, vjp = jax.vjp(lambda *arrays: _product(x_BTNH, (*arrays, ids_BT)), *arrays)
    return dy_BTNH, (*vjp(-dy_BTNH), None)


_solve.defvjp(_solve_forward, _solve_backward)
