"""Golden cases of `selective_scan`, from the two forms in transformers' Mamba: of a sequence, and of one token."""

import numpy as np
import torch
from common import SEGMENT_IDS, draw, generator, per_document, record
from transformers.models.mamba.modeling_mamba import mamba_selective_scan, mamba_selective_state_update

HF = "transformers 5.23.0 mamba "
B, T, D, H = 2, 67, 5, 4


class Cache:
    """Stands for the state that the reference overwrites, which autograd would not allow."""

    def __init__(self, value):
        self.value, self.dtype, self.device = value, value.dtype, value.device

    def float(self):
        return self.value.float()

    def copy_(self, value):
        self.value = value


def from_zero(x, dt, A, B, C, D):
    arrays = (a.transpose(1, 2) for a in (x, dt))
    y, state = mamba_selective_scan(*arrays, A, B.transpose(1, 2), C.transpose(1, 2), D, return_last_state=True)
    return {"y": y.transpose(1, 2), "state": state}


def token_by_token(x, dt, A, B, C, state):
    cache = Cache(state)
    y = [mamba_selective_state_update(cache, x[:, t], dt[:, t], A, B[:, t], C[:, t]) for t in range(x.shape[1])]
    return torch.stack(y, dim=1), cache.value


def packed(x, dt, A, B, C, state):
    run = lambda x, dt, B, C, state: token_by_token(x, dt, A, B, C, state)
    y, state = per_document(run, SEGMENT_IDS, state, x=x, dt=dt, B=B, C=C)
    return {"y": y, "state": state}


def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns steps of which some are zero, and some so long that nothing is left of the state."""
    dt = np.abs(draw(rng, B, T, D, scale=0.25))
    dt[rng.random(dt.shape) < 0.02] = 0.0
    dt[rng.random(dt.shape) < 0.02] = 30.0
    A = -np.abs(draw(rng, D, H)) - 1 / 64
    return {"x": draw(rng, B, T, D), "dt": dt, "A": A, "B": draw(rng, B, T, H), "C": draw(rng, B, T, H)}


def main() -> None:
    rng = generator(name := "selective_scan_skip")
    inputs = arrays(rng) | {"D": draw(rng, D)}
    record(name, from_zero, inputs, settings={}, source=HF + "mamba_selective_scan")

    rng = generator(name := "selective_scan_packed")
    inputs = arrays(rng) | {"state": draw(rng, B, D, H)}
    constants = {"segment_ids": SEGMENT_IDS.numpy().astype("int32")}
    source = HF + "mamba_selective_state_update, each document by itself"
    record(name, packed, inputs, settings={}, source=source, constants=constants)


if __name__ == "__main__":
    main()
