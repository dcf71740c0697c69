"""What a model is trained on at one step."""

import dataclasses
from typing import Any

import jax

type Int32BT = Any  # An array of NumPy or JAX; or what jax.tree.map puts in its place, e.g. a sharding.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed documents: a document d is read as bos + d and predicted as d + eos.

    `segment_ids` counts the documents of a row from 1, in order; 0 is padding. A target of -1 is none.
    """

    tokens: Int32BT
    targets: Int32BT
    segment_ids: Int32BT

    @property
    def is_target(self) -> Any:
        """Returns [B T]: where there is something to predict, which is neither at padding nor at meta tokens."""
        return (self.segment_ids > 0) & (self.targets >= 0)
