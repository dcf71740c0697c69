"""What TPU kernels share that walk a row from chunk to chunk with decays per key channel: tokens, states, precision."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.doubling import Decays
from pallas_kernels.common.head_blocks import REAL, STARTS

CHUNK = 128
_LOG2_E = 1.4426950408889634
# exp2(-200) is 0 in float32: closed gates (-inf, too) and the starts of documents stop here.
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


class Tokens:
    """Which tokens of the chunk are real and which start a document. What is not real, or beyond T, may be anything."""

    def __init__(self, flags_1L: jax.Array):
        flags_LL = jnp.broadcast_to(flags_1L, (CHUNK, CHUNK)).astype(jnp.float32).T.astype(jnp.int32)
        starts_LL = flags_LL & STARTS > 0
        self._real_LL = jnp.where(flags_LL & REAL > 0, -1, 0)
        self._goes_on_LL = jnp.where(starts_LL, 0, self._real_LL)
        self._most_LL = jnp.where(starts_LL, _CLOSED, 0.0)

    def clear(self, x_LX: jax.Array) -> jax.Array:
        """Returns x with zeros, in place of NaN too, for what is not real."""
        return _and(x_LX, self._real_LL)

    def clear_starts(self, x_LX: jax.Array) -> jax.Array:
        """Returns x with zeros for what is not real and for the starts of documents."""
        return _and(x_LX, self._goes_on_LL)

    def decays(self, g_LH: jax.Array, before: bool = False) -> Decays:
        most_LH = _widen_lanes(self._most_LL, g_LH.shape[1])
        logs_LH = jnp.minimum(jnp.maximum(self.clear(g_LH) * _LOG2_E, _CLOSED), most_LH)
        return Decays(logs_LH, most_LH if before else logs_LH)


def _widen_lanes(same_LL: jax.Array, width: int) -> jax.Array:
    """Returns `LX` of an array whose lanes are all the same."""
    return same_LL[:, :width] if width <= CHUNK else jnp.concatenate([same_LL] * (width // CHUNK), axis=1)


def _and(x_LX: jax.Array, bits_LL: jax.Array) -> jax.Array:
    bits_LX = jax.lax.bitcast_convert_type(x_LX, jnp.int32) & _widen_lanes(bits_LL, x_LX.shape[1])
    return jax.lax.bitcast_convert_type(bits_LX, jnp.float32)


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
