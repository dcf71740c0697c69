"""What tiny tasks share: training a model on batches that a function draws, and a record of what was measured."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.cpu import cpu_name
from efficient_lm.config import TrainConfig
from efficient_lm.data import Batch
from efficient_lm.model import LanguageModel
from efficient_lm.training import init_state, make_train_step


def trained(
    run: TrainConfig, num_seeds: int, draw: Callable[[np.random.Generator], Batch], advance: Callable[[], None]
) -> Iterator[tuple[LanguageModel, np.random.Generator]]:
    """Yields, for each seed, the trained model and the generator of its batches; calls `advance` after every step."""
    optimizer, _ = run.optimizer.build(run.num_steps)
    step = make_train_step(run, run.objective.build(), optimizer)
    for seed in range(num_seeds):
        rng = np.random.default_rng(seed)
        state = init_state(dataclasses.replace(run, seed=seed), optimizer)
        for _ in range(run.num_steps):
            state, _ = step(state, draw(rng))
            advance()
        yield state.model, rng


def circumstances(settings: Any) -> dict[str, Any]:
    """Returns when, on what and with which settings a benchmark begins."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "load_before": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "settings": {name: value for name, value in vars(settings).items() if name != "output"},
    }


def save(path: pathlib.Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results) + "\n")
