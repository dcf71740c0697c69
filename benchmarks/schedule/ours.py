"""The ops of this repository, at the sizes of the table."""

from benchmarks import ops
from benchmarks.schedule.compile import Program


def build(name: str, backward: bool, impl: str | None) -> Program:
    case = ops.CASES[name]
    forward, args = case.forward(impl), case.structs(case.ins, ops.SIZES)
    if not backward:
        return Program(function=forward, args=args)
    return Program(function=ops.backward(forward), args=(args, tuple(case.structs(case.outs, ops.SIZES))))
