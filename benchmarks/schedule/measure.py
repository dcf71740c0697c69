"""From a program to its cycles: compiles it, reads the schedules of its kernels, adds what XLA does around them."""

import contextlib
import dataclasses
import pathlib
import re
import tempfile
import types
from collections.abc import Mapping

from benchmarks.schedule import compile, hlo
from benchmarks.schedule.bundles import read_bundles, read_slots
from benchmarks.schedule.chips import Chip
from benchmarks.schedule.cost import Cost, cost
from benchmarks.schedule.pallas import Kernel

_BUNDLES, _SLOTS = r"final_bundles\.txt", r"final_hlo-static-per-bundle-utilization\.txt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCost:
    name: str
    calls: int
    cost: Cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Cycles of a whole program."""

    cycles: float
    kernels: list[KernelCost]
    glue: float
    """What XLA does around the kernels; all of a program without any."""
    floor: float
    """To read the arguments and write the results once, at full bandwidth."""
    temporary_bytes: int
    versions: dict[str, str]
    remarks: list[str]


def measure(
    job: compile.Job,
    chip: Chip,
    branches_taken: float = 1.0,
    trips_by_data: int | None = None,
    kernel_trips_by_data: Mapping[str, float] = types.MappingProxyType({}),
    keep: pathlib.Path | None = None,
) -> Measurement:
    """Compiles and reads; the dump stays in `keep` if given.

    Args:
      branches_taken: how often a kernel takes a branch that depends on data.
      trips_by_data: how often an XLA loop runs whose length depends on data.
      kernel_trips_by_data: the same of loops in kernels, on average, by what is in the names of the kernels.

    Raises:
      RuntimeError: it does not compile.
      ValueError: the dump is not what this reads.
    """
    with contextlib.nullcontext(str(keep)) if keep else tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        answer = compile.run(job, chip.topology, folder)
        program = (folder / "program.hlo").read_text()
        traced = [Kernel(**kernel | {"grid": tuple(kernel["grid"])}) for kernel in answer["kernels"]]
        kernels, remarks = [], []
        for call, kernel in match(hlo.kernel_calls(program), traced):
            bundles, (_, slots) = read_bundles(_read(folder, call, _BUNDLES)), read_slots(_read(folder, call, _SLOTS))
            hbm_bytes = kernel.hbm_bytes - (1 - branches_taken) * kernel.hbm_bytes_by_data
            trips = next((trips for name, trips in kernel_trips_by_data.items() if name in kernel.name), None)
            costs = cost(bundles, slots, kernel.grid, hbm_bytes, chip, branches_taken, trips)
            kernels.append(KernelCost(name=call, calls=kernel.calls, cost=costs))
            if kernel.copies_by_hand:
                remarks.append(f"{call} copies by hand as well: its bandwidth floor is too low")
        shapes, by_shape = hlo.sorts(program), {}
        for name, shape in shapes.items():
            if _find(folder, name, _BUNDLES):
                bundles, (_, slots) = (
                    read_bundles(_read(folder, name, _BUNDLES)),
                    read_slots(_read(folder, name, _SLOTS)),
                )
                by_shape[shape] = cost(bundles, slots, (), 0, chip).cycles
        sorts = {name: by_shape[shape] for name, shape in shapes.items()}
    glue, num_unknown = hlo.glue_cycles(program, trips_by_data, sorts)
    remarks += [f"{kernel.name}: {remark}" for kernel in kernels for remark in kernel.cost.remarks]
    remarks += [f"{num_unknown} loops have an unknown length and count once"] * (num_unknown > 0)
    return Measurement(
        cycles=glue + sum(kernel.calls * kernel.cost.cycles for kernel in kernels),
        kernels=kernels,
        glue=glue,
        floor=answer["argument_and_output_bytes"] / chip.hbm_bytes_per_cycle,
        temporary_bytes=answer["temporary_bytes"],
        versions=answer["versions"],
        remarks=remarks,
    )


def match(calls: list[tuple[str, str]], kernels: list[Kernel]) -> list[tuple[str, Kernel]]:
    """Returns each call of a kernel in the program with the kernel as it was traced.

    By name, and kernels of one name in order. Those without a name are told by their order alone. JAX 0.11 names a
    kernel that was differentiated `jvp(name)`.

    Raises:
      ValueError: a call has no kernel.
    """
    waiting: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        waiting.setdefault(kernel.name, []).append(kernel)
    pairs = []
    for call, name in calls:
        name = re.sub(r"^(?:\w+\()+|\)+$", "", name)
        same = waiting.get(name, waiting.get("", []))
        if not same:
            raise ValueError(f"{call} ({name}) is none of the kernels {', '.join(waiting)}")
        pairs.append((call, same.pop(0)))
    return pairs


def _find(folder: pathlib.Path, call: str, kind: str) -> list[pathlib.Path]:
    # A time, the name of the instruction, the number of the pass, the pass.
    pattern = re.compile(rf"\d+-{re.escape(call)}-\d+-{kind}")
    return [path for path in (folder / "llo").iterdir() if pattern.fullmatch(path.name)]


def _read(folder: pathlib.Path, call: str, kind: str) -> str:
    found = _find(folder, call, kind)
    if len(found) != 1:
        raise ValueError(f"libtpu left {len(found)} files {kind} of {call}")
    return found[0].read_text(errors="replace")
