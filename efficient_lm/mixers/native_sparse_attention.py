"""Native sparse attention: summaries of all blocks, the best blocks, the last tokens (https://arxiv.org/abs/2502.11089).

A block's summary is the mean of its keys, and that of its values, as in flash-linear-attention; or what a network makes
of them, as in the paper. As in flash-linear-attention, the three branches share keys and values, where the paper has
some for each.
"""

import dataclasses
import math

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
from efficient_lm.mixers.block_cache import BlockCache, Summary, View, attend_in_blocks, block_mean, init_block_cache
from efficient_lm.rotary import RotaryConfig, document_positions, rotate
from efficient_lm.sharding import shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """A learned map of some keys, or values, to one. Defaults are the paper's."""

    block_size: int = 32
    stride: int = 16
    """Tokens from the start of one block to that of the next: a smaller number lets blocks overlap."""
    d_hidden: int
    """Width of the network between its two layers."""


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
    compression: CompressionConfig | None = None
    """None: compressed keys and values are means of the blocks that are chosen from."""
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
        small = self.compression
        if small is not None:
            if min(small.block_size, small.stride, small.d_hidden) < 1:
                raise ValueError(f"{small}: all of these are at least 1")
            if small.block_size > self.block_size or small.block_size % small.stride or self.block_size % small.stride:
                raise ValueError(
                    f"compression.block_size={small.block_size} is at most block_size={self.block_size}, and both are "
                    f"multiples of compression.stride={small.stride}"
                )
        return NativeSparseAttention(self, d_model, rngs=rngs)


class Compression(nnx.Module):
    """Makes one of the L keys of a block, or of its values: `silu((x + positions) W_in) W_out`, L as one vector.

    The paper (section 3.3.1) has a network and an encoding of positions within the block, and says no more of them.
    Here the encoding is learned and added; keys come rotated, as the other branches see them; and each head has weights
    of its own, as its keys are vectors of a space of their own.
    """

    dims = "KLH", "KLHF", "KFH"

    def __init__(self, cfg: CompressionConfig, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        K, L, H, F = num_heads, cfg.block_size, head_dim, cfg.d_hidden
        share = 1 / cfg.stride  # A block ends at one of so many tokens: a token meets that part of the weights.

        def draw(dims, contracted, *shape):
            scale = math.prod(n for n, d in zip(shape, dims, strict=True) if d in contracted) ** -0.5
            kernel = jax.random.normal(rngs.params(), shape, jnp.float32) * scale
            return nnx.Param(shard(kernel, dims), dims=dims, contracted=contracted, stacked="K", share=share)

        self.positions = nnx.Param(shard(jnp.zeros((K, L, H), jnp.float32), "KLH"), share=share)
        self.in_kernel = draw("KLHF", "LH", K, L, H, F)
        self.out_kernel = draw("KFH", "F", K, F, H)

    def weights(self, dtype: DTypeLike) -> tuple[Array, ...]:
        return tuple(p[...].astype(dtype) for p in (self.positions, self.in_kernel, self.out_kernel))


def compress(
    x: Float[Array, "B C L K H"],
    positions: Float[Array, "K L H"],
    in_kernel: Float[Array, "K L H F"],
    out_kernel: Float[Array, "K F H"],
) -> Float[Array, "B C K H"]:
    x_BCLKH = x + jnp.moveaxis(positions, 0, 1)
    hidden_BCKF = jax.nn.silu(jnp.einsum("BCLKH,KLHF->BCKF", x_BCLKH, in_kernel))
    return jnp.einsum("BCKF,KFH->BCKH", hidden_BCKF, out_kernel)


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
        network = lambda: None if cfg.compression is None else Compression(cfg.compression, K, H, rngs=rngs)
        self.k_compression, self.v_compression = network(), network()

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> BlockCache:
        """Returns a cache of keys and values, and the compressed ones."""
        cfg = self.cfg
        rows = {"batch_size": batch_size, "max_len": max_len, "block_size": cfg.block_size, "stride": self._small()[1]}
        return init_block_cache("BCKH", "BCKP", **rows, dtype=dtype, K=cfg.num_kv_heads, H=cfg.head_dim, P=cfg.head_dim)

    def flops_per_token(self, seq_len: int) -> float:
        cfg, tokens = self.cfg, np.arange(seq_len)
        full, own = np.divmod(tokens, cfg.block_size)
        selected = np.minimum(full, cfg.num_blocks - 1) * cfg.block_size + own + 1
        size, stride = self._small()
        compressed = np.maximum(tokens + 1 - size + stride, 0) // stride
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
            self._summary(x.dtype),
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

    def _small(self) -> tuple[int, int]:
        """Returns the size of the blocks that are compressed, and how far each starts from the one before."""
        small, size = self.cfg.compression, self.cfg.block_size
        return (size, size) if small is None else (small.block_size, small.stride)

    def _summary(self, dtype: DTypeLike) -> Summary:
        size, stride = self._small()
        if self.k_compression is None or self.v_compression is None:
            return Summary(size=size, stride=stride, make=lambda k, v: (block_mean(k), block_mean(v)))
        return Summary(
            size=size,
            stride=stride,
            make=lambda k, v, *weights: (compress(k, *weights[:3]), compress(v, *weights[3:])),
            weights=(*self.k_compression.weights(dtype), *self.v_compression.weights(dtype)),
            weight_dims=Compression.dims * 2,
        )

    def _see(self, view: View, q_BTNH: Array, gates_BTNR: Array) -> Array:
        (k_BXKH, v_BXKH), cfg, blocks, small = view.summaries, self.cfg, view.blocks, view.summarized
        ids_BT, positions_BT = view.of_queries(q_BTNH.shape[1])
        # A summary is seen from its block's last token on.
        size, stride = self._small()
        last_BX = small.numbers * stride + size - 1
        compressed_BTNH, lse_BNT = kernels.attention(
            q_BTNH,
            k_BXKH,
            v_BXKH,
            segment_ids=ids_BT,
            kv_segment_ids=small.documents,
            positions=positions_BT,
            kv_positions=last_BX,
        )

        def select(q_BTNH, lse_BTN, ids_BT, positions_BT):
            is_own_BTX = (small.documents[:, None] == ids_BT[..., None]) & (ids_BT[..., None] > 0)
            seen_BTX = is_own_BTX & (last_BX[:, None] <= positions_BT[..., None])
            shares = selectors.compressed_shares(q_BTNH, k_BXKH, lse_BTN, seen_BTX, scale=cfg.head_dim**-0.5)
            if cfg.compression is not None:
                shares = selectors.in_larger_blocks(shares, small, blocks, stride)
            own_BT1 = positions_BT[..., None] // cfg.block_size
            is_fixed_BTC = (blocks.numbers[:, None] == 0) | (blocks.numbers[:, None] == own_BT1 - 1)
            return selectors.native_sparse(
                shares, blocks.before(ids_BT, positions_BT), is_fixed_BTC, cfg.num_blocks - 1
            )

        lse_BTN = jnp.moveaxis(lse_BNT, 1, 2)
        block_ids = selectors.a_few_tokens_at_a_time(select, q_BTNH, lse_BTN, ids_BT, positions_BT)
        near_BTNH, _ = view.near(q_BTNH, view.segment_ids, cfg.window_size)
        selected_BTNH = view.attend(q_BTNH, block_ids)
        compressed, selected, near = (gate[..., None] for gate in jnp.unstack(gates_BTNR, axis=3))
        return compressed * compressed_BTNH + selected * selected_BTNH + near * near_BTNH
