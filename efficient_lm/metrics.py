"""Where numbers go while a run goes on: a JSON line each time, TensorBoard, Weights & Biases."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorboardX

from efficient_lm.config import LoggingConfig
from efficient_lm.run_folder import RunFolder


class MetricsLog:
    """Writes the metrics of a run; a resumed run goes on in the same files."""

    def __init__(self, folder: RunFolder, cfg: LoggingConfig, first_step: int, run_config: dict[str, Any]):
        _keep_before(folder.metrics, first_step)
        self._file = folder.metrics.open("a")
        self._board = None
        if cfg.tensorboard:
            self._board = tensorboardX.SummaryWriter(str(folder.path / "tensorboard"), purge_step=first_step)
        self._wandb = None
        if cfg.wandb_project is not None:
            self._wandb = _wandb().init(
                project=cfg.wandb_project, name=folder.path.name, id=folder.path.name, resume="allow", config=run_config
            )

    def write(self, step: int, values: Mapping[str, float | list[float] | str]) -> None:
        """Notes the values after `step` steps; lists and texts go to the JSON file only."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        scalars = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def check_logging(cfg: LoggingConfig) -> None:
    """Raises ValueError if something that the configuration asks for is not installed."""
    if cfg.wandb_project is not None:
        _wandb()


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError("logging.wandb_project needs Weights & Biases: pip install 'efficient_lm[wandb]'") from error


def _keep_before(path: Path, step: int) -> None:
    """Drops what a run wrote after the checkpoint that it goes on from."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    if kept or path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
