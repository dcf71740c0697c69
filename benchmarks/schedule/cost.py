"""The time of one kernel, by its schedule and by its traffic."""

import dataclasses
import math
import re
from collections import defaultdict, deque
from collections.abc import Iterator

from benchmarks.schedule.bundles import Branch, Bundle, Loop, find_branches, find_loops
from benchmarks.schedule.chips import Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one call, in cycles; those that end in `_step` of one step of the grid."""

    cycles: float
    """The larger of schedule and bandwidth floor."""
    schedule: float
    hbm_floor: float
    steps: int
    bundles_step: float
    mxu_step: float
    """What the busiest matrix unit needs."""
    mxu_occupancy: float
    """Of all matrix units; counts padding and small tiles as work."""
    fills_step: float
    spills_step: float
    remarks: tuple[str, ...]


def cost(
    bundles: list[Bundle],
    slots: list[dict[str, int]],
    grid: tuple[int, ...],
    hbm_bytes: float,
    chip: Chip,
    branches_taken: float = 1.0,
    trips_by_data: float | None = None,
) -> Cost:
    """Returns what one call costs, if it waits for memory at no time but when bandwidth is what it lacks.

    Args:
      slots: those that each bundle fills.
      branches_taken: how often a branch is taken that depends on data. Of the two sides of one test, the one that
        costs less is: as of the conditionals of XLA.
      trips_by_data: how often, on average, a loop runs whose length depends on data.
    """
    steps = math.prod(grid)
    loops = [
        dataclasses.replace(loop, trips=trips_by_data) if loop.trips is None and loop.depth > 1 else loop
        for loop in find_loops(bundles)
    ]
    body, cores, remarks = _grid_loop(loops, bundles, steps, chip)
    remarks += ["a loop has an unknown number of trips"] * any(loop.trips is None for loop in loops if loop != body)

    # How often each bundle issues in a step.
    issues = [1.0] * len(bundles)
    for loop in loops:
        if loop != body:
            for i in range(loop.first, loop.last + 1):
                issues[i] *= loop.trips or 1
    outside = sum(issues[: body.first]) + sum(issues[body.last + 1 :])
    usual = [True] * len(bundles)
    branches = find_branches(bundles, body, grid)
    bundles_of = lambda branch: sum(issues[branch.first : branch.last + 1])
    dearer = {max(sides, key=bundles_of) for sides in _both_sides(branches)}
    for branch in branches:
        chance = 0.0 if branch in dearer else branches_taken if branch.chance is None else branch.chance
        for i in range(branch.first, branch.last + 1):
            issues[i] *= chance
            usual[i] &= branch not in dearer and (branch.chance is None or branch.chance > 0.5)

    inside = range(body.first, body.last + 1)
    bundles_step = sum(issues[i] for i in inside)
    matmuls = {i: list(_matmuls(bundles[i].text)) for i in inside}
    busy: dict[int, float] = defaultdict(float)
    for i in inside:
        for unit, is_result, is_float32 in matmuls[i]:
            if not is_result:
                busy[unit] += issues[i] * (chip.vmatmul_cycles // (2 if is_float32 else 1))
    mxu_step = max(busy.values(), default=0.0)
    order = [i for i in _unroll(body, loops) if usual[i]]
    waits = _simulate(order, matmuls, chip) / len(order) if busy else 1.0
    step = max(bundles_step * max(1.0, waits), mxu_step)

    schedule = step * steps / cores + outside
    hbm_floor = hbm_bytes / chip.hbm_bytes_per_cycle
    return Cost(
        cycles=max(schedule, hbm_floor),
        schedule=schedule,
        hbm_floor=hbm_floor,
        steps=steps,
        bundles_step=bundles_step,
        mxu_step=mxu_step,
        mxu_occupancy=sum(busy.values()) / (chip.num_mxus * step),
        fills_step=sum(issues[i] * slots[i]["VLOAD:FILL"] for i in inside),
        spills_step=sum(issues[i] * slots[i]["VSTORE:SPILL"] for i in inside),
        remarks=tuple(remarks),
    )


def _both_sides(branches: list[Branch]) -> list[tuple[Branch, Branch]]:
    by_predicate = {branch.predicate: branch for branch in branches if branch.chance is None}
    return [(branch, by_predicate[f"!{p}"]) for p, branch in by_predicate.items() if f"!{p}" in by_predicate]


def _grid_loop(loops: list[Loop], bundles: list[Bundle], steps: int, chip: Chip) -> tuple[Loop, int, list[str]]:
    """Returns the loop that walks the grid, how many cores share it, and what is uncertain about it."""
    outer = [loop for loop in loops if loop.depth == 1]
    for loop in outer if steps > 1 else []:
        for cores in (1, chip.num_cores):
            # The pipeline walks a few steps more, which only copy.
            if loop.trips is not None and steps / cores <= loop.trips <= steps / cores + 4:
                return loop, cores, []
    if steps > 1 and outer:
        return max(outer, key=lambda loop: loop.last - loop.first), 1, ["the grid's loop is a guess"]
    whole = Loop(0, len(bundles) - 1, 0, 1)
    return whole, 1, ["the grid's loop was not found"] if steps > 1 else []


def _matmuls(text: str) -> Iterator[tuple[int, bool, bool]]:
    """Yields, of each vector matmul and each fetch of results: the unit, whether it is a fetch, whether float32."""
    for fetch, multiply in re.findall(r"= (vpop\.\w+\.mr\w+\S*)|\b(vmatmul\.\S+)", text):
        unit = re.search(r"mxu(\d)", fetch or multiply)
        yield int(unit[1]) if unit else 0, bool(fetch), ".f32" in multiply


def _unroll(body: Loop, loops: list[Loop]) -> list[int]:
    """Returns the bundles of one step in the order in which they issue, inner loops repeated."""
    inner = {loop.first: loop for loop in reversed(loops) if body.first <= loop.first and loop.last <= body.last}
    inner.pop(body.first, None)

    def walk(first: int, last: int) -> Iterator[int]:
        i = first
        while i <= last:
            loop = inner.get(i)
            if loop is None or i == first != body.first:
                yield i
                i += 1
            else:
                for _ in range(round(loop.trips or 1)):
                    yield from walk(loop.first, loop.last)
                i = loop.last + 1

    return list(walk(body.first, body.last))


def _simulate(order: list[int], matmuls: dict[int, list[tuple[int, bool, bool]]], chip: Chip) -> int:
    """Returns the cycles of a step in which a fetch waits until its vector matmul has gone through its unit.

    Bundles issue in order, one a cycle. The scheduler issues vector matmuls faster than a unit takes them, and counts
    on the hardware to wait.
    """
    time, marks = 0, []
    free: dict[int, int] = defaultdict(int)
    results: dict[int, deque[int]] = defaultdict(deque)
    for _ in range(3):  # The first steps fill the pipeline.
        for i in order:
            time += 1
            for unit, is_fetch, is_float32 in matmuls[i]:
                if is_fetch:
                    if results[unit]:
                        time = max(time, results[unit].popleft())
                    continue
                cycles = chip.vmatmul_cycles // (2 if is_float32 else 1)
                start = max(time, free[unit])
                free[unit] = start + cycles
                parts = chip.results_per_vmatmul
                results[unit].extend(start + cycles * (part + 1) // parts for part in range(parts))
        marks.append(time)
    return marks[-1] - marks[-2]
