"""LoLCATs: softmax attention to the near, linear attention to all before, of one sum (https://arxiv.org/abs/2410.10254).

A query's weights, before they are divided by their sum, are, of the keys less than `window_size` from it,

    factor * exp(score - largest score in the window),    score = q . k / sqrt(H),    factor = sigmoid(learned),

and of all keys before these `phi_q(q) . phi_k(k)`, with Hedgehog's features (https://arxiv.org/abs/2402.04347)
`phi(x) = [softmax(W x), softmax(-W x)]`, W and the factor learned for each query head. Queries and keys are rotated
first. The largest score does not cancel, as it does in a softmax: it lowers the window's weights and not the others,
so it is part of the function and of its gradient. Nothing overflows by it, and the sum of the weights is at least the
factor.

This is the published code's window that slides, with which it also decodes. Its other one, which moves on by as many
tokens as it is wide, is not here: trained with that, it decodes another function.
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
from efficient_lm.mixers.base import HeadsMixer, Leaf, MixerConfig
from efficient_lm.rotary import RotaryConfig, document_positions, rotate
from efficient_lm.sharding import per_shard, shard
from pallas_kernels.common.documents import first_document


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoLCATsConfig(MixerConfig):
    num_heads: int
    num_kv_heads: int | None = None
    """Heads of keys and values; None: as many as there are query heads. Features are of each query head's own."""
    head_dim: int
    feature_dim: int
    """Rows of W; there are twice as many features. Published models have head_dim / 2 of 128."""
    window_size: int = 64
    """Tokens that a query sees by softmax attention, itself included."""
    window_factor: float = 0.5
    """What the factor of the window's weights is at first."""
    rotary: RotaryConfig | None = RotaryConfig()
    """None: no positions at all (NoPE)."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "LoLCATs":
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key/value head serves the same number of query heads"
            )
        if self.window_size < 1:
            raise ValueError(f"window_size is {self.window_size}; it counts the query itself, so it is at least 1")
        if not 0 < self.window_factor < 1:
            raise ValueError(f"window_factor is {self.window_factor}; a sigmoid gives numbers between 0 and 1")
        return LoLCATs(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoLCATsState:
    S: Leaf  # BNFP, P = head_dim + 1: its last column sums the features of the tokens that have left the window
    k: Leaf  # BLKH, the last tokens, in order, the latest at the end
    v: Leaf  # BLKP
    length: Leaf  # B
    """Tokens so far of the document that goes on."""


class LoLCATs(HeadsMixer):
    def __init__(self, cfg: LoLCATsConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, K, H, F = d_model, cfg.num_heads, cfg.num_kv_heads or cfg.num_heads, cfg.head_dim, cfg.feature_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DKP->BTKP", D=D, K=K, P=H, rngs=rngs)
        self.q_features = Einsum("BTNH,NHF->BTNF", N=N, H=H, F=F, rngs=rngs)
        self.k_features = Einsum("BTNH,NHF->BTNF", N=N, H=H, F=F, rngs=rngs)
        # As the published recipe starts: W lets through the first channels.
        for features in (self.q_features, self.k_features):
            features.kernel[...] = shard(jnp.broadcast_to(jnp.eye(H, F), (N, H, F)), "NHF")
        logit = math.log(cfg.window_factor / (1 - cfg.window_factor))
        self.window_logit = nnx.Param(shard(jnp.full((N,), logit, jnp.float32), "N"))
        self.o_proj = Einsum("BTNP,NPD->BTD", N=N, P=H, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> LoLCATsState:
        """Returns a window of no tokens, of at most `max_len`, and the state of those before it."""
        cfg, B, L = self.cfg, batch_size, min(self.cfg.window_size, max_len)
        K, H = cfg.num_kv_heads or cfg.num_heads, cfg.head_dim
        return LoLCATsState(
            S=shard(jnp.zeros((B, cfg.num_heads, 2 * cfg.feature_dim, H + 1), jnp.float32), "BNFP"),
            k=shard(jnp.zeros((B, L, K, H), dtype), "BLKH"),
            v=shard(jnp.zeros((B, L, K, H), dtype), "BLKP"),
            length=shard(jnp.zeros((B,), jnp.int32), "B"),
        )

    def flops_per_token(self, seq_len: int) -> float:
        cfg = self.cfg
        window = min(cfg.window_size, seq_len)
        # The first tokens see fewer than that, and no others.
        seen = window - window * (window - 1) / (2 * seq_len)
        # Per entry of the state: write, read.
        linear = 8.0 * cfg.feature_dim * (cfg.head_dim + 1) * (1 - window / seq_len)
        return cfg.num_heads * (4.0 * cfg.head_dim * seen + linear)

    @jax.named_scope("lolcats")
    def heads(
        self,
        x: Float[Array, "B T D"],
        state: LoLCATsState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T N P"], LoLCATsState | None]:
        cfg = self.cfg
        q_BTNH, k_BTKH, v_BTKP = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        ids_BT = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        positions_BT, length_B = document_positions(ids_BT, state and state.length)
        if cfg.rotary is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, positions_BT, cfg.rotary), rotate(k_BTKH, positions_BT, cfg.rotary)
        weights = self.q_features.kernel[...], self.k_features.kernel[...], self.window_logit[...]
        past = (None,) * 4 if state is None else (state.S, state.k, state.v, state.length)
        run = per_shard(
            functools.partial(_near_and_far, cfg.window_size, segment_ids is not None),
            "BTNH,BTKH,BTKP,BT,NHF,NHF,N,BNFP,BLKH,BLKP,B",
            "BTNP,BNFP,BLKH,BLKP",
            split_tokens=True,
        )
        o_BTNP, S, k, v = run(q_BTNH, k_BTKH, v_BTKP, ids_BT, *weights, *past)
        return o_BTNP, state and LoLCATsState(S, k, v, length_B)


def _near_and_far(
    window_size, has_padding, q_BTNH, k_BTKH, v_BTKP, ids_BT, q_features, k_features, window_logit_N, S, k, v, length_B
):
    """Returns the outputs, the state of the tokens that have left the window, and the keys and values of the others."""
    T, N = q_BTNH.shape[1:3]
    keys, kv_ids_BS, slots = (k_BTKH, v_BTKP), None, 0
    if length_B is not None:
        keys = tuple(jnp.concatenate([a.astype(b.dtype), b], axis=1) for a, b in zip((k, v), keys, strict=True))
        # Where there is no token now, the window's still are somebody's: they stay.
        slots, first_B1 = k.shape[1], first_document(ids_BT)
        is_held_BL = jnp.arange(slots) >= slots - length_B[:, None]
        kv_ids_BS = jnp.concatenate([jnp.where(is_held_BL, first_B1, 0), ids_BT], axis=1)
    keys, places = context.gather_keys(keys, ids_BT, kv_ids_BS)
    kv_ids_BS = places.get("kv_segment_ids")
    (k_BSKH, v_BSKP), kv_ids_BS = keys, ids_BT if kv_ids_BS is None else kv_ids_BS

    order_BT = None
    if has_padding or length_B is not None or context.num_parts() > 1:
        # All padding first: then neighbours are neighbours.
        order_BT, order_BS = (jnp.argsort(ids > 0, axis=1, stable=True) for ids in (ids_BT, kv_ids_BS))
        q_BTNH, ids_BT = _take(q_BTNH, order_BT), _take(ids_BT, order_BT)
        k_BSKH, v_BSKP, kv_ids_BS = (_take(a, order_BS) for a in (k_BSKH, v_BSKP, kv_ids_BS))

    S_len = k_BSKH.shape[1]
    size = min(window_size, max(S_len, 1))
    near = jax.checkpoint(functools.partial(_window, size))
    near_BTNP, near_BTN = near(q_BTNH, k_BSKH, v_BSKP, ids_BT, kv_ids_BS)

    # A token's key and value come to the state when it leaves the window.
    late = lambda a: jnp.pad(a, ((0, 0), (size, 0), *((0, 0),) * (a.ndim - 2)))[:, S_len - T : S_len]
    wide = lambda a: jnp.repeat(a, N // a.shape[2], axis=2)
    is_old_BT = (late(kv_ids_BS) == ids_BT) & (ids_BT > 0)
    phi_k_BTNF = jnp.where(is_old_BT[..., None, None], _features(wide(late(k_BSKH)), k_features), 0)
    v_BTNP = wide(late(v_BSKP))
    v_BTNP = jnp.concatenate([v_BTNP, jnp.ones_like(v_BTNP[..., :1])], axis=-1)
    phi_q_BTNF = _features(q_BTNH, q_features)
    far_BTNP, S = context.linear_attention(phi_q_BTNF, phi_k_BTNF, v_BTNP, state=S, segment_ids=ids_BT, scale=1.0)

    factor_N = jax.nn.sigmoid(window_logit_N)
    sums_BTNP = factor_N[:, None] * near_BTNP + far_BTNP[..., :-1]
    total_BTN = factor_N * near_BTN + far_BTNP[..., -1]
    o_BTNP = sums_BTNP / jnp.where(ids_BT[..., None] > 0, total_BTN, 1)[..., None]
    if order_BT is not None:
        o_BTNP = _take(o_BTNP, jnp.argsort(order_BT, axis=1))
    held = lambda a, like: a[:, S_len - slots :].astype(a.dtype if like is None else like.dtype)
    return o_BTNP.astype(q_BTNH.dtype), S, held(k_BSKH, k), held(v_BSKP, v)


def _window(size, q_BTNH, k_BSKH, v_BSKP, ids_BT, kv_ids_BS):
    """Returns sums of values and of weights; the queries are the last of the tokens, of which each sees `size`.

    Queries go in blocks of no more than that, each with the keys that its queries see: a band of the T x S scores. They
    are made here, as `attention` gives the sum of the weights but not the largest score.
    """
    (B, T, N, H), (_, S, K, P) = q_BTNH.shape, v_BSKP.shape
    L = max(min(T, size), 1)
    C = -(-T // L)
    more = C * L - T

    def of_blocks(a, before, width, start):
        padded = jnp.pad(a, ((0, 0), (before, more), *((0, 0),) * (a.ndim - 2)))
        return padded[:, start + L * jnp.arange(C)[:, None] + jnp.arange(width)]

    q_BCLKGH = of_blocks(q_BTNH.reshape(B, T, K, N // K, H), 0, L, 0)
    k_BCXKH, v_BCXKP, kv_ids_BCX = (of_blocks(a, size - 1, L + size - 1, S - T) for a in (k_BSKH, v_BSKP, kv_ids_BS))
    ids_BCL1, ahead_LX = of_blocks(ids_BT, 0, L, 0)[..., None], jnp.arange(L + size - 1) - jnp.arange(L)[:, None]
    is_seen_BCLX = (kv_ids_BCX[:, :, None] == ids_BCL1) & (ids_BCL1 > 0) & (ahead_LX >= 0) & (ahead_LX < size)
    is_seen = is_seen_BCLX[:, :, None, None]
    scores = jnp.einsum("BCLKGH,BCXKH->BCKGLX", q_BCLKGH, k_BCXKH, preferred_element_type=jnp.float32) * H**-0.5
    scores = jnp.where(is_seen, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.where(is_seen, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0)
    sums = jnp.einsum("BCKGLX,BCXKP->BCLKGP", weights.astype(v_BSKP.dtype), v_BCXKP, preferred_element_type=jnp.float32)
    total = jnp.moveaxis(jnp.sum(weights, axis=-1), 4, 2)
    return sums.reshape(B, C * L, N, P)[:, :T], total.reshape(B, C * L, N)[:, :T]


def _features(x_BTNH, kernel_NHF):
    y = jnp.einsum("BTNH,NHF->BTNF", x_BTNH, kernel_NHF.astype(x_BTNH.dtype)).astype(jnp.float32)
    return jnp.concatenate([jax.nn.softmax(y, axis=-1), jax.nn.softmax(-y, axis=-1)], axis=-1).astype(x_BTNH.dtype)


def _take(a, order_BT):
    return jnp.take_along_axis(a, order_BT.reshape(order_BT.shape + (1,) * (a.ndim - 2)), axis=1)
