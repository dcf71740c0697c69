"""Position-wise feed-forward networks: gated (SwiGLU, https://arxiv.org/abs/2002.05202) and plain."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from efficient_lm.ffns.base import FFN, Aux, FFNConfig
from efficient_lm.layers import Einsum


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig(FFNConfig):
    d_ff: int
    """Width of the hidden layer."""
    activation: Literal["swiglu", "geglu", "gelu", "squared_relu"] = "swiglu"
    """swiglu and geglu multiply two projections, one through SiLU or GELU; the others have one projection up."""
    bias: bool = False
    """Of all projections."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "MLP":
        return MLP(self, d_model, rngs=rngs)


class MLP(FFN):
    def __init__(self, cfg: MLPConfig, d_model: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        sizes = {"D": d_model, "F": cfg.d_ff, "bias": cfg.bias, "rngs": rngs}
        self.up_proj = Einsum("BTD,DF->BTF", **sizes)
        self.gate_proj = Einsum("BTD,DF->BTF", **sizes) if cfg.activation in ("swiglu", "geglu") else None
        self.down_proj = Einsum("BTF,FD->BTD", **sizes)

    @jax.named_scope("mlp")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        tokens: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        gate_BTF = None if self.gate_proj is None else self.gate_proj(x)
        return self.down_proj(activate(self.cfg.activation, self.up_proj(x), gate_BTF)), {}


def activate(
    activation: Literal["swiglu", "geglu", "gelu", "squared_relu"],
    up: Float[Array, "*B F"],
    gate: Float[Array, "*B F"] | None,
) -> Float[Array, "*B F"]:
    """Returns the hidden layer; only swiglu and geglu have a gate."""
    if gate is not None:
        return (jax.nn.silu if activation == "swiglu" else jax.nn.gelu)(gate) * up
    return jax.nn.gelu(up) if activation == "gelu" else jnp.square(jax.nn.relu(up))
