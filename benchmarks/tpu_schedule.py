"""What each op costs on a TPU, by its compiler's final schedule; no TPU needed: `python -m benchmarks.tpu_schedule`.

Every op is compiled through its public function, with state and documents where it has them: by itself (`impl=None`),
as `impl="xla"` where that is another program, and beside the kernels of others. The compiler comes with
`pip install -e ".[aot]"`. Peers live in environments of their own, outside the repository:

    for peer in tokamax deltanet-tpu recurrentgemma; do
        python3.12 -m venv ~/peers/$peer
        ~/peers/$peer/bin/pip install "$peer[jax]" libtpu==0.0.52
    done
    python -m benchmarks.tpu_schedule --peers ~/peers
"""

import concurrent.futures
import dataclasses
import datetime
import json
import pathlib
import sys
import time
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from benchmarks import ops
from benchmarks.schedule import ours, peers
from benchmarks.schedule.chips import CHIPS
from benchmarks.schedule.compile import Job
from benchmarks.schedule.measure import measure

OURS, XLA = "efficient_lm", 'impl="xla"'
LIMITS = (
    "Nothing ran on a TPU. A kernel costs what the compiler's final schedule says, with the waits for matrix units "
    "that the schedule leaves to the hardware, or its traffic at the published bandwidth, whichever is more; the glue "
    "around kernels, and all of an XLA form, costs what XLA estimates. A schedule does not see: copies that come late, "
    "contention for HBM (85 to 90 % of its bandwidth is usual), bank conflicts, waits on semaphores, lower clocks, "
    "launches, how a pipeline fills, and that XLA may keep arrays of this size in VMEM between kernels. Compare "
    "programs by it; do not take it for time."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Reads the cost of every op from the schedules that libtpu makes for it."""

    ops: tuple[str, ...] = tuple(ops.CASES)
    chips: tuple[str, ...] = ("v5e", "v6e")
    xla: bool = True
    """Measure the XLA forms of what has kernels too."""
    peers: pathlib.Path | None = None
    """The folder of the peers' environments; None: only the peers that come with JAX."""
    compilers: int = 2
    """That run at a time."""
    keep: pathlib.Path | None = None
    """Folder for what libtpu leaves, to read it."""
    output: pathlib.Path = pathlib.Path(__file__).parent / "results" / "tpu_schedule.json"
    """What it holds of other ops, chips and peers stays."""


@dataclasses.dataclass(frozen=True)
class Run:
    chip: str
    case: str
    by: str
    job: Job

    @property
    def key(self) -> str:
        return "/".join((self.chip, self.case, self.by, "forward + backward" if self.job.backward else "forward"))


def main(cfg: Benchmark) -> None:
    for name, known in [(op, ops.CASES) for op in cfg.ops] + [(chip, CHIPS) for chip in cfg.chips]:
        if name not in known:
            sys.exit(f"{name!r} is not one of {', '.join(known)}")
    console = Console()
    for name, peer in peers.PEERS.items():
        if peer.case in cfg.ops and peer.python(cfg.peers) is None:
            console.print(f"without {name}: no {peer.package} in the folder of peers")
    runs, failed = list_runs(cfg), 0
    results = json.loads(cfg.output.read_text()) if cfg.output.exists() else {}
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console) as progress,
        concurrent.futures.ThreadPoolExecutor(cfg.compilers) as pool,
    ):
        bar = progress.add_task("compiling", total=len(runs))
        waiting = {pool.submit(measure_run, run, cfg.keep): run for run in runs}
        for future in concurrent.futures.as_completed(waiting):
            run = waiting[future]
            try:
                result = future.result()
                results[run.key] = result
                line = f"{result['cycles']:,.2f} cycles per {result['unit']}"
            except (RuntimeError, ValueError) as error:
                failed += run.by == OURS
                results[run.key] = {"error": str(error)}
                line = f"[red]failed[/red]: {escape(str(error))}"
            progress.console.print(f"{run.key}: {line}")
            progress.advance(bar)
            # After each: a run of all of them takes the better part of an hour.
            cfg.output.parent.mkdir(parents=True, exist_ok=True)
            cfg.output.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    for chip in cfg.chips:
        console.print(program_table(chip, [run for run in runs if run.chip == chip], results))
        console.print(kernel_table(chip, [run for run in runs if run.chip == chip], results))
    console.print(LIMITS)
    console.print(f"all numbers are in {cfg.output}")
    sys.exit(failed > 0)


def list_runs(cfg: Benchmark) -> list[Run]:
    """Returns the programs in the order of the table."""
    runs = []
    for chip in cfg.chips:
        for case in cfg.ops:
            jobs = [(OURS, Job(module=ours.__name__, name=case, backward=False))]
            if cfg.xla and ops.CASES[case].tpu_kernel:
                jobs.append((XLA, Job(module=ours.__name__, name=case, backward=False, impl="xla")))
            for name, peer in peers.PEERS.items():
                python = peer.python(cfg.peers)
                if peer.case == case and python is not None:
                    jobs.append((name, Job(module=peers.__name__, name=name, backward=False, python=python)))
            for by, job in jobs:
                runs += [Run(chip, case, by, job), Run(chip, case, by, dataclasses.replace(job, backward=True))]
    return runs


def measure_run(run: Run, keep: pathlib.Path | None) -> dict[str, Any]:
    case = ops.CASES[run.case]
    unit, num_units = case.unit(ops.SIZES)
    folder = keep / run.key.replace("/", "-").replace(" ", "").replace('"', "") if keep else None
    start = time.perf_counter()
    peer = peers.PEERS.get(run.by)
    branches_taken = peer.branches_taken if peer and peer.branches_taken is not None else case.branches_taken
    measurement = measure(run.job, CHIPS[run.chip], branches_taken, case.trips, case.kernel_trips, folder)
    per_unit = lambda cycles: round(cycles / num_units, 4)
    kernels = [
        {
            "name": kernel.name,
            "calls": kernel.calls,
            "cycles": per_unit(kernel.calls * kernel.cost.cycles),
            "schedule": per_unit(kernel.calls * kernel.cost.schedule),
            "hbm_floor": per_unit(kernel.calls * kernel.cost.hbm_floor),
            "of_one_call": dataclasses.asdict(kernel.cost),
        }
        for kernel in measurement.kernels
    ]
    return {
        "unit": unit,
        "cycles": per_unit(measurement.cycles),
        "glue": per_unit(measurement.glue),
        "floor": per_unit(measurement.floor),
        "kernels": kernels,
        "temporary_bytes": measurement.temporary_bytes,
        "remarks": measurement.remarks,
        "versions": measurement.versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds_to_compile": round(time.perf_counter() - start, 1),
    }


def program_table(chip: str, runs: list[Run], results: dict[str, Any]) -> Table:
    sizes = ", ".join(f"{letter}={size}" for letter, size in ops.SIZES.items() if letter in "BTNHP")
    caption = (
        "fwd, fwd+bwd: cycles of the whole program; glue: what of it is not kernels; floor: arguments and results once"
    )
    table = Table(title=f"{chip}, {sizes}, bfloat16", caption=caption)
    table.add_column("cycles per", overflow="fold")
    for column in ("fwd", "glue", "floor", "fwd+bwd", "glue", "floor"):
        table.add_column(column, justify="right", no_wrap=True)
    for forward, both in zip(runs[::2], runs[1::2], strict=True):
        if forward.by == OURS:
            table.add_section()
            table.add_row(f"[bold]{forward.case}[/bold], {ops.CASES[forward.case].unit(ops.SIZES)[0]}")
        found = [results[run.key].get(name) for run in (forward, both) for name in ("cycles", "glue", "floor")]
        table.add_row("  " + forward.by, *("failed" if number is None else f"{number:,.2f}" for number in found))
    return table


def kernel_table(chip: str, runs: list[Run], results: dict[str, Any]) -> Table:
    table = Table(title=f"{chip}: kernels of forward + backward; MXU: occupancy; fills and spills of one step")
    table.add_column("kernel", overflow="fold")
    for column in ("steps", "cycles", "schedule", "HBM floor", "MXU", "fills", "spills"):
        table.add_column(column, justify="right")
    for run in runs:
        for kernel in results[run.key].get("kernels", ()) if run.job.backward else ():
            one = kernel["of_one_call"]
            numbers = [f"{kernel[name]:,.2f}" for name in ("cycles", "schedule", "hbm_floor")]
            occupancy = [f"{one['mxu_occupancy']:.0%}", f"{one['fills_step']:,.0f}", f"{one['spills_step']:,.0f}"]
            table.add_row(f"{run.by}: {kernel['name']}", f"{one['steps']:,}", *numbers, *occupancy)
    return table


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
