"""What a person sees while a run goes on: a table of the model, a progress bar, a line for each event."""

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from efficient_lm.model import Block, LanguageModel, ModelConfig

console = Console(highlight=False, soft_wrap=True)


def count(number: float) -> str:
    """Returns a number as people say it: 1.83M."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}" if unit else f"{number:g}"
        number /= 1000
    return f"{number:.4g}T"


def num_parameters(tree: object) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def state_bytes(cfg: ModelConfig, model: LanguageModel, max_len: int) -> int:
    """Returns the memory of one sequence's state with room for `max_len` tokens."""
    state = jax.eval_shape(lambda: model.init_state(1, max_len))
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))


def model_table(cfg: ModelConfig, model: LanguageModel) -> Table:
    """Returns a table of the blocks, their parameters and what their states take."""
    table = Table(title=f"{count(num_parameters(model))} parameters, blocks {cfg.layers}", title_justify="left")
    for column in ("block", "mixer", "ffn", "blocks", "parameters each", "state bytes", "+ per token"):
        table.add_column(column, justify="left" if column in ("block", "mixer", "ffn") else "right")
    letters = cfg.layers.split()
    for letter, block_cfg in cfg.blocks.items():
        if letter not in letters:
            continue
        block = jax.eval_shape(lambda cfg=block_cfg: _build(cfg, model.cfg.d_model))
        size = lambda max_len, block=block: sum(
            int(np.prod(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(jax.eval_shape(lambda: block.mixer.init_state(1, max_len, cfg.dtype)))
        )
        growth = size(2) - size(1)
        ffn = "-" if block_cfg.ffn is None else type(block_cfg.ffn).__name__.removesuffix("Config")
        table.add_row(
            letter,
            type(block_cfg.mixer).__name__.removesuffix("Config"),
            ffn,
            str(letters.count(letter)),
            count(num_parameters(block)),
            count(size(1) - growth),
            count(growth),
        )
    head = 0 if model.head is None else num_parameters(model.head)
    table.add_row("", "embedding and head", "", "", count(num_parameters(model.embedding) + head), "", "")
    return table


def _build(cfg, d_model: int) -> Block:
    from flax import nnx

    return Block(cfg, d_model, rngs=nnx.Rngs(0))


class TrainingProgress:
    """A bar with the time left on a terminal; a line at each report elsewhere."""

    def __init__(self, num_steps: int, first_step: int):
        self._num_steps = num_steps
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=num_steps, completed=first_step)

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def report(self, step: int, text: str) -> None:
        """Shows the latest numbers."""
        self._bar.update(self._task, description=text)
        if not console.is_terminal:
            console.print(f"step {step}/{self._num_steps}  {text}", markup=False)
