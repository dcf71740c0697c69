"""Hash layers: which experts a token has, its number says; nothing is learned, and nothing to balance.

The paper is https://arxiv.org/abs/2106.04426. It draws a table of the vocabulary; here a hash function stands for it.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from efficient_lm.ffns.base import Aux
from efficient_lm.ffns.experts import Experts
from efficient_lm.ffns.routers.base import Router, RouterConfig, load_report, loads


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashConfig(RouterConfig):
    num_hashes: int = 1
    """Each picks one of its own share of the experts; the token has the sum of them (the paper's MultiHash)."""
    seed: int = 0
    """Layers of one block send a token to experts of the same number; blocks of other seeds to others."""

    def build(self, d_model: int, num_experts: int, *, rngs: nnx.Rngs) -> "Hash":
        if self.num_hashes < 1 or num_experts % self.num_hashes:
            raise ValueError(f"num_hashes={self.num_hashes} does not divide {num_experts}, the number of experts")
        return Hash(self)

    def experts_per_token(self, num_experts: int) -> float:
        return float(self.num_hashes)


class Hash(Router):
    def __init__(self, cfg: HashConfig):
        self.cfg = cfg

    def __call__(
        self,
        x: Float[Array, "B T D"],
        is_real: Bool[Array, "B T"],
        experts: Experts,
        tokens: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        if tokens is None:
            raise ValueError("the hash router needs the tokens' numbers: call the network with tokens=...")
        E, K = experts.num_experts, self.cfg.num_hashes
        share = E // K
        experts_BTK = jnp.stack([_hash(tokens, self.cfg.seed * K + k) % share + k * share for k in range(K)], axis=-1)
        experts_BTK = jnp.where(is_real[..., None], experts_BTK, E)
        weights_BTK = jnp.where(is_real[..., None], jnp.ones(experts_BTK.shape, jnp.float32), 0)
        y_BTD, sent = experts.chosen(x, experts_BTK, weights_BTK)
        return y_BTD, load_report(loads(experts_BTK, E)) | sent


def _hash(tokens: Int[Array, "B T"], seed: int) -> Int[Array, "B T"]:
    """Returns numbers of 31 bits that look random: the last step of MurmurHash3."""
    bits = tokens.astype(jnp.uint32) + jnp.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    bits = (bits ^ bits >> 16) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ bits >> 13) * jnp.uint32(0xC2B2AE35)
    return ((bits ^ bits >> 16) >> 1).astype(jnp.int32)
