"""S4D: every channel filtered by a diagonal state-space model with complex poles (https://arxiv.org/abs/2206.11893).

A channel u is the input of H oscillators, of which it reads the real part of a mixture:

    h' = exp(dt A) h + u        y = 2 Re(sum_h C (exp(dt A) - 1) / A h) + skip u

which is A's continuous system, its input constant for a step dt (zero-order hold) and its input weights in C. Poles,
weights and step sizes are the same for all tokens. As a recurrence the oscillators of all tokens are 2 H numbers a
channel: they are made for a few channels at a time, and again for the backward pass.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum
from efficient_lm.mixers.base import Leaf, Mixer, MixerConfig
from efficient_lm.sharding import per_shard, shard

NUM_OSCILLATORS = 4096  # At a time: enough lanes for a TPU, and a small part of a wide layer's.


@dataclasses.dataclass(frozen=True, kw_only=True)
class S4DConfig(MixerConfig):
    state_size: int = 32
    """Oscillators of a channel: pairs of conjugate poles, N / 2 in the paper."""
    dt_min: float = 1e-3
    """Step sizes start between `dt_min` and `dt_max`; a channel's memory is about 2 / dt tokens long."""
    dt_max: float = 1e-1

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "S4D":
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} and dt_max={self.dt_max} do not bound step sizes")
        return S4D(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class S4DState:
    h: Leaf  # BFH, complex


class S4D(Mixer):
    """The channels of the model are those of the filters, F, and are split over `model` between the two."""

    def __init__(self, cfg: S4DConfig, d_model: int, *, rngs: nnx.Rngs):
        D, F, H = d_model, d_model, cfg.state_size
        self.cfg, self.width = cfg, F
        log_dt_F = jax.random.uniform(rngs.params(), (F,), jnp.float32, math.log(cfg.dt_min), math.log(cfg.dt_max))
        self.log_dt = nnx.Param(shard(log_dt_F, "F"))
        # S4D-Lin: decays of 1/2, frequencies pi h.
        self.log_decay = nnx.Param(shard(jnp.full((F, H), math.log(0.5), jnp.float32), "FH"))
        self.frequency = nnx.Param(shard(jnp.broadcast_to(jnp.pi * jnp.arange(H, dtype=jnp.float32), (F, H)), "FH"))
        # Real and imaginary part, of variance 1/2 each: optimizers take them for two real numbers.
        C_FH2 = jax.random.normal(rngs.params(), (F, H, 2), jnp.float32) * 0.5**0.5
        self.C = nnx.Param(shard(C_FH2, "FHR"))
        self.skip = nnx.Param(shard(jax.random.normal(rngs.params(), (F,), jnp.float32), "F"))
        self.o_proj = Einsum("BTF,FD->BTD", F=F, D=D, rngs=rngs)
        self.o_bias = nnx.Param(jnp.zeros((D,), jnp.float32))
        self.gate_proj = Einsum("BTF,FD->BTD", F=F, D=D, rngs=rngs)
        self.gate_bias = nnx.Param(jnp.zeros((D,), jnp.float32))

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> S4DState:
        del max_len, dtype  # The state does not grow, and keeps no activations.
        return S4DState(shard(jnp.zeros((batch_size, self.width, self.cfg.state_size), jnp.complex64), "BFH"))

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per oscillator: a complex product and a sum, and the real part of another product.
        return 13.0 * self.width * self.cfg.state_size

    @jax.named_scope("s4d")
    def __call__(
        self, x: Float[Array, "B T D"], state: S4DState | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], S4DState | None]:
        run = per_shard(_filter, "BTF,F,FH,FH,FHR,F,BFH,BT", "BTF,BFH", split_tokens=True)
        weights = [p[...] for p in (self.log_dt, self.log_decay, self.frequency, self.C, self.skip)]
        y_BTF, h_BFH = run(shard(x, "BTF"), *weights, state and state.h, segment_ids)
        y_BTF = jax.nn.gelu(y_BTF, approximate=False).astype(x.dtype)
        o_BTD = self.o_proj(y_BTF) + self.o_bias[...].astype(x.dtype)
        gate_BTD = self.gate_proj(y_BTF) + self.gate_bias[...].astype(x.dtype)
        return o_BTD * jax.nn.sigmoid(gate_BTD), state and S4DState(h_BFH)


def _filter(u_BTF, log_dt_F, log_decay_FH, frequency_FH, C_FH2, skip_F, h_BFH, segment_ids):
    B, F, H = u_BTF.shape[0], *log_decay_FH.shape
    size = max(d for d in range(1, F + 1) if F % d == 0 and (d == 1 or d * H <= NUM_OSCILLATORS))
    if h_BFH is None:
        h_BFH = jnp.zeros((B, F, H), jnp.complex64)

    def groups(x, axis):
        return jnp.moveaxis(x.reshape(*x.shape[:axis], F // size, size, *x.shape[axis + 1 :]), axis, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # Steps of a loop are not merged.
    def run(group):
        u_BTG, log_dt_G, log_decay_GH, frequency_GH, C_GH2, h_BGH = group
        A_GH = jax.lax.complex(-jnp.exp(log_decay_GH), frequency_GH)
        dtA_GH = jnp.exp(log_dt_G)[:, None] * A_GH
        mix_GH = 2 * jax.lax.complex(C_GH2[..., 0], C_GH2[..., 1]) * jnp.expm1(dtA_GH) / A_GH
        u_BTGH = jnp.broadcast_to(u_BTG[..., None], (*u_BTG.shape, H)).astype(jnp.complex64)
        h_BTGH, h_BGH = context.diagonal_scan(jnp.exp(dtA_GH), u_BTGH, state=h_BGH, segment_ids=segment_ids)
        return jnp.sum(h_BTGH.real * mix_GH.real - h_BTGH.imag * mix_GH.imag, axis=-1), h_BGH

    u_BTF = u_BTF.astype(jnp.float32)
    weights = (groups(w, 0) for w in (log_dt_F, log_decay_FH, frequency_FH, C_FH2))
    y, h = jax.lax.map(run, (groups(u_BTF, 2), *weights, groups(h_BFH, 1)))
    return jnp.moveaxis(y, 0, 2).reshape(u_BTF.shape) + skip_F * u_BTF, jnp.moveaxis(h, 0, 1).reshape(h_BFH.shape)
