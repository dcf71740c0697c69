"""Placeholder until data lands."""
import dataclasses
import jax
from jaxtyping import Array, Int

@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
