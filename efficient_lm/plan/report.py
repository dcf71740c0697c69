"""What a plan says, for people: tables and a picture of memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from efficient_lm.console import console, count
from efficient_lm.console import table as console_table
from efficient_lm.topologies import GIB, Target

if TYPE_CHECKING:
    from efficient_lm.plan.decoding import Decoding
    from efficient_lm.plan.step import Plan
    from efficient_lm.plan.sweep import Candidate

MIB = 2**20


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


class SweepProgress:
    """A bar with what is being compiled and the time left on a terminal; and a line for each result."""

    def __init__(self, number: int):
        self._number, self._done, self._seconds = number, 0, []
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=number, left="")

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def compiling(self, name: str) -> None:
        self._bar.update(self._task, description=name)

    def compiled(self, seconds: float | None) -> None:
        """Counts one that took this long; None: it was there, or was passed over."""
        self._done += 1
        self._seconds += [] if seconds is None else [seconds]
        self._bar.update(self._task, completed=self._done, left=self._left())

    def report(self, candidate: Candidate) -> None:
        plan = candidate.plan
        if plan is None:
            said = candidate.rejected
        elif plan.fits:
            said = f"fits, at most {count(plan.tokens_per_second)} tokens/s"
        else:
            said = verdict(plan)
        left = "" if console.is_terminal else f" {self._left()}"
        console.print(f"{self._done}/{self._number} {candidate.name}: {said}{left}", markup=False)

    def _left(self) -> str:
        if not self._seconds or self._done == self._number:
            return ""
        seconds = sum(self._seconds) / len(self._seconds) * (self._number - self._done)
        return f"(about {seconds / 60:.0f} min left)" if seconds > 90 else f"(about {seconds:.0f} s left)"


def print_sweep(ranked: Sequence[Candidate], target: Target) -> None:
    """Prints what was compiled, the best first, then what was not and why."""
    memory = f"GiB of {target.chip.memory_bytes / GIB:.0f}"
    table = console_table(
        f"training steps on {target.name}",
        left=("mesh", "remat"),
        right=(memory, "tokens/s", "MFU"),
        caption="speeds are upper bounds",
    )
    table.add_column("bound by", no_wrap=True)
    for candidate in ranked:
        if (plan := candidate.plan) is not None:
            speed = (count(plan.tokens_per_second), f"{plan.mfu:.0%}", plan.bound)
            speed = speed if plan.fits else ("", "", "does not fit")
            table.add_row(_short(candidate.mesh), candidate.remat, f"{plan.peak_bytes / GIB:.2f}", *speed)
    if table.row_count:
        console.print(table)
    reasons: dict[tuple[str, str], list[str]] = {}
    for candidate in ranked:
        if candidate.plan is None:
            reasons.setdefault((_short(candidate.mesh), candidate.rejected), []).append(candidate.remat)
    if reasons:
        table = console_table("without a plan", left=("mesh", "remat"), right=())
        table.add_column("why", overflow="fold")
        for (mesh, reason), remats in reasons.items():
            table.add_row(mesh, "any" if len(remats) == 3 else ", ".join(remats), reason)
        console.print(table, soft_wrap=False)


def _short(mesh: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.items())


def print_decoding(decoding: Decoding) -> None:
    mesh, chip = _short(decoding.mesh), f"GiB of {decoding.chip_bytes / GIB:.0f}"
    total, part = decoding.parameter_bytes / GIB, decoding.device_parameter_bytes / GIB
    console.print(
        f"{count(float(decoding.num_parameters))} parameters on {decoding.on} as {mesh}: {total:.2f} GiB in "
        f"{decoding.dtype}, {part:.2f} of them on a device"
    )
    table = console_table("states of a sequence", left=(), right=("context", "MiB", "MiB on a device", "largest batch"))
    for context in decoding.contexts:
        sizes = context.state_bytes / MIB, context.device_bytes / MIB
        table.add_row(f"{context.context:,}", *(f"{size:,.2f}" for size in sizes), f"{context.largest_batch:,}")
    console.print(table)
    table = console_table(
        "the next token of each sequence",
        left=(),
        right=("context", "batch", chip, "ms", "tokens/s"),
        caption="times are floors, speeds are upper bounds",
    )
    table.add_column("bound by", no_wrap=True)
    for token in decoding.tokens:
        row = f"{token.context:,}", f"{token.batch_size:,}", f"{token.peak_bytes / GIB:.2f}"
        milliseconds = f"{token.seconds[token.bound] * 1e3:#.3g}"
        speed = (milliseconds, count(token.tokens_per_second), token.bound)
        table.add_row(*row, *(speed if token.fits else ("", "", "does not fit")))
    console.print(table)
    if decoding.rows > 1:
        console.print(f"note: batches are multiples of {decoding.rows}, for the devices along data and expert")
    if math.prod(decoding.mesh.values()) > 1:
        console.print("note: what devices send each other for every token is not counted")
    if decoding.mesh.get("data", 1) > 1:
        console.print("note: weights lie in parts along data, as they are trained; each device reads its own part here")


def plot_decoding(decoding: Decoding, path: Path) -> None:
    """Draws the states of a sequence against its length, and speed against the batch."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    free = (decoding.chip_bytes - decoding.device_parameter_bytes) / GIB
    sizes = [context.device_bytes / GIB for context in decoding.contexts]
    left.plot([context.context for context in decoding.contexts], sizes, "o-")
    left.axhline(free, color="0.2", linestyle="--", label=f"beside parameters: {free:.2f} GiB")
    left.set(xscale="log", yscale="log", xlabel="context", ylabel="GiB on a device", title="states of a sequence")
    left.legend(frameon=False, fontsize="small")
    for context in decoding.contexts:
        tokens = [token for token in decoding.tokens if token.context == context.context and token.fits]
        speeds = [token.tokens_per_second for token in tokens]
        right.plot([token.batch_size for token in tokens], speeds, "o-", label=f"{context.context:,}")
    right.set(xscale="log", yscale="log", xlabel="batch", ylabel="tokens/s at most", title=f"decoding on {decoding.on}")
    right.legend(title="context", frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
