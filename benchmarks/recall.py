"""Who finds again what was said once? Multi-query associative recall on a CPU: `python -m benchmarks.recall`.

A sequence gives keys, each with a value behind it, and then asks for keys anew, most of them soon and some late
(Zoology, https://arxiv.org/abs/2312.04927). A cache holds as many pairs as it has slots, a recurrent state as many as
fit. As there, every model begins with a block of short convolutions, which put keys and values together. Here are 32 of
each, and blanks between the questions.
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
import optax
import tyro
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Table

from benchmarks import tiny
from efficient_lm.config import TrainConfig
from efficient_lm.console import console
from efficient_lm.data import Batch
from efficient_lm.ffns import MLPConfig
from efficient_lm.layers import ShortConv
from efficient_lm.mixers import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, Mixer, MixerConfig, MoBAConfig
from efficient_lm.model import BlockConfig, LanguageModel, ModelConfig
from efficient_lm.objectives import Objective, ObjectiveConfig
from efficient_lm.optimizer import CosineConfig, MuonConfig

NUM_KEYS = 32
VOCABULARY = 1 + 2 * NUM_KEYS  # 0 is a blank; keys; values.

ATTENTION = AttentionConfig(num_heads=4, head_dim=16)
GATED_DELTANET = GatedDeltaNetConfig(num_heads=4, key_dim=16, value_dim=16)
# The mixers of the blocks that follow the convolutions.
MODELS: dict[str, tuple[MixerConfig, ...]] = {
    "attention": (ATTENTION,),
    "sliding window of 16": (dataclasses.replace(ATTENTION, window_size=16),),
    "MoBA, 4 blocks of 4": (MoBAConfig(num_heads=4, head_dim=16, block_size=4, num_blocks=4),),
    "Gated DeltaNet": (GATED_DELTANET,),
    "Mamba-2": (Mamba2Config(num_heads=4, key_dim=16, value_dim=16),),
    "quickstart's hybrid": (GATED_DELTANET, GATED_DELTANET, ATTENTION),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
    """Trains tiny models on recall and measures how many pairs they hold."""

    length: int = 64
    """Tokens of a sequence."""
    num_pairs: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Pairs of a sequence: each row of a batch has one of these numbers, each number gets a test of its own."""
    num_steps: int = 500
    batch_size: int = 32
    learning_rate: float = 1e-2
    num_seeds: int = 1
    d_model: int = 64
    only: tuple[str, ...] = ()
    """Names of models to train; none: all."""
    output: pathlib.Path = pathlib.Path(__file__).parent / "results"
    """Folder for the numbers and the plot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvolutionConfig(MixerConfig):
    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Convolution":
        return Convolution(d_model, rngs=rngs)


class Convolution(Mixer):
    """Puts each token together with the ones before it."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        self.conv = ShortConv("BTD", width=3, D=d_model, rngs=rngs)

    def __call__(self, x, state=None, *, segment_ids=None):
        y_BTD, conv = self.conv(x, state, segment_ids=segment_ids)
        return y_BTD, state if state is None else conv


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersConfig(ObjectiveConfig):
    """Cross-entropy of the answers: of targets that are not blank."""

    def build(self) -> "Answers":
        return Answers()


class Answers(Objective):
    def __call__(self, model: LanguageModel, batch: Batch):
        loss = jnp.sum(self.token_nll(model, batch))
        return loss, {"tokens": jnp.sum(batch.targets > 0).astype(jnp.float32), "nll": loss}

    def token_nll(self, model: LanguageModel, batch: Batch):
        logits_BTV, _ = model(batch.tokens)
        nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.targets)
        return jnp.where(batch.targets > 0, nll_BT, 0.0)


def main(cfg: Recall) -> dict[str, np.ndarray]:
    """Returns the accuracies by model: of each seed, at each number of pairs."""
    circumstances = tiny.circumstances(cfg)
    accuracies, seconds = {}, {}
    with Progress(console=console) as progress:
        for name in cfg.only or MODELS:
            task = progress.add_task(name, total=cfg.num_seeds * cfg.num_steps)
            start = time.perf_counter()
            accuracies[name] = train(cfg, MODELS[name], lambda task=task: progress.advance(task))
            seconds[name] = round(time.perf_counter() - start, 1)
    by_pairs = {name: np.round(values, 3).tolist() for name, values in accuracies.items()}
    numbers, picture = cfg.output / "recall.json", cfg.output / "recall.png"
    tiny.save(numbers, circumstances | {"seconds": seconds, "accuracy_by_pairs": by_pairs})
    plot(cfg, accuracies).savefig(picture, dpi=120)

    table = Table(title=f"accuracy of recall after {cfg.num_steps} steps: mean of {cfg.num_seeds} seeds")
    for column in ("", *(f"{n} pairs" for n in cfg.num_pairs)):
        table.add_column(column, justify="right" if column else "left")
    for name, values in accuracies.items():
        table.add_row(name, *(f"{x:.0%}" for x in values.mean(axis=0)))
    console.print(table)
    console.print(f"numbers  {numbers}\nplot     {picture}")
    return accuracies


def train(cfg: Recall, mixers: tuple[MixerConfig, ...], advance: Callable[[], None]) -> np.ndarray:
    """Returns the accuracy at each number of pairs, for each seed; calls `advance` after every step."""
    mixers = (ConvolutionConfig(), *mixers)
    letters = "ABCD"[: len(mixers)]
    ffn = MLPConfig(d_ff=2 * cfg.d_model)
    run = TrainConfig(
        model=ModelConfig(
            vocab_size=VOCABULARY,
            d_model=cfg.d_model,
            blocks={letter: BlockConfig(mixer=mixer, ffn=ffn) for letter, mixer in zip(letters, mixers, strict=True)},
            pattern=" ".join(letters),
            num_periods=1,
            dtype="float32",
            remat="nothing",
        ),
        objective=AnswersConfig(),
        optimizer=MuonConfig(learning_rate=cfg.learning_rate, schedule=CosineConfig(warmup_steps=cfg.num_steps // 20)),
        num_steps=cfg.num_steps,
        batch_size=cfg.batch_size,
        seq_len=cfg.length,
    )
    predict = jax.jit(lambda model, tokens: jnp.argmax(model(tokens)[0], axis=-1))
    draw = lambda rng: pairs(rng, rng.choice(cfg.num_pairs, cfg.batch_size), cfg.length)
    accuracies = []
    for model, rng in tiny.trained(run, cfg.num_seeds, draw, advance):
        tests = [pairs(rng, np.full(256, n), cfg.length) for n in cfg.num_pairs]
        right = [np.asarray(predict(model, test.tokens) == test.targets) for test in tests]
        accuracies.append([np.mean(ok[test.targets > 0]) for ok, test in zip(right, tests, strict=True)])
    return np.array(accuracies)


def pairs(rng: np.random.Generator, num_pairs_B: np.ndarray, length: int) -> Batch:
    """Returns rows of keys with their values, and then of the same keys among blanks, each with its value as target."""
    tokens_BT, targets_BT = np.zeros((2, len(num_pairs_B), length), np.int32)
    for tokens, targets, n in zip(tokens_BT, targets_BT, num_pairs_B, strict=True):
        keys = 1 + rng.permutation(NUM_KEYS)[:n]
        values = 1 + NUM_KEYS + rng.permutation(NUM_KEYS)[:n]
        tokens[: 2 * n : 2], tokens[1 : 2 * n : 2] = keys, values
        # Every second place may be asked at, the m-th with odds of nearly 1 / m.
        odds = np.arange(1, (length - 2 * n) // 2 + 1) ** -0.99
        at = 2 * n + 2 * rng.choice(len(odds), n, replace=False, p=odds / odds.sum())
        tokens[at], targets[at] = keys, values
    return Batch(tokens_BT, targets_BT, np.ones_like(tokens_BT))


def plot(cfg: Recall, accuracies: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, values), marker in zip(accuracies.items(), "os^vDP", strict=False):
        (line,) = axes.plot(cfg.num_pairs, values.mean(axis=0), marker=marker, label=name)
        axes.fill_between(cfg.num_pairs, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2)
    axes.axhline(1 / NUM_KEYS, color="0.4", linestyle=":", label="guessing")
    axes.set_xscale("log", base=2)
    axes.set_xticks(cfg.num_pairs)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="pairs of key and value", ylabel="accuracy", ylim=(0, 1.03))
    axes.set_title(f"Recall in {cfg.length} tokens, width {cfg.d_model}, after {cfg.num_steps} steps")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Recall))
