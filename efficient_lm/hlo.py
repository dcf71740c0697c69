"""Reads the text of a compiled program: which instructions run, how often, and what they send to other devices."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

# Computations start at the margin, instructions are indented by two; attributes may run over several lines.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^  (?=ROOT %|%)", re.MULTILINE)
_PARTS = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(", re.DOTALL)
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_MAKES_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
_MAKES_NOTHING |= {"after-all", "partition-id", "replica-id", "opt-barrier", "copy-done"}
_MAKES_NOTHING |= {"send", "send-done", "recv-done"}
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
SLICES = ("slices",)
"""What stands for an axis of the mesh where data goes from slice to slice."""
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: str
    """Of what it gives, as the text has them."""
    text: str
    times: int
    """That it runs in one run of the program."""
    computation: str
    """That it is part of."""
    fused: bool
    """That computation is a fusion's: what it gives does not reach memory by itself."""


class Program:
    """A compiled program, taken apart."""

    def __init__(self, text: str):
        heads = list(_COMPUTATION.finditer(text))
        ends = [head.start() for head in heads[1:]] + [len(text)]
        self.computations = {
            head[2]: _INSTRUCTION.split(text[head.end() : end])[1:] for head, end in zip(heads, ends, strict=True)
        }
        (self.entry,) = [head[2] for head in heads if head[1]]
        self.unknown_loops: set[str] = set()
        """Loops whose length depends on data; they count once."""

    def instructions(self) -> Iterator[Instruction]:
        """Yields what runs, also inside of fusions; of a conditional, its first branch."""
        yield from self._walk(self.entry, 1, False)

    def _walk(self, computation: str, times: int, fused: bool) -> Iterator[Instruction]:
        for text in self.computations[computation]:
            parts = _PARTS.match(text)
            if parts is None:
                continue
            name, shapes, opcode = parts.groups()
            yield Instruction(name, opcode, shapes, text, times, computation, fused)
            branches = _BRANCHES.search(text) if opcode == "conditional" else None
            if branches:
                yield from self._walk((branches[1] or branches[2]).split(",")[0].strip(" %"), times, fused)
            # What reduces and sorts call are a few scalars.
            elif opcode in ("while", "fusion", "call", "async-start"):
                trips = self._trips(text) if opcode == "while" else 1
                if opcode == "while" and trips is None:
                    self.unknown_loops.add(name)
                called = _CALLED.search(text)
                if called is not None:
                    yield from self._walk(called[1], times * (trips or 1), fused or opcode in ("fusion", "async-start"))

    def written(self, instruction: Instruction) -> int:
        """Returns the bytes that an instruction writes to the device's memory; of an update in place, the update."""
        written = sum(shape_bytes(instruction.shapes, on_chip=False))
        text, scope = instruction.text, instruction.computation
        if written and instruction.opcode == "fusion" and (called := _CALLED.search(text)):
            scope = called[1]
            text = next(line for line in self.computations[scope] if line.startswith("ROOT "))
        if written and (update := re.search(r" dynamic-update-slice\(%?[\w.\-]+, %?([\w.\-]+),", text)):
            made = (_PARTS.match(line) for line in self.computations[scope])
            return sum(sum(shape_bytes(parts[2])) for parts in made if parts is not None and parts[1] == update[1])
        return written

    def _trips(self, loop: str) -> int | None:
        condition = re.search(r"condition=%?([\w.\-]+)", loop)
        trips = _TRIPS.search(loop)
        if trips is None and condition is not None:
            trips = re.search(r" s32\[\]\S* constant\((\d+)\)", "".join(self.computations[condition[1]]))
        return None if trips is None else int(trips[1])


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same axes of the mesh."""

    kind: str
    axes: tuple[str, ...]
    """Of the mesh, that the data crosses; SLICES from slice to slice."""
    count: int
    """In one run of the program."""
    bytes: float
    """That a device receives, all of them together."""


def collectives(program: Program, mesh_shape: Mapping[str, int], num_slices: int = 1) -> list[Collective]:
    """Returns what the program sends; partitions are numbered as the devices of the mesh are.

    With several slices the program is that of one, which has its part of `data`. What goes from slice to slice the
    compiler has made into sends and receives: of a sum, each device's part.
    """
    if num_slices > 1:
        mesh_shape = {axis: size // num_slices if axis == "data" else size for axis, size in mesh_shape.items()}
    found: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
    chains: set[str] = set()
    for instruction in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind == "recv" and (transfer := _BETWEEN_SLICES.search(instruction.text)):
            kind = transfer[1].lower().replace("_", "-")
            size = sum(shape_bytes(instruction.shapes)[:-2])  # Beside them a flag and a token.
            count, total = found.get((kind, SLICES), (0, 0.0))
            received = _share_received(kind, num_slices) * size
            found[kind, SLICES] = (count + instruction.times, total + instruction.times * received)
            continue
        if kind not in _KINDS:
            continue
        # One that is spread over several fusions, to hide it behind them, stands in each of them.
        if chain := re.search(r"channel_id=\d+(?=.*chain_id=)", instruction.text):
            if chain[0] in chains:
                continue
            chains.add(chain[0])
        groups = replica_groups(instruction.text, math.prod(mesh_shape.values()))
        if not (axes := crossed_axes(groups, mesh_shape)):
            continue
        received = received_bytes(kind, instruction, max(map(len, groups)))
        # So a TPU's compiler writes a sum of which each device keeps its part: half of what a sum for all takes.
        if kind == "all-reduce" and instruction.computation.startswith("all-reduce-scatter"):
            kind, received = "reduce-scatter", received / 2
        count, total = found.get((kind, axes), (0, 0.0))
        found[kind, axes] = (count + instruction.times, total + instruction.times * received)
    return [Collective(*key, *value) for key, value in sorted(found.items(), key=lambda item: -item[1][1])]


def received_bytes(kind: str, instruction: Instruction, size: int) -> float:
    """Returns what a device of a group of this size has to receive from others, at least."""
    sizes = shape_bytes(instruction.shapes)
    if instruction.opcode.endswith("-start") and instruction.shapes.startswith("("):
        # A start gives what it was given, then what will be there, and for permutations two flags.
        sizes = sizes[: len(sizes) - 2] if kind == "collective-permute" and len(sizes) > 2 else sizes
        sizes = sizes if kind == "all-reduce" else sizes[len(sizes) // 2 :]
    return _share_received(kind, size) * sum(sizes)


def _share_received(kind: str, size: int) -> float:
    """Returns how much of what a collective gives has to come from others, in a group of this size."""
    share = (size - 1) / size
    return {"all-reduce": 2 * share, "reduce-scatter": size - 1.0, "collective-permute": 1.0}.get(kind, share)


def memory_traffic(program: Program) -> float:
    """Returns the bytes to and from a device's memory if each array is written once and read once.

    That is a floor: what several instructions read comes several times. What stays on the chip does not count.
    """
    made = (i for i in program.instructions() if not i.fused and i.opcode not in _MAKES_NOTHING)
    return 2.0 * sum(i.times * program.written(i) for i in made if not i.opcode.endswith("-start"))


def shape_bytes(shapes: str, *, on_chip: bool = True) -> list[int]:
    """Returns the bytes of each array of a type, as the program's text has it; padding of layouts is not counted.

    Those that a TPU's compiler keeps on the chip have a memory space, `S(1)`, in their layout.
    """
    out = []
    for dtype, dims, layout in _SHAPE.findall(shapes):
        if not on_chip and "S(" in layout:
            continue
        bits = _BITS.search(dtype)
        size = 1 if dtype == "pred" else 0 if bits is None else max(int(bits[0]) // 8, 1)
        out.append(size * math.prod(map(int, filter(None, dims.split(",")))))
    return out


def replica_groups(text: str, num_devices: int) -> list[list[int]]:
    """Returns the devices that a collective connects, group by group; of a permutation, its pairs.

    Groups are written out, or as [groups,size]<=[a,b]T(1,0): the numbers in order, in an array of [a,b], transposed;
    or as axes of a mesh.
    """
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source = (tuple(map(int, part.split(","))) for part in iota.groups()[:2])
        numbers = np.arange(math.prod(source)).reshape(source)
        if iota[3]:
            numbers = numbers.transpose(tuple(map(int, iota[3].split(","))))
        return numbers.reshape(shape).tolist()
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        # mesh['data'=64,'model'=4] {'model'}; of an axis of 64, 'data':(4)2 is the middle one of 4 x 2 x 8.
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", named[1])}
        pieces, chosen = {name: [size] for name, size in sizes.items()}, []
        for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", named[2]):
            if size:
                pieces[name] = [int(before), int(size), sizes[name] // int(before) // int(size)]
            chosen.append((name, 1 if size else 0))
        places = [(name, i) for name in sizes for i in range(len(pieces[name]))]
        numbers = np.arange(num_devices).reshape([pieces[name][i] for name, i in places])
        numbers = np.moveaxis(numbers, [places.index(place) for place in chosen], range(-len(chosen), 0))
        return numbers.reshape(-1, math.prod(pieces[name][i] for name, i in chosen)).tolist()
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        groups = [list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return groups or [list(range(num_devices))]
    raise ValueError(f"a collective without groups: {text[:200]}")


def crossed_axes(groups: list[list[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes of the mesh along which the members of a group differ."""
    places = np.array(np.unravel_index(np.arange(math.prod(mesh_shape.values())), tuple(mesh_shape.values()))).T
    moved = np.zeros(len(mesh_shape), bool)
    for group in groups:
        for a, b in itertools.pairwise(group):
            moved |= places[a] != places[b]
    return tuple(axis for axis, moves in zip(mesh_shape, moved, strict=True) if moves)
