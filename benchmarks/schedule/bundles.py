"""Reads a kernel's final schedule: its VLIW bundles with their loops and branches, and the slots that each one fills.

libtpu leaves two files per kernel, `*-final_bundles.txt` and `*-final_hlo-static-per-bundle-utilization.txt`. Neither
format is documented; this reads those of libtpu 0.0.52.
"""

import dataclasses
import math
import re


@dataclasses.dataclass
class Bundle:
    """What issues in one cycle."""

    starts_loop: bool
    depth: int
    text: str


@dataclasses.dataclass(frozen=True)
class Loop:
    first: int
    last: int
    depth: int
    trips: float | None
    """None: not known before the program runs."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """The bundles that a false predicate skips."""

    first: int
    last: int
    chance: float | None
    """Of being taken, where the predicate compares an index of the grid with a number; None: it depends on data."""
    predicate: str
    """That skips it. What starts with `!` is the other side of what does not."""


_HEAD = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{")
# The printer marks some bundles around a loop's branch back with a lower depth.
_GAP = 6
# Issued after a branch, whether or not it is taken.
_DELAY_SLOTS = 4
_PIPELINE = "pipeline-emitter-dma-wait"


def read_bundles(text: str) -> list[Bundle]:
    bundles: list[Bundle] = []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            depth = len(head[2])
            bundles.append(Bundle(head[1] in ("LB", "LH") and depth > 0, depth, line))
        elif bundles:
            bundles[-1].text += "\n" + line
    return bundles


def read_slots(text: str) -> tuple[dict[str, int], list[dict[str, int]]]:
    """Returns the slots of each kind in a bundle, and those that each bundle fills."""
    columns: list[str] = []
    rows: list[dict[str, int]] = []
    for line in text.splitlines():
        if line.startswith("MATMUL"):
            columns = [column.strip() for column in line.split(",")]
        elif columns and re.fullmatch(r"[\s\d]+", line):
            values = [int(value) for value in line.split()]
            if len(values) == len(columns):
                rows.append(dict(zip(columns, values, strict=True)))
    return rows[0], rows[1:]


def find_loops(bundles: list[Bundle]) -> list[Loop]:
    loops = []
    for first, bundle in enumerate(bundles):
        if not bundle.starts_loop:
            continue
        last = i = first
        while (i := i + 1) < len(bundles) and i - last <= _GAP:
            if bundles[i].depth < bundle.depth:
                continue
            if bundles[i].starts_loop and bundles[i].depth == bundle.depth:
                break
            last = i
        loops.append(Loop(first, last, bundle.depth, _trips(bundles, first, last)))
    return loops


def _trips(bundles: list[Bundle], first: int, last: int) -> int | None:
    text = "".join(bundle.text for bundle in bundles[first : last + 1])
    predicate = r"(?:\(!?%p\w+\), )?"
    tests = re.findall(rf"scmp\.\w+\.[su]32\.totalorder {predicate}(%s\w+), (\w+|%s\w+) /\* loop exit test", text)
    if not tests or not tests[-1][1].isdigit():
        return None
    counter, bound = tests[-1]  # That of the outermost loop comes last.
    step = re.search(re.escape(counter) + r" = sadd\.s32 (\d+), (%s\w+)", text)
    if step is None:
        return int(bound)
    start = 0
    entry = re.search(re.escape(step[2]) + r" = sphi (%s\w+|\d+), ", text)
    if entry:
        everything = "".join(bundle.text for bundle in bundles)
        value = re.search(re.escape(entry[1]) + r" = smov\.u32 (\d+)", everything)
        start = int(value[1]) if value else 0
    if int(step[1]) >= 2**31:  # Counts down.
        return None
    return max(1, math.ceil((int(bound) - start) / int(step[1])))


def find_branches(bundles: list[Bundle], loop: Loop, grid: tuple[int, ...]) -> list[Branch]:
    """Returns the branches in a loop (`pl.when`), but for those of the pipeline that feeds the kernel.

    One of them goes around all of a step: the pipeline walks a few trips more, in which it only copies.
    """
    first, last = loop.first, loop.last
    labels: dict[str, int] = {}
    for i in range(first, min(last + 8, len(bundles))):
        for region in re.findall(r"Start(?:/End empty)? region (\d+)", bundles[i].text):
            labels.setdefault(region, i)
    body = "".join(bundle.text for bundle in bundles[first : last + 1])
    branches = []
    for i in range(first, last + 1):
        for predicate, region in re.findall(r"sbr\.rel \((!?%p\w+)\) target = \$region(\d+)", bundles[i].text):
            target = labels.get(region, 0)
            inside = bundles[i + 1 + _DELAY_SLOTS : target]
            copies = _PIPELINE in "".join(bundle.text for bundle in inside)
            if inside and not copies and not _is_step(predicate, body, loop.trips):
                chance = _chance(predicate, body, grid)
                branches.append(Branch(i + 1 + _DELAY_SLOTS, target - 1, chance, predicate))
    return branches


def _is_step(predicate: str, body: str, trips: float | None) -> bool:
    """Whether it tells the steps of the grid from the trips before and after: `1 <= trip < trips - 1`."""
    both = re.search(re.escape(predicate) + r" = pnand (%p\w+), (%p\w+)", body)
    if not both or not trips:
        return False
    return any(re.search(rf"{name} = scmp\.lt\.s32\.totalorder %s\w+, {trips - 1}\b", body) for name in both.groups())


def _chance(predicate: str, body: str, grid: tuple[int, ...]) -> float | None:
    name = re.escape(predicate.removeprefix("!"))
    test = re.search(name + r" = scmp\.(ne|eq)\.s32\.totalorder (?:\(!?%p\w+\), )?(%s\w+), (\d+)", body)
    index = test and re.search(re.escape(test[2]) + r" = s(?:phi|ld) [^;]*?iter bound = (\d+)", body)
    if not test or not index or int(index[1]) >= len(grid):
        return None
    equal = 1 / grid[int(index[1])]
    skips_unless_equal = (test[1] == "ne") != predicate.startswith("!")
    return equal if skips_unless_equal else 1 - equal
