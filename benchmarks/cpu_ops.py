"""The ops on a CPU, in chunks, token by token, and one token alone: `python -m benchmarks.cpu_ops`.

Forward and backward of `impl="xla"` beside `impl="ref"`, float32, one row with a state and documents, in turns. Then
one token for each of eight sequences, as decoding takes it, beside a copy of the state.
"""

from efficient_lm.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
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
DECODING = tuple(ops.DECODING)


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
    seconds: float = 0.5
    """What is faster runs for this long at least: a thread that wakes up late is much of two milliseconds."""
    decoding: tuple[str, ...] = DECODING
    decoding_rounds: int = 50
    threads: int = 2
    output: pathlib.Path = pathlib.Path(__file__).parent / "results" / "cpu_ops.json"


def main(cfg: Benchmark) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: cfg.threads])  # Before XLA sizes its thread pool by it.
    jax.config.update("jax_platforms", "cpu")
    console, load = Console(), os.getloadavg()[0]
    if load > 1:
        console.print(f"[yellow]the machine is busy (load {load:.1f}): close what runs beside this[/yellow]")
    seconds = {name: measure(cfg, name) for name in track(cfg.ops, "measuring", console=console)}
    decoding = {name: measure_decoding(cfg, name) for name in track(cfg.decoding, "one token", console=console)}
    results = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "load_before": load,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "settings": {name: value for name, value in vars(cfg).items() if name != "output"},
        "seconds": seconds,
        "decoding": decoding,
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
    table = Table(title="one token for each of 8 sequences, microseconds")
    for column in ("", "MB of state", "a token", "a copy of the state", "bytes moved / of state"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in decoding.items():
        times = [f"{1e6 * min(found[key]):.0f}" for key in ("seconds", "seconds_to_copy_the_state")]
        moved = found["bytes_accessed"] / found["state_bytes"]
        table.add_row(name, f"{found['state_bytes'] / 1e6:.2f}", *times, f"{moved:.1f}")
    console.print(table)
    console.print(f"the fastest of {cfg.rounds} or more and of {cfg.decoding_rounds}; all numbers are in {cfg.output}")


def measure(cfg: Benchmark, name: str) -> dict[str, list[float]]:
    """Returns the seconds of each round by implementation."""
    case, rng = ops.CASES[name].in_float32(), np.random.default_rng(0)
    sizes = {"T": cfg.num_tokens, "N": cfg.num_heads, "K": cfg.num_heads, "F": cfg.channels}
    sizes = {**ops.SIZES, "H": cfg.width, "P": cfg.width, **sizes}
    args = arguments(rng, case, sizes, cfg.documents)
    cotangents = tuple(draw(rng, "cotangent", x, 1) for x in case.structs(case.outs, sizes))
    programs = {impl: jax.jit(ops.backward(case.forward(impl))) for impl in ("xla", "ref")}
    calls = {impl: functools.partial(program, list(args.values()), cotangents) for impl, program in programs.items()}
    return in_turns(calls, cfg.rounds, cfg.seconds)


def measure_decoding(cfg: Benchmark, name: str) -> dict[str, Any]:
    """Returns bytes, and the seconds of each round, of one token and of a copy of the state, at the sizes of `ops`."""
    case = ops.CASES[name].in_float32()
    args = arguments(np.random.default_rng(0), case, ops.SIZES, 1)
    state = args.pop("state")
    step = lambda state, args: case.op(**args, state=state)
    compiled = jax.jit(step, donate_argnums=0).lower(state, args).compile()

    def run() -> jax.Array:
        nonlocal state
        _, state = compiled(state, args)
        return state

    copy = functools.partial(jax.jit(jnp.copy), state + 0)
    seconds = in_turns({"seconds": run, "seconds_to_copy_the_state": copy}, cfg.decoding_rounds)
    cost = compiled.cost_analysis()
    assert cost is not None
    return {"state_bytes": state.nbytes, "bytes_accessed": int(cost["bytes accessed"]), **seconds}


def arguments(
    rng: np.random.Generator, case: ops.Case, sizes: Mapping[str, int], num_documents: int
) -> dict[str, jax.Array]:
    structs = zip(case.args, case.structs(case.ins, sizes), strict=True)
    return {name: draw(rng, name, x, num_documents) for name, x in structs}


def in_turns(programs: dict[str, Callable[[], Any]], rounds: int, at_least: float = 0) -> dict[str, list[float]]:
    """Returns the seconds of each round by program, after one that warms up; as many as it takes for `at_least`."""
    seconds = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program())
    while min(map(len, seconds.values())) < rounds or sum(map(sum, seconds.values())) < at_least:
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            seconds[name].append(time.perf_counter() - start)
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
