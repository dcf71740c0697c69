"""Parts that two or more modules use."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm import context
from efficient_lm.sharding import einsum, per_shard, shard


class Einsum(nnx.Module):
    """A weight and the contraction it takes part in: `Einsum("BTD,DNH->BTNH", D=512, N=8, H=64, rngs=rngs)`.

    The kernel remembers its letters and which of them are summed over; the optimizer reads both. A bias has one number
    for each output of a token.
    """

    def __init__(self, eqn: str, *, bias: bool = False, rngs: nnx.Rngs, **sizes: int):
        self.eqn = eqn
        dims, out = eqn.split("->")[0].split(",")[1], eqn.split("->")[1]
        contracted = "".join(d for d in dims if d not in out)
        scale = math.prod(sizes[d] for d in contracted) ** -0.5
        kernel = jax.random.normal(rngs.params(), [sizes[d] for d in dims], jnp.float32) * scale
        self.kernel = nnx.Param(shard(kernel, dims), dims=dims, contracted=contracted)
        zeros = lambda: jnp.zeros([sizes[d] for d in out[2:]], jnp.float32)
        # Like the outputs that it is added to: their D is not split, and their other letters are.
        self.bias = nnx.Param(shard(zeros(), out[2:].replace("D", "d"))) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = einsum(self.eqn, x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dimension, in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int, *, eps: float = 1e-6):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return (rms_normalize(x.astype(jnp.float32), eps=self.eps) * self.scale[...]).astype(x.dtype)


class GatedRMSNorm(nnx.Module):
    """`norm(x) * activation(gate)` over the last dimension, in float32."""

    def __init__(self, dim: int, *, activation: Literal["silu", "sigmoid"] = "silu", eps: float = 1e-6):
        self.norm = RMSNorm(dim, eps=eps)
        self.activation: Literal["silu", "sigmoid"] = activation

    def __call__(self, x: Float[Array, "*B P"], gate: Float[Array, "*B P"]) -> Float[Array, "*B P"]:
        act = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}[self.activation]
        return (self.norm(x.astype(jnp.float32)) * act(gate.astype(jnp.float32))).astype(x.dtype)


class ShortConv(nnx.Module):
    """A causal depthwise convolution and its activation: `ShortConv("BTNH", width=4, N=8, H=64, rngs=rngs)`."""

    def __init__(
        self,
        dims: str,
        *,
        width: int,
        bias: bool = False,
        activation: Literal["silu"] | None = "silu",
        rngs: nnx.Rngs,
        **sizes: int,
    ):
        shape = [sizes[d] for d in dims[2:]]
        self.dims, self.width, self.shape = dims, width, tuple(shape)
        self.activation: Literal["silu"] | None = activation
        bound = width**-0.5
        kernel = jax.random.uniform(rngs.params(), [*shape, width], jnp.float32, -bound, bound)
        self.kernel = nnx.Param(shard(kernel, dims[2:] + "W"))
        self.bias = nnx.Param(shard(jnp.zeros(shape, jnp.float32), dims[2:])) if bias else None

    def init_state(self, batch_size: int, dtype: DTypeLike) -> Float[Array, "B W ..."]:
        """Returns the inputs before the first token: none."""
        return shard(jnp.zeros((batch_size, self.width - 1, *self.shape), dtype), "BW" + self.dims[2:])

    def __call__(
        self,
        x: Float[Array, "B T ..."],
        state: Float[Array, "B W ..."] | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T ..."], Float[Array, "B W ..."]]:
        def conv(x, w, bias, state, segment_ids):
            flat = lambda a: a.reshape(*a.shape[:2], math.prod(a.shape[2:]))  # Not -1: there may be no tokens.
            y, new_state = context.short_conv(
                flat(x),
                w.reshape(-1, self.width),
                bias=None if bias is None else bias.reshape(-1),
                activation=self.activation,
                state=None if state is None else flat(state),
                segment_ids=segment_ids,
            )
            return y.reshape(x.shape), new_state.reshape(x.shape[0], self.width - 1, *x.shape[2:])

        channels = self.dims[2:]
        run = per_shard(
            conv, f"{self.dims},{channels}W,{channels},BW{channels},BT", f"{self.dims},BW{channels}", split_tokens=True
        )
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        return run(x, self.kernel[...].astype(x.dtype), bias, state, segment_ids)


def token_before(
    x: Float[Array, "B T D"],
    state: Float[Array, "B W D"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W D"]]:
    """Returns, for each token, the one before it in its document, zero before the first; and the last one, W = 1."""

    def shift(x, state, segment_ids):
        w_DW = jnp.tile(jnp.array([1, 0], x.dtype), (x.shape[-1], 1))
        return context.short_conv(x, w_DW, state=state, segment_ids=segment_ids)

    return per_shard(shift, "BTD,BWD,BT", "BTD,BWD", split_tokens=True)(x, state, segment_ids)


def rms_normalize(
    x: Float[Array, "..."], *, axes: int | tuple[int, ...] = -1, eps: float = 1e-6
) -> Float[Array, "..."]:
    """Scales the given dimensions to a root mean square of one."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + eps)


def layer_normalize(x: Float[Array, "*B P"], *, eps: float) -> Float[Array, "*B P"]:
    """Shifts and scales the last dimension to a mean of zero and a variance of one."""
    return rms_normalize(x - jnp.mean(x, axis=-1, keepdims=True), eps=eps)


def unit_normalize(x: Float[Array, "*B H"], eps: float = 1e-6) -> Float[Array, "*B H"]:
    """Scales the last dimension to length one, in float32: `x / sqrt(|x|^2 + eps)`."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def decay_parameters(key: jax.Array, dims: str, **sizes: int) -> tuple[nnx.Param, nnx.Param]:
    """Returns `A_log` and `dt_bias` of the decay `g = -exp(A_log) * softplus(dt + dt_bias)`, as Mamba-2 draws them.

    Rates are uniform in [1, 16] and step sizes log-uniform in [0.001, 0.1] (https://arxiv.org/abs/2405.21060).
    """
    key_a, key_dt = jax.random.split(key)
    shape = [sizes[d] for d in dims]
    rates = jax.random.uniform(key_a, shape, jnp.float32, 1.0, 16.0)
    steps = jnp.exp(jax.random.uniform(key_dt, shape, jnp.float32, math.log(1e-3), math.log(1e-1)))
    inverse_softplus = steps + jnp.log(-jnp.expm1(-steps))
    return nnx.Param(shard(jnp.log(rates), dims)), nnx.Param(shard(inverse_softplus, dims))
