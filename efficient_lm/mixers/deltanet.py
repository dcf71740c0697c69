"""DeltaNet: a matrix memory that overwrites what it holds for a key (https://arxiv.org/abs/2406.06484)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, RMSNorm, ShortConv, unit_normalize
from efficient_lm.mixers.base import HeadsMixer, Leaf, MixerConfig
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(MixerConfig):
    num_heads: int
    key_dim: int
    """Width of a head's keys: rows of its state."""
    value_dim: int
    """Width of a head's values: columns of its state."""
    conv_size: int | None = 4
    """Tokens that the convolutions of queries, keys and values see; None: there are none, only their SiLU."""
    beta_max: float = 1.0
    """Largest writing strength; 2 permits negative eigenvalues (https://arxiv.org/abs/2411.12537)."""
    norm_eps: float = 1e-6
    """Added to the mean square of a head's output before the norm divides by its root."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "DeltaNet":
        return DeltaNet(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaNetState:
    S: Leaf  # BNHP
    q_conv: Leaf  # BWNH, or None without convolutions
    k_conv: Leaf  # BWNH
    v_conv: Leaf  # BWNP


class DeltaNet(HeadsMixer):
    def __init__(self, cfg: DeltaNetConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, H, P = d_model, cfg.num_heads, cfg.key_dim, cfg.value_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        W = cfg.conv_size
        self.q_conv = None if W is None else ShortConv("BTNH", width=W, N=N, H=H, rngs=rngs)
        self.k_conv = None if W is None else ShortConv("BTNH", width=W, N=N, H=H, rngs=rngs)
        self.v_conv = None if W is None else ShortConv("BTNP", width=W, N=N, P=P, rngs=rngs)
        self.beta_proj = Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.norm = RMSNorm(P, eps=cfg.norm_eps)
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> DeltaNetState:
        del max_len  # The state does not grow.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim)
        convs = [conv and conv.init_state(batch_size, dtype) for conv in (self.q_conv, self.k_conv, self.v_conv)]
        return DeltaNetState(shard(jnp.zeros(shape, jnp.float32), "BNHP"), *convs)

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: read for the key, write, read for the query.
        return 6.0 * self.cfg.num_heads * self.cfg.key_dim * self.cfg.value_dim

    @jax.named_scope("deltanet")
    def heads(
        self,
        x: Float[Array, "B T D"],
        state: DeltaNetState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T N P"], DeltaNetState | None]:
        def activate(conv: ShortConv | None, x: jax.Array, conv_state: Leaf) -> tuple[jax.Array, Leaf]:
            return (jax.nn.silu(x), None) if conv is None else conv(x, conv_state, segment_ids=segment_ids)

        q_BTNH, q_conv = activate(self.q_conv, self.q_proj(x), state and state.q_conv)
        k_BTNH, k_conv = activate(self.k_conv, self.k_proj(x), state and state.k_conv)
        v_BTNP, v_conv = activate(self.v_conv, self.v_proj(x), state and state.v_conv)
        beta_BTN = self.cfg.beta_max * jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32))

        def op(q, k, v, beta, state, segment_ids):
            return context.delta_rule(q, k, v, beta, state=state, segment_ids=segment_ids)

        run = per_shard(op, "BTNH,BTNH,BTNP,BTN,BNHP,BT", "BTNP,BNHP", split_tokens=True)
        q_BTNH, k_BTNH = unit_normalize(q_BTNH), unit_normalize(k_BTNH)
        o_BTNP, S_BNHP = run(q_BTNH, k_BTNH, v_BTNP, beta_BTN, state and state.S, segment_ids)
        return self.norm(o_BTNP), state and DeltaNetState(S_BNHP, q_conv, k_conv, v_conv)
