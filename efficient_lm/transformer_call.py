"""One transformer that many layers call, each through low-rank adapters of its own: Zamba2's shared blocks.

The papers are https://arxiv.org/abs/2405.16712 and https://arxiv.org/abs/2411.15242.
"""

import dataclasses
import operator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from efficient_lm.ffns import MLPConfig
from efficient_lm.layers import Einsum, RMSNorm
from efficient_lm.mixers import AttentionConfig
from efficient_lm.mixers.base import State
from efficient_lm.sharding import shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerCallConfig:
    name: str
    """Calls of one name have one set of weights, but for their adapters."""
    attention: AttentionConfig
    """Of x beside the embeddings of the same tokens, twice the model's width."""
    ffn: MLPConfig
    adapter_rank: int
    adapted: tuple[str, ...] = ("ffn.gate_proj", "ffn.up_proj")
    """The projections, by their path in the transformer, that each call adds a low-rank matrix of its own to."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "TransformerCall":
        """Returns what one layer has of its own."""
        return TransformerCall(self, d_model, rngs=rngs)

    def build_shared(self, d_model: int, *, rngs: nnx.Rngs) -> "SharedTransformer":
        """Returns what all calls of this name have together."""
        return SharedTransformer(self, d_model, rngs=rngs)


class SharedTransformer(nnx.Module):
    """ffn(norm(attention(norm([x, embedding])))), without residuals."""

    def __init__(self, cfg: TransformerCallConfig, d_model: int, *, rngs: nnx.Rngs):
        D, P = d_model, cfg.attention.value_dim or cfg.attention.head_dim
        self.attention_norm = RMSNorm(2 * D)
        self.attention = cfg.attention.build(2 * D, rngs=rngs)
        self.attention.o_proj = None  # It would be twice too wide.
        self.o_proj = Einsum("BTNP,NPD->BTD", N=cfg.attention.num_heads, P=P, D=D, rngs=rngs)
        self.ffn_norm = RMSNorm(D)
        self.ffn = cfg.ffn.build(D, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        embedding: Float[Array, "B T D"],
        state: State,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        both = self.attention_norm(jnp.concatenate([x, embedding], axis=2))
        o_BTNP, state = self.attention.heads(both, state, segment_ids=segment_ids)
        return self.ffn(self.ffn_norm(self.o_proj(o_BTNP)))[0], state


class LowRank(nnx.Module):
    """A matrix of the shape of an Einsum's kernel, zero at first, as the product of two."""

    def __init__(self, of: Einsum, rank: int, *, rngs: nnx.Rngs):
        self.dims, (width, *out) = of.kernel.get_metadata("dims"), of.kernel.shape
        draw = jax.random.normal(rngs.params(), (width, rank), jnp.float32) * width**-0.5
        self.down = nnx.Param(shard(draw, "DR"), dims="DR", contracted="D")
        up_dims = "R" + self.dims[1:]
        self.up = nnx.Param(shard(jnp.zeros((rank, *out), jnp.float32), up_dims), dims=up_dims, contracted="R")

    def __call__(self) -> Float[Array, "D ..."]:
        product = jnp.tensordot(shard(self.down[...], "dR"), self.up[...], axes=1)
        return shard(product, self.dims)


class TransformerCall(nnx.Module):
    def __init__(self, cfg: TransformerCallConfig, d_model: int, *, rngs: nnx.Rngs):
        shapes = jax.eval_shape(lambda: cfg.build_shared(d_model, rngs=nnx.Rngs(0)))
        adapted = [operator.attrgetter(path)(shapes) for path in cfg.adapted]
        self.adapted = cfg.adapted
        self.adapters = nnx.List([LowRank(of, cfg.adapter_rank, rngs=rngs) for of in adapted])
        self.proj = Einsum("BTD,DJ->BTJ", D=d_model, J=d_model, rngs=rngs)

    @jax.named_scope("transformer_call")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        embedding: Float[Array, "B T D"],
        transformer: SharedTransformer,
        state: State,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        # Adapters change a copy's weights instead of running beside them: batches have more tokens than ranks.
        own: SharedTransformer = jax.tree.map(lambda x: x, transformer)
        for path, adapter in zip(self.adapted, self.adapters, strict=True):
            kernel = operator.attrgetter(path)(own).kernel
            kernel[...] = kernel[...] + adapter()
        y_BTD, state = own(x, embedding, state, segment_ids=segment_ids)
        return self.proj(y_BTD), state
