"""Golden cases of `diagonal_scan`: transformers' RecurrentGemma, and for complex numbers the sum that the scan is."""

import numpy as np
import torch
from common import SEGMENT_IDS, draw, generator, per_document, record, uniform
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

HF = "transformers 5.23.0 RecurrentGemmaRglru._rnn_scan"
B, T, W, H = 2, 67, 5, 3
CONSTANTS = {"segment_ids": SEGMENT_IDS.numpy().astype("int32")}


def scan(a, x, state):
    reset = torch.zeros(*x.shape[:2], 1, dtype=torch.bool)
    return RecurrentGemmaRglru._rnn_scan(None, x, a, reset, state, acc_dtype=x.dtype)


def whole(a, x, state):
    h, state = scan(a, x, state)
    return {"h": h, "state": state}


def packed(a, x, state):
    h, state = per_document(scan, SEGMENT_IDS, state, a=a, x=x)
    return {"h": h, "state": state}


def packed_reverse(a, x, state):
    last = SEGMENT_IDS.max(dim=1, keepdim=True).values
    mirrored = torch.where(SEGMENT_IDS > 0, last + 1 - SEGMENT_IDS, 0).flip(1)
    h, state = per_document(scan, mirrored, state, a=a.flip(1), x=x.flip(1))
    return {"h": h.flip(1), "state": state}


def complex_sum(a, x, state):
    """h[t] = sum_s a^(t - s) x[s] + a^(t + 1) state, all pairs of tokens at once."""
    t = torch.arange(x.shape[1])
    distance = (t[:, None] - t).clamp(min=0)
    powers = torch.where((t[:, None] >= t)[..., None, None], a ** distance[..., None, None], 0)
    h = torch.einsum("tswh,bswh->btwh", powers, x) + a ** (t + 1)[:, None, None] * state[:, None]
    return {"h": h, "state": h[:, -1]}


def decays(rng, *shape):
    """From 0 to 1, both included, most of them long."""
    a = np.clip(1 - uniform(rng, *shape, low=0, high=1) ** 2, 0, 1)
    a = np.round(a * 64) / 64
    a[rng.random(shape) < 0.02] = 0.0
    return a


def main() -> None:
    cases = {
        "diagonal_scan_real": (whole, {}, {}, HF),
        "diagonal_scan_packed": (packed, {}, CONSTANTS, HF + ", each document by itself"),
        "diagonal_scan_packed_reverse": (
            packed_reverse,
            {"reverse": True},
            CONSTANTS,
            HF + ", tokens in reverse order, each document by itself",
        ),
    }
    for name, (run, settings, constants, source) in cases.items():
        rng = generator(name)
        inputs = {"a": decays(rng, B, T, W), "x": draw(rng, B, T, W), "state": draw(rng, B, W)}
        record(name, run, inputs, settings=settings, source=source, constants=constants)

    rng = generator(name := "diagonal_scan_complex")
    pair = lambda *shape: draw(rng, *shape) + 1j * draw(rng, *shape)
    inputs = {
        "a": uniform(rng, W, H, low=-0.7, high=0.7) + 1j * uniform(rng, W, H, low=-0.7, high=0.7),
        "x": pair(B, T, W, H),
        "state": pair(B, W, H),
    }
    record(name, complex_sum, inputs, settings={}, source="the sum of powers of a times x, in torch")


if __name__ == "__main__":
    main()
