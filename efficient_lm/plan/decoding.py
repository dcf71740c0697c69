"""What decoding takes on accelerators that are not here: memory, and the time of one token, by arithmetic.

Sizes are those of the parameters and states that the modules make, laid out as they lay them out. A token's time is a
floor: memory and computing work at their peaks and at the same time, and what devices send each other is not counted.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from efficient_lm.costs import model_costs, share, variables
from efficient_lm.model import ModelConfig
from efficient_lm.plan.step import device_bytes
from efficient_lm.sharding import MESH_AXES
from efficient_lm.topologies import GIB, Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Of sequences of this length."""

    context: int
    """Tokens that there is room for."""
    state_bytes: int
    """Caches and recurrent states of one sequence."""
    device_bytes: float
    """Of these, what a device holds for each sequence of the batch."""
    largest_batch: int
    """That fits beside the parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
    """The next token of each sequence in a batch, when they have `context` tokens."""

    context: int
    batch_size: int
    peak_bytes: int
    """Of a device: parameters and states."""
    moved_bytes: float
    """Of a device: parameters that the tokens meet, states whole, and one token's part written."""
    flops: float
    """Of all devices."""
    seconds: dict[str, float]
    """That memory and computing take at least."""
    fits: bool

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def tokens_per_second(self) -> float:
        """At most, of all sequences together."""
        return self.batch_size / self.seconds[self.bound]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    on: str
    mesh: dict[str, int]
    dtype: str
    """Of parameters, as they are held to decode with, and of what caches keep."""
    num_parameters: int
    parameter_bytes: int
    device_parameter_bytes: int
    chip_bytes: int
    rows: int
    """Batches are multiples of it: devices along `data` and `expert` have sequences of their own."""
    contexts: list[Context]
    tokens: list[Token]

    def to_json(self) -> dict[str, Any]:
        derived = [{"bound": token.bound, "tokens_per_second": token.tokens_per_second} for token in self.tokens]
        tokens = [dataclasses.asdict(token) | more for token, more in zip(self.tokens, derived, strict=True)]
        return dataclasses.asdict(self) | {"tokens": tokens}


def make_decoding(
    cfg: ModelConfig, target: Target, axes: Mapping[str, int], *, contexts: Sequence[int], batches: Sequence[int]
) -> Decoding:
    """Returns what decoding takes for each context, with each batch that the mesh can divide and with the largest.

    Raises:
      ValueError: the model cannot be divided among the devices, or its parameters alone do not fit.
    """
    if not contexts or min(*contexts, *batches, 1) < 1:
        raise ValueError(f"contexts {tuple(contexts)} and batches {tuple(batches)}: take numbers of at least 1")
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes))
    chip, rows = target.chip, math.prod(size for axis, size in axes.items() if axis in MESH_AXES["B"])
    with jax.sharding.use_abstract_mesh(mesh):
        model: Any = jax.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
        # Parameters are float32 where they are trained.
        narrow = lambda bytes_: bytes_ * jnp.dtype(cfg.dtype).itemsize // 4
        held = narrow(device_bytes(model))
        if held > chip.memory_bytes:
            needed, there = held / GIB, chip.memory_bytes / GIB
            raise ValueError(
                f"parameters take {needed:.2f} GiB of the {there:.2f} of a device: take more devices along model"
            )

        @functools.cache
        def state_bytes(context: int) -> float:
            """Returns the bytes on a device for each sequence of a batch."""
            state = jax.eval_shape(lambda model: model.init_state(rows, context), model)
            return device_bytes(state) / rows

        def token(context: int, batch_size: int) -> Token:
            peak = held + batch_size * state_bytes(context)
            moved = _parameters_read(cfg, model, batch_size) + batch_size * (state_bytes(context) + state_bytes(1))
            flops = batch_size * flops_of_token(cfg, context)
            seconds = {
                "memory": moved / chip.memory_bytes_per_second,
                "computing": flops / (chip.flops * target.num_devices),
            }
            return Token(
                context=context,
                batch_size=batch_size,
                peak_bytes=math.ceil(peak),
                moved_bytes=moved,
                flops=flops,
                seconds=seconds,
                fits=peak <= chip.memory_bytes,
            )

        largest = {T: math.floor((chip.memory_bytes - held) / (rows * state_bytes(T))) * rows for T in contexts}
        asked = [batch_size for batch_size in batches if batch_size % rows == 0]
        tokens = [token(T, b) for T in contexts for b in sorted({*asked, largest[T]} - {0})]
        parts = {T: state_bytes(T) for T in contexts}
    whole: Any = jax.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
    of_sequence = lambda T: _bytes(jax.eval_shape(lambda model: model.init_state(1, T), whole))
    return Decoding(
        on=target.name,
        mesh=dict(axes),
        dtype=cfg.dtype,
        num_parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(whole)),
        parameter_bytes=narrow(_bytes(whole)),
        device_parameter_bytes=held,
        chip_bytes=chip.memory_bytes,
        rows=rows,
        contexts=[
            Context(context=T, state_bytes=of_sequence(T), device_bytes=parts[T], largest_batch=largest[T])
            for T in contexts
        ],
        tokens=tokens,
    )


def flops_of_token(cfg: ModelConfig, context: int) -> float:
    """Returns the operations for one token that stands behind `context` others.

    Costs are stated on average over a document: what the document costs more that is a little longer, is what tokens
    at its end cost.
    """
    document = lambda T: T * model_costs(cfg, context=T).training_flops / 3 if T else 0.0
    around = max(context // 8, 1)
    return (document(context + around) - document(context - around)) / (2 * around)


def _parameters_read(cfg: ModelConfig, model: Any, batch_size: int) -> float:
    """Returns the bytes that a device reads of its parameters for one token of each sequence; see `model_costs`."""
    layers, itemsize = cfg.layers.split(), jnp.dtype(cfg.dtype).itemsize
    read = _met([model.prefix, model.periods, model.tail, model.norm], batch_size)
    read += _met([model.embedding if model.head is None else model.head], batch_size)
    # A token's row of the embedding, where the head does not read all of it.
    read += 0 if model.head is None else batch_size * cfg.d_model
    for name, called in model.called.items():
        calls = [call for letter in layers if (call := cfg.blocks[letter].call) is not None and call.name == name]
        read += len(calls) * _met([called], batch_size)
    return itemsize * read


def _met(modules: Iterable[Any], num_tokens: int) -> float:
    """Returns how many of a device's parameters some tokens meet together, if they choose experts evenly."""
    total = 0.0
    for variable in variables(list(modules)):
        (x,) = jax.tree.leaves(variable)
        total += math.prod(x.sharding.shard_shape(x.shape)) * (1.0 - (1.0 - share(variable)) ** num_tokens)
    return total


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
