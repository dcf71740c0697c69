"""Native sparse attention: summaries of all blocks, the best blocks, the last tokens (https://arxiv.org/abs/2502.11089).

As in flash-linear-attention, the three branches share keys and values, and a block's summary is their mean.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from efficient_lm import selectors
from efficient_lm.layers import Einsum
from efficient_lm.mixers.base import Mixer, MixerConfig
from efficient_lm.mixers.block_cache import BlockCache, View, attend_in_blocks, block_mean, init_block_cache
from efficient_lm.rotary import RotaryConfig, document_positions, rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeSparseAttentionConfig(MixerConfig):
    num_heads: int
    num_kv_heads: int
    """Heads of keys and values. The query heads of a group read the same blocks."""
    head_dim: int
    block_size: int = 64
    num_blocks: int = 16
    """Blocks that a query reads: the first one, its own, the one before, and the best of the others."""
    window_size: int = 512
    """Tokens that the window shows, the query's own included."""
    rotary: RotaryConfig | None = RotaryConfig()
    """None: no positions at all (NoPE)."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "NativeSparseAttention":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key/value head serves the same number of query heads"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} is at least 1")
        if self.num_blocks < 3:
            raise ValueError(f"num_blocks={self.num_blocks}: the first, a query's own and the one before make three")
        return NativeSparseAttention(self, d_model, rngs=rngs)


class NativeSparseAttention(Mixer):
    def __init__(self, cfg: NativeSparseAttentionConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, K, H = d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        # A gate for each branch: compressed, selected, window.
        self.gate_proj = Einsum("BTD,DNR->BTNR", D=D, N=N, R=3, rngs=rngs)
        self.o_proj = Einsum("BTNH,NHD->BTD", N=N, H=H, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> BlockCache:
        """Returns a cache of keys and values, and the compressed ones of each block."""
        cfg = self.cfg
        rows = {"batch_size": batch_size, "max_len": max_len, "block_size": cfg.block_size}
        return init_block_cache("BCKH", "BCKP", **rows, dtype=dtype, K=cfg.num_kv_heads, H=cfg.head_dim, P=cfg.head_dim)

    def flops_per_token(self, seq_len: int) -> float:
        cfg, tokens = self.cfg, np.arange(seq_len)
        full, own = np.divmod(tokens, cfg.block_size)
        selected = np.minimum(full, cfg.num_blocks - 1) * cfg.block_size + own + 1
        compressed = (tokens + 1) // cfg.block_size
        seen = np.mean(compressed + selected + np.minimum(tokens + 1, cfg.window_size))
        return 4.0 * cfg.num_heads * cfg.head_dim * float(seen)

    @jax.named_scope("native_sparse_attention")
    def __call__(
        self, x: Float[Array, "B T D"], state: BlockCache | None = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], BlockCache | None]:
        cfg = self.cfg
        q_BTNH, k_BTKH, v_BTKH = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        ids_BT = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        positions_BT, length_B = document_positions(ids_BT, state and state.length)
        if cfg.rotary is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, positions_BT, cfg.rotary), rotate(k_BTKH, positions_BT, cfg.rotary)
        o_BTNH, state = attend_in_blocks(
            self._see,
            lambda k, v: (block_mean(k), block_mean(v)),
            (q_BTNH, jax.nn.sigmoid(self.gate_proj(x))),
            (k_BTKH, v_BTKH),
            state,
            ids_BT,
            positions_BT,
            length_B,
            block_size=cfg.block_size,
            num_near=cfg.window_size,
        )
        return self.o_proj(o_BTNH), state

    def _see(self, view: View, q_BTNH: Array, gates_BTNR: Array) -> Array:
        (k_BCKH, v_BCKH), cfg, blocks = view.summaries, self.cfg, view.blocks
        ids_BT, positions_BT = view.of_queries(q_BTNH.shape[1])
        # A summary is seen from its block's last token on.
        compressed_BTNH, lse_BNT = kernels.attention(
            q_BTNH,
            k_BCKH,
            v_BCKH,
            segment_ids=ids_BT,
            kv_segment_ids=blocks.documents,
            positions=positions_BT,
            kv_positions=(blocks.numbers + 1) * cfg.block_size - 1,
        )

        def select(q_BTNH, lse_BTN, ids_BT, positions_BT):
            before_BTC = blocks.before(ids_BT, positions_BT)
            own_BT1 = positions_BT[..., None] // cfg.block_size
            is_fixed_BTC = (blocks.numbers[:, None] == 0) | (blocks.numbers[:, None] == own_BT1 - 1)
            count, scale = cfg.num_blocks - 1, cfg.head_dim**-0.5
            return selectors.native_sparse(q_BTNH, k_BCKH, lse_BTN, before_BTC, is_fixed_BTC, count, scale=scale)

        lse_BTN = jnp.moveaxis(lse_BNT, 1, 2)
        block_ids = selectors.a_few_tokens_at_a_time(select, q_BTNH, lse_BTN, ids_BT, positions_BT)
        near_BTNH, _ = view.near(q_BTNH, view.segment_ids, cfg.window_size)
        selected_BTNH = view.attend(q_BTNH, block_ids)
        compressed, selected, near = (gate[..., None] for gate in jnp.unstack(gates_BTNR, axis=3))
        return compressed * compressed_BTNH + selected * selected_BTNH + near * near_BTNH
