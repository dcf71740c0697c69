"""Two mixers on one input: hybrids inside a layer, along the axes of https://arxiv.org/abs/2510.04800.

How much of a layer each of them gets is what their own configurations say: heads, and widths of heads.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm.layers import Einsum, rms_normalize
from efficient_lm.mixers.base import HeadsMixer, Mixer, MixerConfig, State
from efficient_lm.sharding import per_shard, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelMixerConfig(MixerConfig):
    """The defaults are the block that the paper chose, Falcon-H1's with `norm=None, fusion="add"`, Hymba's with
    `scale="vector", fusion="add", joint_projection=True`."""

    first: MixerConfig
    second: MixerConfig
    norm: Literal["head", "branch"] | None = "branch"
    """Root-mean-square norm of each head of either mixer, or of all heads of a mixer at once, before projections."""
    scale: Literal["vector", "scalar"] | None = None
    """Learned factors after the norm: one for each channel of both mixers, or a single one for the second mixer."""
    fusion: Literal["add", "subtract", "concatenate", "gate"] = "subtract"
    """How two become one. A gate weighs the first against the second, channel by channel, by sigmoids of the input."""
    joint_projection: bool = False
    """One projection after the fusion, in place of one for each mixer before it. With no more than sums in between it
    makes the same functions: joint after "concatenate" is separate before "add", or before "subtract"."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "ParallelMixer":
        if self.fusion == "concatenate" and not self.joint_projection:
            raise ValueError("fusion='concatenate' makes a wider layer: it needs joint_projection=True")
        return ParallelMixer(self, d_model, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ParallelState:
    first: State
    second: State


class ParallelMixer(Mixer):
    def __init__(self, cfg: ParallelMixerConfig, d_model: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        first, second = cfg.first.build(d_model, rngs=rngs), cfg.second.build(d_model, rngs=rngs)
        if not (isinstance(first, HeadsMixer) and isinstance(second, HeadsMixer)):
            raise ValueError(f"{type(cfg.first).__name__} and {type(cfg.second).__name__} must both be HeadsMixers")
        projections = [branch.o_proj for branch in (first, second)]
        # What each projection reads, without batch and time.
        shapes = [proj.kernel.shape[:-1] for proj in projections if proj is not None]
        self.dims = [proj.eqn.split(",")[0][2:] for proj in projections if proj is not None]
        widths = [math.prod(shape) for shape in shapes]
        if cfg.joint_projection and cfg.fusion != "concatenate" and widths[0] != widths[1]:
            raise ValueError(f"fusion={cfg.fusion!r} before one projection needs mixers of one width, not {widths}")

        factors = lambda i: nnx.Param(shard(jnp.ones(shapes[i], jnp.float32), self.dims[i]))
        factor = lambda: nnx.Param(shard(jnp.ones((), jnp.float32), ""))
        self.first_scale = factors(0) if cfg.scale == "vector" else None
        self.second_scale = factors(1) if cfg.scale == "vector" else factor() if cfg.scale == "scalar" else None

        F = sum(widths) if cfg.fusion == "concatenate" else widths[0]
        self.o_proj = Einsum("BTF,FD->BTD", F=F, D=d_model, rngs=rngs) if cfg.joint_projection else None
        if cfg.joint_projection:
            first.o_proj = second.o_proj = None
        out = "F" if cfg.joint_projection else "J"
        gate = lambda: Einsum(f"BTD,D{out}->BT{out}", D=d_model, F=F, J=d_model, rngs=rngs)
        self.gate_proj = gate() if cfg.fusion == "gate" else None
        self.first, self.second = first, second

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> ParallelState:
        return ParallelState(*(branch.init_state(batch_size, max_len, dtype) for branch in (self.first, self.second)))

    def flops_per_token(self, seq_len: int) -> float:
        return self.first.flops_per_token(seq_len) + self.second.flops_per_token(seq_len)

    @jax.named_scope("parallel")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: ParallelState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], ParallelState | None]:
        o1, first = self.first.heads(x, state and state.first, segment_ids=segment_ids)
        o2, second = self.second.heads(x, state and state.second, segment_ids=segment_ids)
        o1, o2 = self._scaled(o1, self.first_scale), self._scaled(o2, self.second_scale)
        if self.first.o_proj is not None and self.second.o_proj is not None:
            y_BTD = self._fused(x, self.first.o_proj(o1), self.second.o_proj(o2))
        else:
            assert self.o_proj is not None
            o1_BTF, o2_BTF = (_channels(o, dims) for o, dims in zip((o1, o2), self.dims, strict=True))
            y_BTD = self.o_proj(self._fused(x, o1_BTF, o2_BTF))
        return y_BTD, state and ParallelState(first, second)

    def _scaled(self, o: Float[Array, "B T ..."], scale: nnx.Param | None) -> Float[Array, "B T ..."]:
        o32 = o.astype(jnp.float32)
        if self.cfg.norm is not None:
            o32 = rms_normalize(o32, axes=-1 if self.cfg.norm == "head" else tuple(range(2, o.ndim)))
        return (o32 if scale is None else o32 * scale[...]).astype(o.dtype)

    def _fused(
        self, x: Float[Array, "B T D"], first: Float[Array, "B T F"], second: Float[Array, "B T F2"]
    ) -> Float[Array, "B T F3"]:
        if self.gate_proj is not None:
            share = jax.nn.sigmoid(self.gate_proj(x))
            return share * first + (1 - share) * second
        if self.cfg.fusion == "concatenate":
            return jnp.concatenate([first, second], axis=2)
        return first + second if self.cfg.fusion == "add" else first - second


def _channels(o: Float[Array, "B T ..."], dims: str) -> Float[Array, "B T F"]:
    """Returns heads side by side; those of one device stay there."""
    flat = lambda o: o.reshape(*o.shape[:2], math.prod(o.shape[2:]))
    return per_shard(flat, f"BT{dims}", "BTF", split_tokens=True)(o)
