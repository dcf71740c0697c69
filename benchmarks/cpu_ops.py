"""The ops on a CPU, in chunks and token by token: `python -m benchmarks.cpu_ops`.

Forward and backward of `impl="xla"` beside `impl="ref"`, float32, one row with a state and documents, in turns.
"""

from efficient_lm.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import ops
from benchmarks.cpu import cpu_name

RECURRENCES = (
    "linear_attention",
    "linear_attention_channel",
    "delta_rule",
    "delta_rule_channel",
    "generalized_delta_rule",
    "diagonal_scan",
    "selective_scan",
    "short_conv",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measures forward and backward of the ops on this machine's CPU."""

    ops: tuple[str, ...] = RECURRENCES
    num_tokens: int = 4096
    num_heads: int = 2
    width: int = 64
    """Of keys and values."""
    channels: int = 256
    """Of the scans and the convolution."""
    documents: int = 4
    rounds: int = 5
    """Each form runs once per round, in turns; the fastest counts."""
    threads: int = 2
    output: pathlib.Path = pathlib.Path(__file__).parent / "results" / "cpu_ops.json"


def main(cfg: Benchmark) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: cfg.threads])  # Before XLA sizes its thread pool by it.
    jax.config.update("jax_platforms", "cpu")
    console, load = Console(), os.getloadavg()[0]
    if load > 1:
        console.print(f"[yellow]the machine is busy (load {load:.1f}): close what runs beside this[/yellow]")
    seconds = {name: measure(cfg, name) for name in track(cfg.ops, "measuring", console=console)}
    results = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "load_before": load,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "settings": {name: value for name, value in vars(cfg).items() if name != "output"},
        "seconds": seconds,
    }
    cfg.output.parent.mkdir(parents=True, exist_ok=True)
    cfg.output.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(title=f"{results['cpu']}, {cfg.threads} threads, {cfg.num_tokens} tokens, forward + backward, ms")
    for column in ("", "in chunks", "token by token", "faster by"):
        table.add_column(column, justify="right" if column else "left")
    for name, forms in seconds.items():
        xla, ref = min(forms["xla"]), min(forms["ref"])
        table.add_row(name, f"{1e3 * xla:.1f}", f"{1e3 * ref:.1f}", f"{ref / xla:.1f} x")
    console.print(table)
    console.print(f"the fastest of {cfg.rounds}; all numbers are in {cfg.output}")


def measure(cfg: Benchmark, name: str) -> dict[str, list[float]]:
    """Returns the seconds of each round by implementation."""
    case = ops.CASES[name].in_float32()
    sizes = {"T": cfg.num_tokens, "N": cfg.num_heads, "K": cfg.num_heads, "F": cfg.channels}
    sizes = {**ops.SIZES, "H": cfg.width, "P": cfg.width, **sizes}
    rng = np.random.default_rng(0)
    structs = zip(case.args, case.structs(case.ins, sizes), strict=True)
    args = [draw(rng, argument, x, cfg.documents) for argument, x in structs]
    cotangents = tuple(draw(rng, "cotangent", x, 1) for x in case.structs(case.outs, sizes))
    programs = {impl: jax.jit(ops.backward(case.forward(impl))) for impl in ("xla", "ref")}
    seconds = {impl: [] for impl in programs}
    for warm in range(cfg.rounds + 1):
        for impl, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(args, cotangents))
            if warm:
                seconds[impl].append(time.perf_counter() - start)
    return seconds


def draw(rng: np.random.Generator, name: str, x: jax.ShapeDtypeStruct, num_documents: int) -> jax.Array:
    """Returns numbers that an argument of this name may have."""
    if name == "segment_ids":
        ids = 1 + np.arange(x.shape[1]) * num_documents // x.shape[1]
        return jnp.asarray(np.broadcast_to(ids, x.shape), x.dtype)
    z = rng.normal(size=x.shape)
    unit = z / np.linalg.norm(z, axis=-1, keepdims=True)
    values: dict[str, Any] = {
        "g": -0.1 * np.abs(z),
        "beta": 1 / (1 + np.exp(-z)),
        "a": unit if z.ndim == 4 else 1 / (1 + np.exp(-2 - z)),  # of heads, or of a scan
        "b": unit,
        "A": -np.exp(z),
        "dt": 0.1 * np.abs(z),
        "k": unit,
    }
    return jnp.asarray(values.get(name, z), x.dtype)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
