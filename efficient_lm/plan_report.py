"""What a plan says, for people: tables and a picture of memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from rich.table import Table

from efficient_lm.console import console, count
from efficient_lm.console import table as console_table
from efficient_lm.topologies import GIB

if TYPE_CHECKING:
    from efficient_lm.plan import Plan


def print_plan(plan: Plan) -> None:
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    rows = f"{plan.batch_size} rows of {plan.seq_len} tokens"
    console.print(f"{count(float(plan.num_parameters))} parameters on {plan.on} as {mesh}: {rows}")
    console.print(_memory_table(plan))
    console.print(verdict(plan), style="bold green" if plan.fits else "bold red")
    if plan.collectives:
        console.print(_collectives_table(plan))
    if plan.fits:
        console.print(_time_table(plan))
        console.print(
            f"at most {count(plan.tokens_per_second)} tokens/s, {count(plan.tokens_per_second * 86400)} tokens/day, "
            f"{plan.mfu:.0%} MFU: bound by {plan.bound}"
        )
    for remark in plan.remarks:
        console.print(f"note: {remark}")
    console.print(f"traced in {plan.seconds_to_trace:.0f} s, compiled in {plan.seconds_to_compile:.0f} s")


def verdict(plan: Plan) -> str:
    """Returns a line: does it fit?"""
    spare = plan.chip_bytes - plan.peak_bytes
    if plan.fits:
        return f"fits: {spare / GIB:.2f} GiB to spare of {plan.chip_bytes / GIB:.2f}"
    return f"does not fit: {-spare / GIB:.2f} GiB more than the {plan.chip_bytes / GIB:.2f} there are"


def _memory_table(plan: Plan) -> Table:
    table = console_table("memory of a device", left=("",), right=("GiB", "bytes"))
    for name, size in plan.memory.items():
        table.add_row(name, f"{size / GIB:.3f}", f"{size:,}")
    table.add_row("[bold]peak[/bold]", f"[bold]{plan.peak_bytes / GIB:.3f}[/bold]", f"{plan.peak_bytes:,}")
    return table


def _collectives_table(plan: Plan) -> Table:
    left, right = ("collective", "across"), ("number", "GiB received")
    table = console_table("sent in a step, by a device", left=left, right=right)
    for collective in plan.collectives:
        across = " x ".join(collective.axes)
        table.add_row(collective.kind, across, str(collective.count), f"{collective.bytes / GIB:.3f}")
    return table


def _time_table(plan: Plan) -> Table:
    table = console_table("floors of a step's time", left=("",), right=("ms", "of"))
    work = {"computing": f"{plan.executed_flops:.3g} FLOPs", "memory": f"{plan.traffic_bytes / GIB:.3g} GiB a device"}
    for name, seconds in plan.seconds.items():
        table.add_row(name, f"{seconds * 1e3:.1f}", work.get(name, ""))
    return table


def plot_memory(plan: Plan, path: Path) -> None:
    """Draws the memory of a device as a stack, beside what there is."""
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for name, size in plan.memory.items():
        axes.barh([0], [size / GIB], left=left, label=f"{name}: {size / GIB:.2f}")
        left += size / GIB
    axes.axvline(plan.chip_bytes / GIB, color="0.2", linestyle="--", label=f"there is: {plan.chip_bytes / GIB:.2f}")
    axes.set(xlabel="GiB of one device", yticks=[], title=f"{plan.on}: {verdict(plan)}")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
