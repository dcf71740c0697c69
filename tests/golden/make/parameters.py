"""Parameters of the layers recorded here: no zeros and ones, so that none can be forgotten."""

import numpy as np
import torch
from common import draw


def parameters(name: str, rng: np.random.Generator, shape: torch.Size) -> np.ndarray:
    """Returns weights of a size that keeps activations near one, and gates that neither open nor close for good."""
    if name.endswith("A_log"):
        return draw(rng, *shape, scale=0.5)
    if name.endswith("dt_bias"):
        return draw(rng, *shape, scale=0.5) - 1
    if "norm" in name:
        return 1 + draw(rng, *shape, scale=0.25)
    if len(shape) == 1:
        return draw(rng, *shape, scale=0.5)
    return draw(rng, *shape, scale=float(np.prod(shape[1:])) ** -0.5)
