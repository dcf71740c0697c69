"""Golden cases of `linear_cross_entropy`, from torch's cross entropy."""

import torch
import torch.nn.functional as F
from common import draw, generator, record, uniform

B, T, D, V = 2, 19, 12, 37


def main() -> None:
    source = "torch.nn.functional.cross_entropy and torch.logsumexp of x @ w"

    rng = generator(name := "linear_cross_entropy")
    inputs = {"x": draw(rng, B, T, D), "w": draw(rng, D, V, scale=0.5)}
    labels = rng.integers(V, size=(B, T))

    def loss(x, w):
        return weighted_loss(x @ w, torch.tensor(labels), torch.ones(B, T), z_loss=0.0)

    constants = {"labels": labels.astype("int32")}
    record(name, loss, inputs, settings={}, source=source, constants=constants)

    rng = generator(name := "linear_cross_entropy_z_loss")
    inputs = {"x": draw(rng, B, T, D), "w": draw(rng, D, V, scale=0.5), "weights": uniform(rng, B, T, low=0, high=2)}
    inputs["weights"][:, ::5] = 0.0
    z_labels = rng.integers(V, size=(B, T))
    # Out of range where the weight is zero: no loss, and what the loss would be is not defined.
    z_labels[:, ::5] = -100

    def z_loss(x, w, weights):
        return weighted_loss(x @ w, torch.tensor(z_labels), weights, z_loss=0.25)

    constants = {"labels": z_labels.astype("int32")}
    undefined = {"loss": z_labels < 0}
    settings = {"z_loss": 0.25}
    record(name, z_loss, inputs, settings=settings, source=source, constants=constants, zero_cotangents=undefined)

    rng = generator(name := "linear_cross_entropy_soft_cap")
    inputs = {"x": draw(rng, B, T, D), "w": draw(rng, D, V, scale=0.5)}
    cap_labels = rng.integers(V, size=(B, T))

    def capped_loss(x, w):
        logits = 2.5 * torch.tanh(x @ w / 2.5)
        return weighted_loss(logits, torch.tensor(cap_labels), torch.ones(B, T), z_loss=0.25)

    constants = {"labels": cap_labels.astype("int32")}
    settings = {"z_loss": 0.25, "soft_cap": 2.5}
    record(name, capped_loss, inputs, settings=settings, source=source, constants=constants)


def weighted_loss(logits, labels, weights, z_loss):
    nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    lse = torch.logsumexp(logits, dim=-1)
    return {"loss": weights.to(logits.dtype) * (nll + z_loss * lse.square()), "lse": lse}


if __name__ == "__main__":
    main()
