"""Mixture of block attention: each head reads the blocks whose mean key its query likes (https://arxiv.org/abs/2502.13189).

For a model whose last layers see everything, as the paper has it for fine-tuning, these are blocks of `Attention`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import selectors
from efficient_lm.layers import Einsum
from efficient_lm.mixers.base import Mixer, MixerConfig
from efficient_lm.mixers.block_cache import BlockCache, Summary, View, attend_in_blocks, block_mean, init_block_cache
from efficient_lm.rotary import RotaryConfig, document_positions, rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoBAConfig(MixerConfig):
    num_heads: int
    num_kv_heads: int | None = None
    """Heads of keys and values; None: as many as there are query heads. Each query head chooses for itself."""
    head_dim: int
    block_size: int
    num_blocks: int
    """Blocks that a query reads, its own included."""
    rotary: RotaryConfig | None = RotaryConfig()
    """None: no positions at all (NoPE)."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MoBA":
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key/value head serves the same number of query heads"
            )
        if self.num_blocks < 1 or self.block_size < 1:
            raise ValueError(f"num_blocks={self.num_blocks} and block_size={self.block_size} are at least 1")
        return MoBA(self, d_model, rngs=rngs)


class MoBA(Mixer):
    def __init__(self, cfg: MoBAConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, K, H = d_model, cfg.num_heads, cfg.num_kv_heads or cfg.num_heads, cfg.head_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.k_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.o_proj = Einsum("BTNH,NHD->BTD", N=N, H=H, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> BlockCache:
        """Returns a cache of keys and values, and the mean key of each block."""
        cfg, K, H = self.cfg, self.cfg.num_kv_heads or self.cfg.num_heads, self.cfg.head_dim
        rows = {"batch_size": batch_size, "max_len": max_len, "block_size": cfg.block_size}
        return init_block_cache("BCKH", **rows, dtype=dtype, K=K, H=H, P=H)

    def flops_per_token(self, seq_len: int) -> float:
        cfg = self.cfg
        full, own = np.divmod(np.arange(seq_len), cfg.block_size)
        seen = np.minimum(full, cfg.num_blocks - 1) * cfg.block_size + own + 1
        return cfg.num_heads * cfg.head_dim * float(np.mean(4 * seen + 2 * full))

    @jax.named_scope("moba")
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
            Summary(size=cfg.block_size, stride=cfg.block_size, make=lambda k, _: (block_mean(k),)),
            (q_BTNH,),
            (k_BTKH, v_BTKH),
            state,
            ids_BT,
            positions_BT,
            length_B,
            block_size=cfg.block_size,
            num_near=0,
        )
        return self.o_proj(o_BTNH), state

    def _see(self, view: View, q_BTNH: Array) -> Array:
        (means_BCKH,) = view.summaries

        def select(q_BTNH, ids_BT, positions_BT):
            before_BTC = view.blocks.before(ids_BT, positions_BT)
            return selectors.moba(q_BTNH, means_BCKH, before_BTC, self.cfg.num_blocks - 1)

        block_ids = selectors.a_few_tokens_at_a_time(select, q_BTNH, *view.of_queries(q_BTNH.shape[1]))
        return view.attend(q_BTNH, block_ids)
