"""Speed on a CPU, beside transformers: `python -m benchmarks.cpu --torch-python ~/oracle/torch/bin/python`.

One Gated DeltaNet layer and one layer of attention (Qwen3-Next without experts), float32, the same sizes, threads and
tokens on both sides, and the same settings of the C library's memory, measured in turns. Ours is what a user runs: the
step of the trainer, and `generate`.
"""

from efficient_lm.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()

import collections
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from efficient_lm.config import TrainConfig
from efficient_lm.data import Batch
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, GatedDeltaNetConfig
from efficient_lm.model import BlockConfig, LanguageModel, ModelConfig
from efficient_lm.objectives import NextTokenConfig
from efficient_lm.optimizer import AdamWConfig, CosineConfig
from efficient_lm.rotary import RotaryConfig
from efficient_lm.sampling import SamplingConfig, generate
from efficient_lm.training import init_state, make_train_step

TORCH_HALF = pathlib.Path(__file__).parent / "torch_qwen3_next.py"
TOKENS_AT_ONCE = 16

type Seconds = dict[str, list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    vocab_size: int = 320
    d_model: int = 512
    d_ff: int = 1408
    num_key_heads: int = 4
    """Of Gated DeltaNet, as the next three."""
    num_value_heads: int = 8
    key_dim: int = 64
    value_dim: int = 64
    num_heads: int = 8
    """Of attention, as the next two."""
    num_kv_heads: int = 2
    head_dim: int = 64
    batch_size: int = 4
    seq_len: int = 512
    prompt_tokens: int = 128
    decode_tokens: int = 64


# A model with the same parameters in number, none of which takes time: what is left is the cost of a call.
TINY = Sizes(
    d_model=16,
    d_ff=16,
    num_key_heads=1,
    num_value_heads=1,
    key_dim=8,
    value_dim=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    batch_size=1,
    seq_len=8,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measures training and decoding on this machine's CPU."""

    torch_python: str | None = None
    """Interpreter that has torch and transformers; None: our side alone."""
    sizes: Sizes = Sizes()
    threads: int = 2
    rounds: int = 3
    """Each side runs once per round, in turns."""
    measurements: int = 3
    """Per round."""
    decode_batch_sizes: tuple[int, ...] = (1, 8)
    output: pathlib.Path = pathlib.Path(__file__).parent / "results" / "cpu.json"


def main(cfg: Benchmark) -> None:
    # Before the first array: both sides, ours and the process we start, size their thread pools by it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: cfg.threads])
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    # Of all processes in the minute before: a busy machine makes every number below worthless.
    load = os.getloadavg()[0]
    if load > 1:
        console.print(f"[yellow]the machine is busy (load {load:.1f}): close what runs beside this[/yellow]")
    ours, theirs = collections.defaultdict(list), collections.defaultdict(list)
    num_parameters, measure_ours = our_half(cfg)
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    their_versions = {}

    for round_number in range(cfg.rounds):
        with console.status(f"round {round_number + 1} of {cfg.rounds}"):
            for name, seconds in measure_ours():
                ours[name] += seconds
            if cfg.torch_python is not None:
                answer = run_torch_half(cfg)
                if answer["num_parameters"] != num_parameters:
                    raise ValueError(f"models differ: {num_parameters} and {answer['num_parameters']} parameters")
                their_versions = answer["versions"]
                for name, seconds in answer["seconds"].items():
                    theirs[name] += seconds

    results = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": cfg.threads,
        "load_before": load,
        "sizes": dataclasses.asdict(cfg.sizes),
        "num_parameters": num_parameters,
        "efficient_lm": {"versions": versions, "seconds": ours, "tokens_per_second": tokens_per_second(cfg, ours)},
        "transformers": {
            "versions": their_versions,
            "seconds": theirs,
            "tokens_per_second": tokens_per_second(cfg, theirs),
        },
    }
    cfg.output.parent.mkdir(parents=True, exist_ok=True)
    cfg.output.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table(cfg, results))
    console.print(f"medians of {cfg.rounds} x {cfg.measurements}; all numbers are in {cfg.output}")


def our_half(cfg: Benchmark) -> tuple[int, Callable[[], Iterator[tuple[str, list[float]]]]]:
    """Returns the number of parameters, and a function that measures one round."""
    step, call = training_step(cfg.sizes)
    tiny_step, _ = training_step(TINY)
    model = model_config(cfg.sizes).build(rngs=nnx.Rngs(0))

    def measure_round() -> Iterator[tuple[str, list[float]]]:
        yield "train", measure(step, cfg.measurements)
        yield "call", measure(call, cfg.measurements)
        yield "tiny_step", measure(tiny_step, 10 * cfg.measurements)
        for batch_size in cfg.decode_batch_sizes:
            yield f"decode_{batch_size}", measure(decoding(model, cfg.sizes, batch_size), cfg.measurements)

    return sum(leaf.size for leaf in jax.tree.leaves(model)), measure_round


def model_config(sizes: Sizes) -> ModelConfig:
    gated_deltanet = GatedDeltaNetConfig(
        num_heads=sizes.num_value_heads,
        num_key_heads=sizes.num_key_heads,
        key_dim=sizes.key_dim,
        value_dim=sizes.value_dim,
    )
    attention = AttentionConfig(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        rotary=RotaryConfig(fraction=0.25),
        qk_norm=True,
        output_gate=True,
    )
    ffn = MLPConfig(d_ff=sizes.d_ff)
    return ModelConfig(
        vocab_size=sizes.vocab_size,
        d_model=sizes.d_model,
        blocks={"M": BlockConfig(mixer=gated_deltanet, ffn=ffn), "A": BlockConfig(mixer=attention, ffn=ffn)},
        pattern="M A",
        num_periods=1,
        dtype="float32",
        remat="nothing",
    )


def training_step(sizes: Sizes) -> tuple[Callable[[], None], Callable[[], float]]:
    """Returns two functions that take a step on random tokens; the second says how long the call took to return."""
    optimizer = AdamWConfig(learning_rate=1e-3, schedule=CosineConfig())
    cfg = TrainConfig(
        model=model_config(sizes),
        optimizer=optimizer,
        num_steps=10_000,
        batch_size=sizes.batch_size,
        seq_len=sizes.seq_len,
    )
    transformation, _ = optimizer.build(cfg.num_steps)
    train_step = make_train_step(cfg, NextTokenConfig().build(), transformation)
    state = jax.jit(lambda: init_state(cfg, transformation))()
    shape = (sizes.batch_size, sizes.seq_len + 1)
    tokens = np.random.default_rng(0).integers(sizes.vocab_size, size=shape, dtype=np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones(tokens[:, 1:].shape, np.int32))

    def step() -> None:
        nonlocal state
        state, metrics = train_step(state, batch)
        assert np.isfinite(float(metrics["loss"]))
        jax.block_until_ready(state)

    def call() -> float:
        nonlocal state
        start = time.perf_counter()
        state, _ = train_step(state, batch)
        seconds = time.perf_counter() - start
        jax.block_until_ready(state)
        return seconds

    return step, call


def decoding(model: LanguageModel, sizes: Sizes, batch_size: int) -> Callable[[], float]:
    """Returns a function that reads a prompt, then decodes greedily, and says how long the decoding took."""
    shape = (batch_size, sizes.prompt_tokens)
    prompts = np.random.default_rng(0).integers(sizes.vocab_size, size=shape).tolist()
    sampling = SamplingConfig(max_tokens=TOKENS_AT_ONCE + sizes.decode_tokens, temperature=0.0)

    def decode() -> float:
        pieces = generate(model, prompts, jax.random.key(0), sampling, tokens_at_once=TOKENS_AT_ONCE)
        # The first piece comes with the reading of the prompt.
        next(pieces)
        start = time.perf_counter()
        num_tokens = sum(piece.shape[1] for piece in pieces)
        assert num_tokens == sizes.decode_tokens
        return time.perf_counter() - start

    return decode


def measure(run: Callable[[], float | None], num_measurements: int) -> list[float]:
    """Returns seconds per call after one call that warms up: those that `run` returns, or those that it takes."""
    seconds = []
    for _ in range(num_measurements + 1):
        start = time.perf_counter()
        own = run()
        seconds.append(time.perf_counter() - start if own is None else own)
    return seconds[1:]


def run_torch_half(cfg: Benchmark) -> dict[str, Any]:
    assert cfg.torch_python is not None
    command = [cfg.torch_python, str(TORCH_HALF), "--num-measurements", str(cfg.measurements)]
    command += [
        "--sizes",
        json.dumps(dataclasses.asdict(cfg.sizes)),
        "--tiny-sizes",
        json.dumps(dataclasses.asdict(TINY)),
    ]
    command += ["--decode-batch-sizes", json.dumps(cfg.decode_batch_sizes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def tokens_per_second(cfg: Benchmark, seconds: Seconds) -> dict[str, float]:
    tokens = {"train": cfg.sizes.batch_size * cfg.sizes.seq_len}
    tokens |= {f"decode_{batch_size}": batch_size * cfg.sizes.decode_tokens for batch_size in cfg.decode_batch_sizes}
    return {name: tokens[name] / statistics.median(seconds[name]) for name in tokens if name in seconds}


def table(cfg: Benchmark, results: dict[str, Any]) -> Table:
    ours, theirs = results["efficient_lm"], results["transformers"]
    table = Table(title=f"{results['cpu']}, {cfg.threads} threads, {results['num_parameters']:,} parameters, float32")
    for column in ("", "efficient_lm", "transformers", "faster by"):
        table.add_column(column, justify="right" if column else "left")

    titles = {"train": f"training, {cfg.sizes.batch_size} x {cfg.sizes.seq_len}, tokens/s"}
    titles |= {f"decode_{n}": f"decoding, batch {n}, tokens/s" for n in cfg.decode_batch_sizes}
    for name, title in titles.items():
        values = [side["tokens_per_second"].get(name) for side in (ours, theirs)]
        ratio = values[0] / values[1] if values[1] else None
        table.add_row(title, *(f"{x:,.0f}" if x else "-" for x in values), f"{ratio:.2f} x" if ratio else "-")

    titles = {"tiny_step": "step of a tiny model, ms", "call": "call of a step until it returns, ms"}
    for name, title in titles.items():
        medians = [
            statistics.median(side["seconds"][name]) if name in side["seconds"] else None for side in (ours, theirs)
        ]
        ratio = medians[1] / medians[0] if medians[0] and medians[1] else None
        table.add_row(title, *(f"{1e3 * x:,.2f}" if x else "-" for x in medians), f"{ratio:.2f} x" if ratio else "-")
    return table


def cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
