"""What TPU kernels share that walk a row from chunk to chunk: how long chunks are, precision, padding.

And, with decays per key channel, the tokens of a chunk and the states between two.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.accurate import accurate, with_rest
from pallas_kernels.common.doubling import Decays, dot
from pallas_kernels.common.head_blocks import REAL, STARTS

CHUNK = 128
_LOG2_E = 1.4426950408889634
# exp2(-200) and exp(-200) are 0 in float32: closed gates (-inf, too) and the starts of documents stop here.
_CLOSED = -200.0
# Grids are rows, groups of heads, chunks. What does not fit into registers is kept in VMEM.
PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=64 * 1024 * 1024
)


def unsupported(q, k, v, g):
    """Returns why these arguments need another implementation, or None."""
    if any(x.dtype not in (jnp.float32, jnp.bfloat16) for x in (q, k, v)) or g.dtype != jnp.float32:
        return f"q {q.dtype}, k {k.dtype} and v {v.dtype}; they have to be float32 or bfloat16"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"heads wider than 256, and here keys have {q.shape[3]} and values {v.shape[3]}"
    return None


def is_exact(*operands: jax.Array) -> bool:
    """Returns whether products are taken in full float32: if any operand is."""
    return any(x.dtype == jnp.float32 for x in operands)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What kernels compute with; products of float32 are `exact`, those of bfloat16 are made as they are."""

    scale: float
    exact: bool

    def product(self, x: jax.Array, y: jax.Array, sides: str = "nn") -> jax.Array:
        return dot(x, y, sides, self.exact)

    def accurate(self, x: jax.Array, y: jax.Array, sides: str = "nn", y_sizes: jax.Array | None = None) -> jax.Array:
        """Returns the product without the errors of sums of float32, if it is `exact`."""
        axes = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}[sides]
        product = functools.partial(self.product, sides=sides)
        return accurate(product, x, y, axes, y_sizes) if self.exact else product(x, y)

    def with_rest(self, x: jax.Array, y: jax.Array) -> list[jax.Array]:
        """Returns x y^T and, if it is `exact`, what float32 does not hold of it."""
        product = functools.partial(self.product, sides="nt")
        return with_rest(product, x, y) if self.exact else [product(x, y)]

    def rounded(self, x: jax.Array) -> jax.Array:
        """Returns x as products take it: once, if it is in several."""
        return x if self.exact else x.astype(jnp.bfloat16)


def widen_lanes(same_LL: jax.Array, width: int) -> jax.Array:
    """Returns `LX` of an array whose lanes are all the same."""
    return same_LL[:, :width] if width <= CHUNK else jnp.concatenate([same_LL] * (width // CHUNK), axis=1)


def keep_bits(x_LX: jax.Array, bits_LL: jax.Array) -> jax.Array:
    """Returns x, float32, where the bits are -1, and zeros, in place of NaN too, where they are 0."""
    bits_LX = jax.lax.bitcast_convert_type(x_LX, jnp.int32) & widen_lanes(bits_LL, x_LX.shape[1])
    return jax.lax.bitcast_convert_type(bits_LX, jnp.float32)


class Tokens:
    """Which tokens of the chunk are real and which start a document. What is not real, or beyond T, may be anything."""

    def __init__(self, rule: Rule, flags_1L: jax.Array):
        self._exact = rule.exact
        flags_LL = jnp.broadcast_to(flags_1L, (CHUNK, CHUNK)).astype(jnp.float32).T.astype(jnp.int32)
        starts_LL = flags_LL & STARTS > 0
        self._real_LL = jnp.where(flags_LL & REAL > 0, -1, 0)
        self._goes_on_LL = jnp.where(starts_LL, 0, self._real_LL)
        self._most_LL = jnp.where(starts_LL, _CLOSED, 0.0)

    def clear(self, x_LX: jax.Array) -> jax.Array:
        """Returns x with zeros, in place of NaN too, for what is not real."""
        return keep_bits(x_LX, self._real_LL)

    def clear_starts(self, x_LX: jax.Array) -> jax.Array:
        """Returns x with zeros for what is not real and for the starts of documents."""
        return keep_bits(x_LX, self._goes_on_LL)

    def decays(self, g_LH: jax.Array, before: bool = False) -> Decays:
        most_LH = widen_lanes(self._most_LL, g_LH.shape[1])
        unit = 1.0 if self._exact else _LOG2_E
        logs_LH = jnp.minimum(jnp.maximum(self.clear(g_LH) * unit, _CLOSED), most_LH)
        return Decays(logs_LH, most_LH if before else logs_LH, self._exact)


def start(S_NPH, S_NHP):
    """Loads states, which are walked turned around, before the first step."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        for n in range(S_NPH.shape[0]):
            S_NPH[n] = S_NHP[n].T


def finish(S_NPH, S_NHP):
    """Stores the states after the last step."""

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for n in range(S_NPH.shape[0]):
            S_NHP[n] = S_NPH[n].T
