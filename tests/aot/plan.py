"""Plans a small transformer for four chips that are not here, and checks what is said: `python -m tests.aot.plan`.

What the program sends is pinned: a collective that nobody meant to add shows here.
"""

import dataclasses
import sys

import numpy as np

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.hlo import SLICES
from efficient_lm.mixers import AttentionConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.optimizer import AdamWConfig
from efficient_lm.plan import make_plan
from efficient_lm.sharding import make_mesh, slice_of
from efficient_lm.topologies import Target, parse_target, prepare_compilers

V, D, F, H, LAYERS = 1024, 256, 512, 128, 3
FFN = MLPConfig(d_ff=F)
CFG = TrainConfig(
    model=ModelConfig(
        vocab_size=V,
        d_model=D,
        blocks={"A": BlockConfig(mixer=AttentionConfig(num_heads=2, head_dim=H), ffn=FFN)},
        pattern="A",
        num_periods=LAYERS,
    ),
    optimizer=AdamWConfig(learning_rate=1e-3),
    batch_size=4,
    seq_len=256,
    num_steps=1000,
)


def main() -> int:
    """Returns how many promises do not hold."""
    prepare_compilers()
    target, axes = parse_target("v5e:2x2"), {"data": 2, "model": 2}
    plan = make_plan(CFG, target, axes)
    sent = {(c.kind, c.axes): c.count for c in plan.collectives}
    for collective in plan.collectives:
        print(collective)
    parameters = 4 * ((V * D + LAYERS * (4 * D * 2 * H + 3 * D * F)) // 4 + D + LAYERS * 2 * D)
    # A row of so many tokens: the residuals of one layer alone are more than a chip has.
    large = make_plan(dataclasses.replace(CFG, batch_size=2**14, seq_len=2**13), target, axes)
    print(f"{large.peak_bytes / 2**30:.1f} GiB of {large.chip_bytes / 2**30:.2f}")
    rate = lambda name, axes, along: _rate(parse_target(name), axes, along) / 1e9
    two = parse_target("2xv5e:2x2")
    sliced = make_plan(CFG, two, {"data": 4, "model": 2})
    between = {c.kind: c.count for c in sliced.collectives if c.axes == SLICES}
    for collective in sliced.collectives:
        print(collective)
    slices = lambda axes: np.vectorize(slice_of)(make_mesh(axes, two.devices()).devices)
    failed = 0
    for promise, holds in (
        ("parameters are what arithmetic says", plan.memory["parameters"] == parameters),
        ("moments and two counters", plan.memory["optimizer state"] == 2 * parameters + 8),
        ("a small batch fits", plan.fits),
        ("a large one does not", not large.fits),
        # Seven matrices of a layer, forward and backward, and the embedding.
        ("weights are gathered along data", sent.get(("all-gather", ("data",)), 0) == 2 * 7 * LAYERS + 1),
        # Gradients of a layer come as one; and the embedding's.
        ("gradients are scattered along data", sent.get(("reduce-scatter", ("data",)), 0) == LAYERS + 1),
        # After attention and the MLP, forward and again; before them, backward; and two for the embedding, rows, head.
        ("activations are added along model", sent.get(("all-reduce", ("model",)), 0) == 5 * LAYERS + 2),
        # Links of 50 GB/s: four to a chip of a whole torus, two along one of its rings, one at the end of a line.
        ("a torus has four links", rate("v5e:16x16", {"data": 256}, "data") == 200),
        ("a ring has two links", rate("v5e:16x16", {"data": 16, "model": 16}, "model") == 100),
        ("a line has one link", rate("v5e:2x2", axes, "model") == 50),
        ("slices lie along data", (slices({"data": 4, "model": 2}).T == [[0, 0, 1, 1]] * 2).all()),
        ("in whatever order axes come", (slices({"model": 2, "data": 4}) == [[0, 0, 1, 1]] * 2).all()),
        ("model is never between slices", _refused({"data": 1, "model": 8}, two)),
        ("a slice sends its weights to the other", between.get("all-gather", 0) >= 2 * 7 * LAYERS),
        ("slices add up gradients", between.get("all-reduce", 0) + between.get("reduce-scatter", 0) >= LAYERS),
        ("the data center's network", two.bytes_per_second(make_mesh(axes, target.devices()), SLICES) == 3.125e9),
        ("a slice has its own links", rate("2xv5e:4x4", {"data": 16, "model": 2}, "data") == 100),
    ):
        failed += not holds
        print(f"{promise}: {'yes' if holds else 'NO'}", flush=True)
    return failed


def _refused(axes: dict[str, int], target: Target) -> bool:
    try:
        make_mesh(axes, target.devices())
    except ValueError as error:
        return "2 slices: they lie along data" in str(error)
    return False


def _rate(target: Target, axes: dict[str, int], along: str) -> float:
    return target.bytes_per_second(make_mesh(axes, target.devices()), (along,))


if __name__ == "__main__":
    sys.exit(main() > 0)
