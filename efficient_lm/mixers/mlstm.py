"""mLSTM: linear attention with exponential input gates (https://arxiv.org/abs/2405.04517).

The layer is that of xLSTM 7B (https://arxiv.org/abs/2503.13427). For one head and one token, i and f being the gates:

    S = f S + exp(i) k v^T,   n = f n + exp(i) k,   o = S^T q / max(|n . q|, 1)

exp(i) would overflow: the state is kept as exp(-m) S and exp(-m) n, where m = max(log f + m, i, 0) follows the largest
weight in it. No weight then exceeds one, the recurrence is one of linear attention,

    exp(-m) S = exp(log f + m_before - m) exp(-m_before) S + exp(i - m) k v^T,

and the 1 in the denominator becomes exp(-m). n is what S is for values of one: a column more.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.layers import Einsum, layer_normalize
from efficient_lm.mixers.base import Leaf, Mixer, MixerConfig
from efficient_lm.sharding import per_shard, shard
from pallas_kernels.common.documents import fill_padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLSTMConfig(MixerConfig):
    num_heads: int
    key_dim: int
    """Width of a head's keys: rows of its state. xLSTM 7B takes d_model / (2 * num_heads)."""
    value_dim: int
    """Width of a head's values: columns of its state, but for the one that sums the keys. xLSTM 7B takes
    d_model / num_heads."""
    gate_soft_cap: float | None = 15.0
    """Gates before their activation are capped to gate_soft_cap * tanh(gate / gate_soft_cap)."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MLSTM":
        return MLSTM(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLSTMState:
    S: Leaf  # BNHP, P = value_dim + 1
    """What the paper calls C and, in the last column, n; both times exp(-m)."""
    m: Leaf  # BN


class MLSTM(Mixer):
    def __init__(self, cfg: MLSTMConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, H, P = d_model, cfg.num_heads, cfg.key_dim, cfg.value_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        # Input gates start nearly shut, forget gates nearly open.
        self.input_proj = Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.input_bias = nnx.Param(shard(jnp.full((N,), -10.0), "N"))
        self.forget_proj = Einsum("BTD,DN->BTN", D=D, N=N, rngs=rngs)
        self.forget_bias = nnx.Param(shard(jnp.linspace(3.0, 6.0, N), "N"))
        self.gate_proj = Einsum("BTD,DNP->BTNP", D=D, N=N, P=P, rngs=rngs)
        self.norm_scale = nnx.Param(shard(jnp.ones((N, P), jnp.float32), "NP"))
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=P, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> MLSTMState:
        del max_len, dtype  # The state does not grow, and keeps no activations.
        shape = (batch_size, self.cfg.num_heads, self.cfg.key_dim, self.cfg.value_dim + 1)
        return MLSTMState(
            S=shard(jnp.zeros(shape, jnp.float32), "BNHP"), m=shard(jnp.zeros(shape[:2], jnp.float32), "BN")
        )

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        # Per entry of the state: forget, write, read.
        return 5.0 * self.cfg.num_heads * self.cfg.key_dim * (self.cfg.value_dim + 1)

    @jax.named_scope("mlstm")
    def __call__(
        self, x: Float[Array, "B T D"], state: MLSTMState | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], MLSTMState | None]:
        i_BTN = self._capped(self.input_proj(x).astype(jnp.float32) + self.input_bias[...])
        f_BTN = self._capped(self.forget_proj(x).astype(jnp.float32) + self.forget_bias[...])

        run = per_shard(mlstm, "BTNH,BTNH,BTNP,BTN,BTN,BNHP,BN,BT", "BTNP,BNHP,BN", split_tokens=True)
        q_BTNH, k_BTNH, v_BTNP = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        o_BTNP, S_BNHP, m_BN = run(
            q_BTNH, k_BTNH, v_BTNP, i_BTN, jax.nn.log_sigmoid(f_BTN), state and state.S, state and state.m, segment_ids
        )

        o_BTNP = layer_normalize(o_BTNP, eps=1e-6) * self.norm_scale[...]
        o_BTNP = o_BTNP * jax.nn.sigmoid(self.gate_proj(x).astype(jnp.float32))
        return self.o_proj(o_BTNP.astype(x.dtype)), state and MLSTMState(S_BNHP, m_BN)

    def _capped(self, gate_BTN: jax.Array) -> jax.Array:
        cap = self.cfg.gate_soft_cap
        return gate_BTN if cap is None else cap * jnp.tanh(gate_BTN / cap)


def mlstm(q_BTNH, k_BTNH, v_BTNP, i_BTN, log_f_BTN, S_BNHP, m_BN, segment_ids):
    """Returns float32 outputs and the state. S, m and segment_ids may be None."""
    if context.num_parts() > 1:
        m_BN, last_BN = _handed_on(i_BTN, log_f_BTN, m_BN, segment_ids)
        g_BTN, write_BTN, m_BTN, _ = _stabilized(i_BTN, log_f_BTN, m_BN, segment_ids)
    else:
        g_BTN, write_BTN, m_BTN, last_BN = _stabilized(i_BTN, log_f_BTN, m_BN, segment_ids)
    k_BTNH = (k_BTNH * write_BTN[..., None]).astype(k_BTNH.dtype)
    v_BTNP = jnp.concatenate([v_BTNP, jnp.ones_like(v_BTNP[..., :1])], axis=-1)
    o_BTNP, S_BNHP = context.linear_attention(q_BTNH, k_BTNH, v_BTNP, g_BTN, state=S_BNHP, segment_ids=segment_ids)
    o_BTNP = o_BTNP.astype(jnp.float32)
    # The authors' small number, for the case that both vanish.
    total_BTN1 = jnp.maximum(jnp.abs(o_BTNP[..., -1:]), jnp.exp(-m_BTN)[..., None]) + 1e-6
    return o_BTNP[..., :-1] / total_BTN1, S_BNHP, last_BN


def _handed_on(i_BTN, log_f_BTN, m_BN, segment_ids):
    """Returns m before the part's tokens, and after those of all parts: max(all of log_f + m, what it is from 0 on)."""
    ids_BT = jnp.ones(i_BTN.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    own_BN = _stabilized(i_BTN, log_f_BTN, None, ids_BT)[3]
    forget_BN = jax.lax.stop_gradient(jnp.sum(jnp.where(ids_BT[..., None] > 0, log_f_BTN, 0), axis=1))
    return context.hand_on(own_BN, forget_BN, ids_BT, m_BN, apply=jnp.add, join=jnp.maximum)


def _stabilized(i_BTN, log_f_BTN, m_BN, segment_ids):
    """Returns log-decays, the weights of what is written, m for each token, and the last one."""
    forget_BTN, enter_BTN = log_f_BTN, jnp.maximum(i_BTN, 0)
    if segment_ids is not None and segment_ids.shape[1]:
        ids_BT, is_real_BT1 = fill_padding(segment_ids), (segment_ids > 0)[..., None]
        starts_BT1 = (jnp.diff(ids_BT, axis=1, prepend=ids_BT[:, :1]) != 0)[..., None]
        i_BTN = jnp.where(is_real_BT1, i_BTN, -jnp.inf)
        forget_BTN = jnp.where(starts_BT1, -jnp.inf, jnp.where(is_real_BT1, log_f_BTN, 0))
        enter_BTN = jnp.where(is_real_BT1, enter_BTN, -jnp.inf)

    def then(left, right):
        return left[0] + right[0], jnp.maximum(left[1] + right[0], right[1])

    # m = max(forget + m, enter), from the given m on: S positions, one more than tokens.
    m_B1N = jnp.zeros_like(i_BTN, shape=(i_BTN.shape[0], 1, i_BTN.shape[2])) if m_BN is None else m_BN[:, None]
    forget_BSN = jnp.concatenate([jnp.zeros_like(m_B1N), forget_BTN], axis=1)
    enter_BSN = jnp.concatenate([m_B1N, enter_BTN], axis=1)
    # The outputs do not depend on m, which may be any number that is large enough.
    m_BSN = jax.lax.stop_gradient(jax.lax.associative_scan(then, (forget_BSN, enter_BSN), axis=1)[1])
    before_BTN, m_BTN = m_BSN[:, :-1], m_BSN[:, 1:]
    # log_f + before - m is at most 0, and exactly 0 where m did not come from this token, however the scan rounds:
    # over thousands of tokens, small errors of one sign would add up.
    lift_BTN = jnp.where(m_BTN > enter_BTN, -log_f_BTN, jnp.minimum(before_BTN - m_BTN, -log_f_BTN))
    return log_f_BTN + jax.lax.stop_gradient(lift_BTN), jnp.exp(i_BTN - m_BTN), m_BTN, m_BSN[:, -1]
