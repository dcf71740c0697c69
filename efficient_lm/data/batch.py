"""What a model is trained on at one step."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed documents: a document d is read as bos + d and predicted as d + eos.

    `segment_ids` counts the documents of a row from 1, in order; 0 is padding. A target counts where it is above 0.
    """

    tokens: Int32[np.ndarray | jax.Array, "B T"]
    targets: Int32[np.ndarray | jax.Array, "B T"]
    segment_ids: Int32[np.ndarray | jax.Array, "B T"]
