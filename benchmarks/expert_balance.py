"""Does a bias alone keep experts evenly loaded? On real text, on a CPU: `python -m benchmarks.expert_balance`.

Small mixtures of experts learn the source of Python's standard library, without any balance and with the bias of
https://arxiv.org/abs/2408.15664, which no gradient trains. Loads are measured on held-out text, layer by layer.
"""

from efficient_lm.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()

import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Table

from benchmarks.cpu import cpu_name
from efficient_lm import buffers
from efficient_lm.config import TrainConfig
from efficient_lm.console import console
from efficient_lm.data import Data, DataConfig, TrainBPEConfig
from efficient_lm.evaluation import evaluate
from efficient_lm.ffns import MLPConfig, MoEConfig
from efficient_lm.ffns.routers import TopKConfig
from efficient_lm.mixers import AttentionConfig, GatedDeltaNetConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.optimizer import MuonConfig, TrapezoidConfig
from efficient_lm.training import init_state, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertBalance:
    """Trains small mixtures of experts with and without the bias and measures their loads."""

    num_steps: int = 1000
    batch_size: int = 8
    seq_len: int = 128
    num_experts: int = 8
    top_k: int = 1
    bias_rate: float = 3e-3
    """The paper's 0.001 is for many more steps."""
    num_seeds: int = 3
    vocab_size: int = 1024
    held_out_batches: int = 64
    output: pathlib.Path = pathlib.Path(__file__).parent / "results"
    """Folder for the numbers and the plot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    held_out_loss: float
    """Nats per token."""
    loads: list[list[float]]
    """Of each expert in each layer on held-out text, as multiples of the mean."""
    max_load: list[float]
    """Largest load of each training batch as a multiple of the mean; mean over the layers."""

    @property
    def worst(self) -> float:
        return max(map(max, self.loads))

    @property
    def last(self) -> float:
        """Returns the largest load at the end of training, over a tenth of it."""
        return float(np.mean(self.max_load[-max(len(self.max_load) // 10, 1) :]))


def main(cfg: ExpertBalance) -> dict[str, list[Result]]:
    """Returns what each seed gave, without balance and with it."""
    load = os.getloadavg()[0]
    results: dict[str, list[Result]] = {"no balance": [], "bias": []}
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        for seed, name in itertools.product(range(cfg.num_seeds), results):
            # A rate of zero measures loads and does nothing about them.
            run = config(cfg, cfg.bias_rate if name == "bias" else 0.0, seed)
            data = run.data.build(run_dir=folder, batch_size=run.batch_size, seq_len=run.seq_len, seed=seed)
            task = progress.add_task(f"{name}, seed {seed}", total=cfg.num_steps)
            results[name].append(train(cfg, run, data, lambda task=task: progress.advance(task)))
    answer = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "load_before": load,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "settings": {name: value for name, value in vars(cfg).items() if name != "output"},
        "results": {name: [dataclasses.asdict(seed) for seed in seeds] for name, seeds in results.items()},
    }
    cfg.output.mkdir(parents=True, exist_ok=True)
    numbers, picture = cfg.output / "expert_balance.json", cfg.output / "expert_balance.png"
    numbers.write_text(json.dumps(answer, default=float) + "\n")
    plot(cfg, results).savefig(picture, dpi=120)

    table = Table(title=f"{cfg.num_experts} experts, {cfg.top_k} for a token; means of {cfg.num_seeds} seeds")
    table.add_column("")
    for column in ("largest load / mean, last tenth of training", "held out, worst layer", "held-out loss"):
        table.add_column(column, justify="right")
    for name, seeds in results.items():
        values = ([seed.last for seed in seeds], [seed.worst for seed in seeds], [seed.held_out_loss for seed in seeds])
        table.add_row(name, *(f"{np.mean(x):.{digits}f}" for x, digits in zip(values, (2, 2, 4), strict=True)))
    console.print(table)
    console.print(f"numbers  {numbers}\nplot     {picture}")
    return results


def config(cfg: ExpertBalance, bias_rate: float, seed: int) -> TrainConfig:
    router = TopKConfig(top_k=cfg.top_k, scores="sigmoid", renormalize=False, bias_rate=bias_rate)
    ffn = MoEConfig(router=router, num_experts=cfg.num_experts, d_ff=96, shared=MLPConfig(d_ff=96))
    mixer = GatedDeltaNetConfig(num_heads=3, key_dim=32, value_dim=32)
    attention = AttentionConfig(num_heads=3, head_dim=32)
    return TrainConfig(
        model=ModelConfig(
            vocab_size=cfg.vocab_size,
            d_model=96,
            blocks={"M": BlockConfig(mixer=mixer, ffn=ffn), "A": BlockConfig(mixer=attention, ffn=ffn)},
            pattern="M A",
            num_periods=1,
            dtype="float32",
            remat="nothing",
        ),
        data=DataConfig(tokenizer=TrainBPEConfig(vocab_size=cfg.vocab_size)),
        optimizer=MuonConfig(
            learning_rate=1e-2,
            schedule=TrapezoidConfig(warmup_steps=min(20, cfg.num_steps // 5), decay_steps=cfg.num_steps // 3),
        ),
        batch_size=cfg.batch_size,
        seq_len=cfg.seq_len,
        num_steps=cfg.num_steps,
        seed=seed,
    )


def train(cfg: ExpertBalance, run: TrainConfig, data: Data, advance: Any) -> Result:
    """Returns what training came to; calls `advance` after every step."""
    objective, (optimizer, _) = run.objective.build(), run.optimizer.build(run.num_steps)
    step, state = make_train_step(run, objective, optimizer), init_state(run, optimizer)
    batches, max_load = data.train(), []
    for batch in itertools.islice(batches, run.num_steps):
        state, metrics = step(state, jax.device_put(batch))
        max_load.append(float(metrics["max_load"]))
        advance()
    batches.close()

    @jax.jit
    def loads(model: Any, batch: Any) -> list[jax.Array]:
        grads, _ = jax.grad(objective, has_aux=True)(model, batch)
        return jax.tree.leaves(nnx.state(buffers.split(grads)[1]))

    total = None
    for batch in itertools.islice(data.validation(), cfg.held_out_batches):
        found = np.concatenate(
            [np.reshape(x, (-1, cfg.num_experts)) for x in loads(state.model, jax.device_put(batch))]
        )
        total = found if total is None else total + found
    assert total is not None
    batches = map(jax.device_put, itertools.islice(data.validation(), cfg.held_out_batches))
    held_out = evaluate(make_eval_step(objective), state.model, batches, data.tokenizer.token_bytes)
    shares = total / total.mean(axis=1, keepdims=True)
    return Result(
        held_out_loss=held_out.loss, loads=np.round(shares, 4).tolist(), max_load=np.round(max_load, 3).tolist()
    )


def plot(cfg: ExpertBalance, results: dict[str, list[Result]]) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, seeds), color in zip(results.items(), ("C1", "C0"), strict=True):
        window = max(cfg.num_steps // 50, 1)
        smooth = [np.convolve(seed.max_load, np.full(window, 1 / window), mode="valid") for seed in seeds]
        steps = np.arange(window, cfg.num_steps + 1)
        left.plot(steps, np.mean(smooth, axis=0), color=color, label=name)
        left.fill_between(steps, np.min(smooth, axis=0), np.max(smooth, axis=0), color=color, alpha=0.2)
        loss = np.mean([seed.held_out_loss for seed in seeds])
        for i, layer in enumerate(layer for seed in seeds for layer in seed.loads):
            label = f"{name}: loss {loss:.3f}" if i == 0 else None
            right.plot(range(1, cfg.num_experts + 1), sorted(layer, reverse=True), color=color, alpha=0.6, label=label)
    left.set(
        xlabel="step", ylabel="largest load / mean", title="Training batches, mean of the layers", ylim=(0.9, None)
    )
    right.set(xlabel="expert, from the most to the least used", ylabel="load / mean", title="Held-out text, each layer")
    for axes in (left, right):
        axes.axhline(1.0, color="0.4", linestyle=":")
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main(tyro.cli(ExpertBalance))
