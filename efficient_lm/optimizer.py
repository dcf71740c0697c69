"""Optimizers by optax: which parameters get which update, schedules, and a guard against bad gradients."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig(abc.ABC):
    """How the learning rate goes from step to step, as a share of its peak."""

    warmup_steps: int = 0
    """Steps of a linear rise from zero."""
    final: float = 0.0
    """Share of the peak at the last step."""

    @abc.abstractmethod
    def build(self, num_steps: int) -> optax.Schedule: ...

    def _check(self, num_steps: int, fixed: int) -> None:
        if not 0 <= fixed <= num_steps:
            raise ValueError(f"the schedule's warm-up and decay take {fixed} steps, the run has num_steps={num_steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineConfig(ScheduleConfig):
    """Half a cosine from the peak to the end."""

    def build(self, num_steps: int) -> optax.Schedule:
        self._check(num_steps, self.warmup_steps)
        rise = optax.linear_schedule(0.0, 1.0, self.warmup_steps)
        fall = optax.cosine_decay_schedule(1.0, max(num_steps - self.warmup_steps, 1), alpha=self.final)
        return optax.join_schedules([rise, fall], [self.warmup_steps])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrapezoidConfig(ScheduleConfig):
    """Warm-up, stable, decay (WSD): flat, then a straight line down (https://arxiv.org/abs/2404.06395)."""

    decay_steps: int

    def build(self, num_steps: int) -> optax.Schedule:
        self._check(num_steps, self.warmup_steps + self.decay_steps)
        rise = optax.linear_schedule(0.0, 1.0, self.warmup_steps)
        flat = optax.constant_schedule(1.0)
        fall = optax.linear_schedule(1.0, self.final, self.decay_steps)
        return optax.join_schedules([rise, flat, fall], [self.warmup_steps, num_steps - self.decay_steps])


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(abc.ABC):
    learning_rate: float
    """At the schedule's peak."""
    schedule: ScheduleConfig = CosineConfig(warmup_steps=100, final=0.1)
    weight_decay: float = 0.1
    """Of matrices; norms, biases and decay rates are left alone."""
    clip_norm: float = 1.0
    """Gradients longer than this, over all parameters, are scaled down to it."""

    @abc.abstractmethod
    def _update(self, learning_rate: optax.Schedule) -> optax.GradientTransformation: ...

    def build(self, num_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """Returns the optimizer and its learning rate by step.

        Raises:
          ValueError: a schedule longer than the run.
        """
        share = self.schedule.build(num_steps)
        learning_rate = lambda step: self.learning_rate * share(step)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), self._update(learning_rate)), learning_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (https://arxiv.org/abs/1711.05101)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def _update(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(
            learning_rate, self.beta1, self.beta2, self.eps, weight_decay=self.weight_decay, mask=is_matrix
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuonConfig(OptimizerConfig):
    """Muon for matrices between layers (https://arxiv.org/abs/2502.16982), AdamW for everything else.

    Updates are scaled to AdamW's size, so that one learning rate serves both.
    """

    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95

    def _update(self, learning_rate: optax.Schedule) -> optax.GradientTransformation:
        muon = optax.contrib.muon(
            learning_rate,
            beta=self.momentum,
            weight_decay=self.weight_decay,
            weight_decay_mask=is_matrix,
            adam_b1=self.beta1,
            adam_b2=self.beta2,
            adam_weight_decay=0.0,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=0.2,
        )
        return optax.GradientTransformation(muon.init, _partitioned(muon.update))


def _partitioned(update: Any) -> Any:
    """Leaves it to XLA how to lay out what an optimizer computes in between, such as X X^T of a sharded matrix X."""

    def run(grads, state, params):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return update(grads, state, params)
        outs = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), (grads, state))
        auto: Any = jax.sharding.auto_axes(update, out_sharding=outs)
        return auto(grads, state, params)

    return run


def _per_variable(fn: Any, params: Any) -> Any:
    return jax.tree.map(fn, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def is_matrix(params: Any) -> Any:
    """Returns, for each parameter, whether it is a matrix: one that was declared with its letters."""
    return _per_variable(lambda p: bool(p.get_metadata().get("dims")), params)


def muon_dimensions(params: Any) -> Any:
    """Returns, for each parameter, which dimensions are the rows and columns that Muon orthogonalises; None: not any.

    They come from the letters of the contraction, counted from the end: the weights of scanned layers are stacked in
    front, and those of several heads form one matrix; the letters that are `stacked` count the matrices of one weight.
    """

    def dimensions(p):
        metadata = p.get_metadata()
        dims, contracted = metadata.get("dims", ""), metadata.get("contracted", "")
        if not contracted or "V" in dims:  # Embeddings and heads are updated row by row.
            return None
        axes = {d: p.ndim - len(dims) + i for i, d in enumerate(dims)}
        rows = tuple(axes[d] for d in dims if d in contracted)
        columns = tuple(axes[d] for d in dims if d not in contracted + metadata.get("stacked", ""))
        return optax.contrib.MuonDimensionNumbers(reduction_axis=rows, output_axis=columns)

    return _per_variable(dimensions, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Steps whose gradients cannot be trusted are skipped and counted."""

    spike: float = 20.0
    """A gradient this many times longer than the running mean is not applied."""
    memory: float = 0.98
    """Decay of the running mean per step."""
    patience: int = 20
    """The run stops after this many skipped steps in a row."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuardState:
    mean_norm: Float[Array, ""]
    """Running mean of the norms of accepted gradients."""
    weight: Float[Array, ""]
    """What the running mean has seen so far, between 0 and 1."""
    skipped: Int[Array, ""]
    in_a_row: Int[Array, ""]

    @staticmethod
    def init() -> "GuardState":
        return GuardState(*(jnp.zeros((), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32, jnp.int32)))


def guard(cfg: GuardConfig, state: GuardState, norm: Float[Array, ""]) -> tuple[Bool[Array, ""], GuardState]:
    """Returns whether a gradient of this norm is to be applied, and the guard's next state."""
    usual = state.mean_norm / jnp.maximum(state.weight, 1e-9)
    # Early norms vary by nature: the guard starts when it has seen half of what its memory spans.
    is_spike = (state.weight > 0.5) & (norm > cfg.spike * usual)
    accept = jnp.isfinite(norm) & ~is_spike
    seen = lambda old, new: jnp.where(accept, cfg.memory * old + (1 - cfg.memory) * new, old)
    return accept, GuardState(
        mean_norm=seen(state.mean_norm, jnp.where(accept, norm, 0.0)),
        weight=seen(state.weight, jnp.ones(())),
        skipped=state.skipped + ~accept,
        in_a_row=jnp.where(accept, 0, state.in_a_row + 1),
    )
