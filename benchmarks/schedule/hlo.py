"""Reads a compiled program: which kernels it calls, and what XLA does around them."""

import re
import types
from collections.abc import Mapping

# Computations start at the margin, instructions are indented by two; attributes may run over several lines.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^  (?=ROOT %|%)", re.MULTILINE)


def kernel_calls(hlo: str) -> list[tuple[str, str]]:
    """Returns, in order, the instructions that call kernels: their names, and the names of the kernels."""
    calls = []
    for instruction in _INSTRUCTION.split(hlo):
        if 'custom_call_target="tpu_custom_call"' in instruction:
            name = instruction.removeprefix("ROOT ").removeprefix("%").split(" ")[0]
            traced = re.search(r'op_name="[^"]*?([^"/]*)/pallas_call', instruction)
            calls.append((name, traced[1] if traced else ""))
    return calls


def sorts(hlo: str) -> dict[str, str]:
    """Returns what each instruction sorts; XLA estimates nothing of them. Two that sort the same are compiled once."""
    found = re.findall(r"^  (?:ROOT )?%([\w.\-]+) = (.*?) sort\(.*?dimensions=\{(\d+)\}", hlo, re.MULTILINE)
    return {name: f"{re.sub(r'{[^}]*}', '', shape)} along {axis}" for name, shape, axis in found}


def glue_cycles(
    hlo: str, trips_by_data: int | None = None, cycles_of: Mapping[str, float] = types.MappingProxyType({})
) -> tuple[float, int]:
    """Returns XLA's `estimated_cycles` of all but the kernels, and how many loops have an unknown length.

    Instructions without an estimate take `cycles_of` their names.

    Bodies of loops count as often as they run (`cost_analysis()` counts them once), and of a conditional the branch
    that costs less: the other one is for rows with padding between their tokens, which packing does not make.
    Loops whose length depends on data run `trips_by_data` times; without it they count once, and in the second result.
    """
    heads = list(_COMPUTATION.finditer(hlo))
    ends = [head.start() for head in heads[1:]] + [len(hlo)]
    computations = {
        head[2]: _INSTRUCTION.split(hlo[head.end() : end])[1:] for head, end in zip(heads, ends, strict=True)
    }
    (entry,) = [head[2] for head in heads if head[1]]
    num_unknown = 0

    def cycles(computation: str) -> float:
        nonlocal num_unknown
        total = 0.0
        for instruction in computations[computation]:
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", instruction)
            call = re.search(r" call\(.*to_apply=%?([\w.\-]+)", instruction)
            branches = re.search(r" conditional\(.*branch_computations=\{([^}]*)\}", instruction)
            estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction)
            if loop:
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction)
                trips = trips or re.search(r" s32\[\]\S* constant\((\d+)\)", "".join(computations[loop[1]]))
                num_unknown += trips is None and trips_by_data is None
                total += cycles(loop[2]) * (int(trips[1]) if trips else trips_by_data or 1)
            elif call:
                total += cycles(call[1])
            elif branches:
                total += min(cycles(branch.strip(" %")) for branch in branches[1].split(","))
            elif estimate:
                total += int(estimate[1])
            else:
                total += cycles_of.get(instruction.removeprefix("ROOT ").removeprefix("%").split(" ")[0], 0)
        return total

    return cycles(entry), num_unknown
