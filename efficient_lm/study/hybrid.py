"""The hybrid study from its first cell to its report.

What is done is not done again: kill it, the same command goes on. In its folder are results.jsonl, a line for all that
is finished; report.md with its plots; text and tokenizer.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from efficient_lm.console import console
from efficient_lm.data import DataConfig
from efficient_lm.metrics import read_metrics
from efficient_lm.study import documents, measure
from efficient_lm.study.cells import DECODED, RECALLED, Budget, Cell, model_config
from efficient_lm.study.report import write_report

COMPILING = 60  # Steps that last as long as compiling a cell, for the time left.


def study(budget: Budget, cells: tuple[Cell, ...], folder: pathlib.Path, data: DataConfig) -> pathlib.Path:
    """Measures what the folder's results do not have yet, and returns the report.

    Raises:
      ValueError: the folder has results of another budget or of other text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = _open(folder / "results.jsonl", budget, data)
    text = documents.load_text(folder, budget.vocab_size, data)
    costs = {cell.name: measure.costs(cell, budget) for cell in cells}
    runs = {cell.name: _runs(cell, budget) for cell in cells}
    total = sum(COMPILING + len(runs[cell.name]) * costs[cell.name].num_steps for cell in cells)

    def append(line: dict[str, Any]) -> None:
        with (folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(line | {"load": round(os.getloadavg()[0], 1)}) + "\n")
        shown = {name: value for name, value in line.items() if name != "by_position"}
        console.print(", ".join(f"{name} {value}" for name, value in shown.items()), markup=False)

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        expand=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=total)
        for cell, context in [(cell, n) for cell in cells if cell.name in DECODED for n in budget.contexts]:
            progress.update(task, description=f"{cell.name}, decoding")
            if (cell.name, "decode", context) not in done:
                start = time.perf_counter()
                cfg = model_config(cell, budget.d_model, text.vocab_size + documents.NUM_SYNTHETIC)
                each = measure.seconds_per_token(cfg, context)
                line = {"cell": cell.name, "task": "decode", "context": context, "seconds_per_token": each}
                append(line | {"seconds": round(time.perf_counter() - start, 1)})
        for cell in cells:
            progress.update(task, description=cell.name)
            left = [run for run in runs[cell.name] if (cell.name, *run) not in done]
            num_steps = costs[cell.name].num_steps
            progress.advance(task, COMPILING + (len(runs[cell.name]) - len(left)) * num_steps)
            trainer = measure.Trainer(cell, budget, text, num_steps) if left else None
            for what, seed in left:
                assert trainer is not None
                results = trainer.train(what, seed, lambda: progress.advance(task))
                append({"cell": cell.name, "task": what, "seed": seed, **results})
    return write_report(folder, budget, cells, costs, read_metrics(folder / "results.jsonl"))


def _runs(cell: Cell, budget: Budget) -> list[tuple[documents.Task, int]]:
    tasks: tuple[documents.Task, ...] = ("text", "recall") if cell.name in RECALLED else ("text",)
    return [(task, seed) for task in tasks for seed in range(budget.num_seeds)]


def _open(path: pathlib.Path, budget: Budget, data: DataConfig) -> set[tuple[str, str, int]]:
    """Returns what is finished: cells with their tasks, and seeds or contexts."""
    # As it is read: tuples are lists.
    settings = json.loads(json.dumps({"budget": vars(budget), "data": repr(data)}))
    lines = read_metrics(path)
    if not lines:
        path.write_text(json.dumps({"settings": settings, **_circumstances()}) + "\n")
        return set()
    if lines[0]["settings"] != settings:
        raise ValueError(f"{path} has results of other settings; pass another --output")
    # What a kill cut short goes.
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    temporary.replace(path)
    return {(line["cell"], line["task"], line["seed"] if "seed" in line else line["context"]) for line in lines[1:]}


def _circumstances() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    }
