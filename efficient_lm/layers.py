"""Parts that two or more modules use."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient_lm.sharding import einsum, shard


class Einsum(nnx.Module):
    """A weight and the contraction it takes part in: `Einsum("BTD,DNH->BTNH", D=512, N=8, H=64, rngs=rngs)`.

    The kernel remembers its letters and which of them are summed over; the optimizer reads both.
    """

    def __init__(self, eqn: str, *, rngs: nnx.Rngs, **sizes: int):
        self.eqn = eqn
        dims, out = eqn.split("->")[0].split(",")[1], eqn.split("->")[1]
        contracted = "".join(d for d in dims if d not in out)
        scale = math.prod(sizes[d] for d in contracted) ** -0.5
        kernel = jax.random.normal(rngs.params(), [sizes[d] for d in dims], jnp.float32) * scale
        self.kernel = nnx.Param(shard(kernel, dims), dims=dims, contracted=contracted)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return einsum(self.eqn, x, self.kernel[...].astype(x.dtype))


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dimension, in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int, *, eps: float = 1e-6):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...]).astype(x.dtype)
