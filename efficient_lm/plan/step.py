"""One training step on accelerators that are not here: it is compiled for them, and what the compiler says is read."""

import dataclasses
import math
import re
import time
from typing import Any

import jax

from efficient_lm.config import TrainConfig
from efficient_lm.costs import model_costs
from efficient_lm.hlo import Collective, Program, collectives, memory_traffic
from efficient_lm.sharding import make_mesh
from efficient_lm.topologies import Target
from efficient_lm.training import abstract_state, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Of one training step; bytes are those of one device."""

    on: str
    mesh: dict[str, int]
    batch_size: int
    seq_len: int
    num_parameters: int
    memory: dict[str, int]
    """Bytes, by what they hold."""
    peak_bytes: int
    """Of all at the worst moment."""
    chip_bytes: int
    """That the device has for programs."""
    collectives: list[Collective]
    useful_flops: float
    """Of all devices: forward and backward, counted from the model."""
    executed_flops: float
    """With the forward pass that `remat` runs again."""
    traffic_bytes: float
    """To and from memory: each array that the program makes is written once and read once."""
    seconds: dict[str, float]
    """That computing, memory and each part of the network take at least."""
    peak_flops: float
    """Of all devices, per second."""
    seconds_to_trace: float
    seconds_to_compile: float
    remarks: list[str]

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.chip_bytes

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def tokens_per_second(self) -> float:
        """At most."""
        return self.batch_size * self.seq_len / self.seconds[self.bound]

    @property
    def mfu(self) -> float:
        """At most: the share of the peak that useful operations take."""
        return self.useful_flops / self.seconds[self.bound] / self.peak_flops

    def to_json(self) -> dict[str, Any]:
        derived = ("fits", "bound", "tokens_per_second", "mfu")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Plan":
        """Takes what `to_json` gave, written and read."""
        fields: dict[str, Any] = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        fields["collectives"] = [Collective(**(one | {"axes": tuple(one["axes"])})) for one in data["collectives"]]
        return cls(**fields)


def make_plan(cfg: TrainConfig, target: Target, axes: dict[str, int]) -> Plan:
    """Compiles the training step for the target.

    Raises:
      ValueError: the configuration does not fit the mesh, or the mesh the target.
    """
    mesh = make_mesh(axes, target.devices())
    optimizer, _ = cfg.optimizer.build(cfg.num_steps)
    state, batch = abstract_state(cfg, optimizer, mesh)
    step: Any = make_train_step(cfg, cfg.objective.build(), optimizer)
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = step.trace(state, batch).lower(lowering_platforms=(target.chip.platform,))
    traced = time.perf_counter()
    known = {
        "parameters": device_bytes(state.model),
        "optimizer state": device_bytes(state.opt_state),
        "batch": device_bytes(batch),
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        temporary, chip_bytes = memory_of_failure(str(error), sum(known.values()))
        memory = known | {"activations, gradients": temporary}
        peak = sum(memory.values())
        program, remarks = None, ["the compiler gave up for want of memory: nothing is known of what it would send"]
    else:
        analysis = compiled.memory_analysis()
        assert analysis is not None
        arguments = sum(known.values())
        memory = known | {
            "activations, gradients": analysis.temp_size_in_bytes,
            "program": analysis.generated_code_size_in_bytes,
            "padding, other": max(analysis.argument_size_in_bytes - arguments, 0)
            + max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0),
        }
        peak, chip_bytes = sum(memory.values()), target.chip.memory_bytes
        program, remarks = Program(compiled.as_text() or ""), []
    done = time.perf_counter()
    return _plan(cfg, target, mesh, state, memory, peak, chip_bytes, program, remarks, traced - start, done - traced)


def _plan(cfg, target, mesh, state, memory, peak, chip_bytes, program, remarks, seconds_to_trace, seconds_to_compile):
    chip, devices = target.chip, target.num_devices
    useful = model_costs(cfg.model, context=cfg.seq_len).training_flops * cfg.batch_size * cfg.seq_len
    executed = useful * (4 / 3 if cfg.model.remat == "everything" else 1)
    sent = [] if program is None else collectives(program, mesh.shape, target.num_slices)
    traffic = 0.0 if program is None else memory_traffic(program)
    if program is not None and program.unknown_loops:
        remarks = [*remarks, f"{len(program.unknown_loops)} loops have a length that depends on data and count once"]
    seconds = {"computing": executed / (chip.flops * devices), "memory": traffic / chip.memory_bytes_per_second}
    for axes in {collective.axes for collective in sent}:
        received = sum(collective.bytes for collective in sent if collective.axes == axes)
        seconds[f"network, {' x '.join(axes)}"] = received / target.bytes_per_second(mesh, axes)
    return Plan(
        on=target.name,
        mesh=dict(mesh.shape),
        batch_size=cfg.batch_size,
        seq_len=cfg.seq_len,
        num_parameters=sum(x.size for x in jax.tree.leaves(state.model)),
        memory=memory,
        peak_bytes=peak,
        chip_bytes=chip_bytes,
        collectives=sent,
        useful_flops=useful,
        executed_flops=executed,
        traffic_bytes=traffic,
        seconds=seconds,
        peak_flops=chip.flops * devices,
        seconds_to_trace=seconds_to_trace,
        seconds_to_compile=seconds_to_compile,
        remarks=remarks,
    )


def device_bytes(tree: Any) -> int:
    """Returns the bytes of a tree's arrays that lie on one device."""
    shards = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * itemsize for shape, itemsize in shards)


def memory_of_failure(message: str, arguments: int) -> tuple[int, int]:
    """Returns the bytes that a program needs beside its arguments, and those there are, from the compiler's refusal.

    Raises:
      ValueError: it failed for another reason.
    """
    number = r"([\d.]+)([KMGT]?)"
    all_of_it = re.search(rf"Used {number} of {number} hbm", message)
    temporary = re.search(rf"HLO temporaries \({number}\) exceeds available HBM \({number}\)", message)
    found = all_of_it or temporary
    if found is None:
        raise ValueError("the training step does not compile: " + " ".join(message.split())[:500])
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    used, available = (int(float(found[i]) * unit[found[i + 1]]) for i in (1, 3))
    return used - arguments if all_of_it else used, available
