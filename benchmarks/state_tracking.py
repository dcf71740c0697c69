"""Who can keep a state that any token may flip? Parity on a CPU: `python -m benchmarks.state_tracking`.

One-block models learn the parity of every prefix of random bits, then get longer sequences than any they were trained
on. Memories that only ever fade (Mamba-2, DeltaNet with beta up to 1) cannot do it at all lengths; a beta of 2 is a
reflection, which flips (https://arxiv.org/abs/2411.12537).
"""

from efficient_lm.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()

import dataclasses
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Table

from benchmarks import tiny
from efficient_lm.config import TrainConfig
from efficient_lm.console import console
from efficient_lm.data import Batch
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import DeltaNetConfig, Mamba2Config, MixerConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.optimizer import AdamWConfig, CosineConfig

MIXERS = {
    # Without convolutions: they would find the parity of the last few bits first, and learning would stay there.
    "DeltaNet, beta up to 2": DeltaNetConfig(num_heads=4, key_dim=16, value_dim=16, conv_size=None, beta_max=2.0),
    "DeltaNet, beta up to 1": DeltaNetConfig(num_heads=4, key_dim=16, value_dim=16, conv_size=None),
    "Mamba-2": Mamba2Config(num_heads=4, key_dim=16, value_dim=16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateTracking:
    """Trains tiny models on parity and measures how far it carries."""

    length: int = 64
    """Bits of a training sequence."""
    longest: int = 256
    """Bits of a test sequence."""
    num_steps: int = 300
    batch_size: int = 32
    learning_rate: float = 5e-3
    num_seeds: int = 3
    output: pathlib.Path = pathlib.Path(__file__).parent / "results"
    """Folder for the numbers and the plot."""


def main(cfg: StateTracking) -> dict[str, np.ndarray]:
    """Returns the accuracies by model: of each seed, at each length."""
    circumstances = tiny.circumstances(cfg)
    accuracies, seconds = {}, {}
    with Progress(console=console) as progress:
        for name, mixer in MIXERS.items():
            task = progress.add_task(name, total=cfg.num_seeds * cfg.num_steps)
            start = time.perf_counter()
            accuracies[name] = train(cfg, mixer, lambda task=task: progress.advance(task))
            seconds[name] = round(time.perf_counter() - start, 1)
    by_length = {name: np.round(values, 3).tolist() for name, values in accuracies.items()}
    numbers, picture = cfg.output / "state_tracking.json", cfg.output / "state_tracking.png"
    tiny.save(numbers, circumstances | {"seconds": seconds, "accuracy_by_length": by_length})
    plot(cfg, accuracies).savefig(picture, dpi=120)

    lengths = sorted({cfg.length // 4, cfg.length, cfg.longest})
    table = Table(title=f"accuracy of parity after {cfg.num_steps} steps on {cfg.length} bits: worst seed to best")
    for column in ("", *(f"{length} bits" for length in lengths)):
        table.add_column(column, justify="right" if column else "left")
    for name, values in accuracies.items():
        at = [values[:, length - 1] for length in lengths]
        table.add_row(name, *(f"{x.min():.0%} to {x.max():.0%}" for x in at))
    console.print(table)
    console.print(f"numbers  {numbers}\nplot     {picture}")
    return accuracies


def train(cfg: StateTracking, mixer: MixerConfig, advance: Callable[[], None]) -> np.ndarray:
    """Returns the accuracy at each length, for each seed; calls `advance` after every step."""
    run = TrainConfig(
        model=ModelConfig(
            vocab_size=2,
            d_model=32,
            blocks={"M": BlockConfig(mixer=mixer, ffn=MLPConfig(d_ff=64))},
            pattern="M",
            num_periods=1,
            dtype="float32",
            remat="nothing",
        ),
        optimizer=AdamWConfig(learning_rate=cfg.learning_rate, schedule=CosineConfig(warmup_steps=cfg.num_steps // 20)),
        num_steps=cfg.num_steps,
        batch_size=cfg.batch_size,
        seq_len=cfg.length,
    )
    predict = jax.jit(lambda model, tokens: jnp.argmax(model(tokens)[0], axis=-1))
    draw = lambda rng: parity(rng, cfg.batch_size, cfg.length)
    accuracies = []
    for model, rng in tiny.trained(run, cfg.num_seeds, draw, advance):
        test = parity(rng, 512, cfg.longest)
        accuracies.append(np.mean(predict(model, test.tokens) == test.targets, axis=0))
    return np.stack(accuracies)


def parity(rng: np.random.Generator, num_rows: int, length: int) -> Batch:
    """Returns random bits, and for each whether the number of ones up to it is odd."""
    bits_BT = rng.integers(0, 2, (num_rows, length), dtype=np.int32)
    return Batch(bits_BT, np.cumsum(bits_BT, axis=1, dtype=np.int32) % 2, np.ones_like(bits_BT))


def plot(cfg: StateTracking, accuracies: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lengths = np.arange(1, cfg.longest + 1)
    for name, values in accuracies.items():
        (line,) = axes.plot(lengths, values.mean(axis=0), label=name)
        axes.fill_between(lengths, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2)
    axes.axvline(cfg.length, color="0.4", linestyle="--", label=f"trained on {cfg.length} bits")
    axes.axhline(0.5, color="0.4", linestyle=":", label="guessing")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="bits", ylabel="accuracy", ylim=(0.4, 1.02))
    axes.set_title(f"Parity: mean of {cfg.num_seeds} seeds, from the worst to the best")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main(tyro.cli(StateTracking))
