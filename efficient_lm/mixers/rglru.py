"""Griffin's recurrent block: a short convolution and a gated linear recurrence (https://arxiv.org/abs/2402.19427)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, ShortConv
from efficient_lm.mixers.base import Leaf, Mixer, MixerConfig
from efficient_lm.rotary import document_positions
from efficient_lm.sharding import per_shard, shard

# Decays are a ** (8 * gate).
_GATE_SCALE = 8.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RGLRUConfig(MixerConfig):
    width: int
    """Channels of the recurrence. The paper takes about 4 / 3 of d_model."""
    num_heads: int
    """Blocks of the gates' block-diagonal matrices."""
    conv_size: int = 4

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "RGLRU":
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        return RGLRU(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RGLRUState:
    h: Leaf  # BF
    conv: Leaf  # BWF
    is_new: Leaf  # B, whether the document has had no token yet


class RGLRU(Mixer):
    def __init__(self, cfg: RGLRUConfig, d_model: int, *, rngs: nnx.Rngs):
        D, F, N, H = d_model, cfg.width, cfg.num_heads, cfg.width // cfg.num_heads
        self.cfg = cfg
        bias = lambda dims, **sizes: nnx.Param(shard(jnp.zeros([sizes[d] for d in dims], jnp.float32), dims))
        self.x_proj = Einsum("BTD,DF->BTF", D=D, F=F, rngs=rngs)
        self.x_bias = bias("F", F=F)
        self.conv = ShortConv("BTF", width=cfg.conv_size, bias=True, activation=None, F=F, rngs=rngs)
        self.input_gate = Einsum("BTNH,NHP->BTNP", N=N, H=H, P=H, rngs=rngs)
        self.input_gate_bias = bias("NP", N=N, P=H)
        self.decay_gate = Einsum("BTNH,NHP->BTNP", N=N, H=H, P=H, rngs=rngs)
        self.decay_gate_bias = bias("NP", N=N, P=H)
        # A gate that is open leaves a ** 8, between 0.9 and 0.999: softplus(decay) is -log(a).
        radius_F = jax.random.uniform(rngs.params(), (F,), jnp.float32, 0.9, 0.999)
        self.decay = nnx.Param(shard(jnp.log(jnp.expm1(-jnp.log(radius_F) / _GATE_SCALE)), "F"))
        self.gate_proj = Einsum("BTD,DF->BTF", D=D, F=F, rngs=rngs)
        self.gate_bias = bias("F", F=F)
        self.o_proj = Einsum("BTF,FD->BTD", F=F, D=D, rngs=rngs)
        self.o_bias = nnx.Param(jnp.zeros((D,), jnp.float32))

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> RGLRUState:
        del max_len  # The state does not grow.
        h_BF = shard(jnp.zeros((batch_size, self.cfg.width), jnp.float32), "BF")
        return RGLRUState(h_BF, self.conv.init_state(batch_size, dtype), shard(jnp.ones((batch_size,), bool), "B"))

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per channel: forget and write.
        return 3.0 * self.cfg.width

    @jax.named_scope("rglru")
    def __call__(
        self, x: Float[Array, "B T D"], state: RGLRUState | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], RGLRUState | None]:
        ids_BT = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        # Of the document that goes on, it matters only whether a token came before.
        positions_BT, length_B = document_positions(ids_BT, None if state is None else 1 - state.is_new)
        starts_BT = (ids_BT > 0) & (positions_BT == 0)
        x_BTF = self.x_proj(x) + self.x_bias[...].astype(x.dtype)
        x_BTF, conv = self.conv(x_BTF, state and state.conv, segment_ids=segment_ids)

        gates = self.input_gate, self.input_gate_bias, self.decay_gate, self.decay_gate_bias
        weights = [p.kernel[...] if isinstance(p, Einsum) else p[...] for p in gates]
        run = per_shard(_recurrence, "BTF,NHP,NP,NHP,NP,F,BT,BF,BT", "BTF,BF", split_tokens=True)
        h_BTF, h_BF = run(x_BTF, *weights, self.decay[...], starts_BT, state and state.h, segment_ids)

        gate_BTF = jax.nn.gelu(self.gate_proj(x) + self.gate_bias[...].astype(x.dtype))
        y_BTD = self.o_proj(h_BTF * gate_BTF) + self.o_bias[...].astype(x.dtype)
        return y_BTD, state and RGLRUState(h_BF, conv, length_B == 0)


def _recurrence(x_BTF, w_input_NHP, b_input_NP, w_decay_NHP, b_decay_NP, decay_F, starts_BT, h_BF, segment_ids):
    """Real-gated linear recurrent unit. Heads, like channels, are those of one device."""
    x_BTNH = x_BTF.reshape(*x_BTF.shape[:2], *w_input_NHP.shape[:2])

    def gate(w_NHP, b_NP):
        z_BTNP = jnp.einsum("BTNH,NHP->BTNP", x_BTNH, w_NHP.astype(x_BTF.dtype)).astype(jnp.float32)
        return jax.nn.sigmoid(z_BTNP + b_NP).reshape(x_BTF.shape)

    log_a_BTF = -_GATE_SCALE * gate(w_decay_NHP, b_decay_NP) * jax.nn.softplus(decay_F)
    # Keeps the size of what is remembered; a document's first token is remembered as it is. Where nothing is forgotten
    # the root's derivative would be infinite.
    scale_BTF = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a_BTF), 1e-12))
    scale_BTF = jnp.where(starts_BT[..., None], 1.0, scale_BTF)
    write_BTF = scale_BTF * gate(w_input_NHP, b_input_NP) * x_BTF
    h_BTF, h_BF = context.diagonal_scan(jnp.exp(log_a_BTF), write_BTF, state=h_BF, segment_ids=segment_ids)
    return h_BTF.astype(x_BTF.dtype), h_BF
