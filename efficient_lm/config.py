"""Everything about a run, in one tree of frozen dataclasses."""

import dataclasses
from typing import Any

from efficient_lm.checkpoint import CheckpointConfig
from efficient_lm.data import DataConfig
from efficient_lm.model import ModelConfig
from efficient_lm.objectives import NextTokenConfig, ObjectiveConfig
from efficient_lm.optimizer import GuardConfig, OptimizerConfig
from efficient_lm.processes import ProcessesConfig
from efficient_lm.sampling import SamplingConfig


def free(default: Any) -> Any:
    """A field that may change when a run goes on: it does not touch what is computed."""
    return dataclasses.field(default=default, metadata={"resumable": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every: int = 500
    """Steps between evaluations; there is always one at the end."""
    max_batches: int | None = None
    """Held-out batches to use before the end; None: all of them."""
    prompt: str = "def "
    """What the sample at each evaluation begins with."""
    sampling: SamplingConfig = SamplingConfig(max_tokens=128, temperature=0.8, top_p=0.95)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    every: int = 10
    """Steps between lines of metrics; each line is the mean over them."""
    tensorboard: bool = True
    wandb_project: str | None = None
    """Logs to Weights & Biases too; needs `pip install 'efficient_lm[wandb]'`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    model: ModelConfig
    optimizer: OptimizerConfig
    num_steps: int
    batch_size: int
    """Rows per step, over all devices."""
    seq_len: int
    """Tokens per row."""
    grad_accumulation: int = 1
    """Parts that a batch is cut into, one after the other, to save memory."""
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = NextTokenConfig()
    guard: GuardConfig = GuardConfig()
    mesh: dict[str, int] = dataclasses.field(default_factory=dict, metadata={"resumable": True})
    """Devices along each axis, e.g. data=-1 model=2; empty: one device."""
    processes: ProcessesConfig = free(ProcessesConfig())
    """Who trains together, where the cluster does not say."""
    seed: int = 0
    evaluation: EvaluationConfig = free(EvaluationConfig())
    checkpoint: CheckpointConfig = free(CheckpointConfig())
    logging: LoggingConfig = free(LoggingConfig())
    run_dir: str = free("")
    """Where everything goes; empty: runs/<name of the config>."""
    start_from: str = ""
    """Another run's folder, to begin with its newest weights; its dense networks may become mixtures of experts
    (upcycling.py), or its softmax attention linear (linearization.py). Empty: with weights drawn from the seed."""
    profile: str | None = free(None)
    """Steps to profile, e.g. 10:15."""
    fresh: bool = free(False)
    """Start over; what the run folder held is moved aside, not deleted."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "seq_len", "grad_accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.grad_accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be cut into "
                f"grad_accumulation={self.grad_accumulation} equal parts"
            )
        if self.seq_len <= self.model.meta_tokens:
            raise ValueError(
                f"seq_len={self.seq_len} has no room for text behind meta_tokens={self.model.meta_tokens}: every row "
                "begins with them"
            )
        for name in ("evaluation", "logging"):
            if getattr(self, name).every < 1:
                raise ValueError(f"{name}.every={getattr(self, name).every} must be at least 1")
        if self.profile is not None:
            parse_profile(self.profile)
        self.optimizer.schedule.build(self.num_steps)


def parse_profile(text: str) -> tuple[int, int]:
    """Returns the first step to profile and the step before which to stop, from "10:15".

    Raises:
      ValueError: it is not two rising numbers.
    """
    first, _, stop = text.partition(":")
    if not (first.isdigit() and stop.isdigit() and int(first) < int(stop)):
        raise ValueError(f"profile {text!r} is not of the form FIRST:STOP, e.g. 10:15")
    return int(first), int(stop)
