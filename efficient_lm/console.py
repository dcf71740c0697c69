"""What a person sees while a run goes on: a table of the model, a progress bar, a line for each event."""

import jax
import numpy as np
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from efficient_lm.mixers import Mixer
from efficient_lm.model import Block, LanguageModel, ModelConfig

console = Console(highlight=False, soft_wrap=True)


def count(number: float) -> str:
    """Returns a number as people say it: 1.83M."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.4g}T"


def num_parameters(tree: object) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def model_table(cfg: ModelConfig, model: LanguageModel) -> Table:
    """Returns a table of the blocks, their parameters and what their states take."""
    letters = cfg.layers.split()
    title = f"{count(num_parameters(model))} parameters in {len(letters)} blocks: {cfg.layers}"
    caption = "each; state: bytes for one sequence, and for every token of it"
    table = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in ("block", "mixer", "ffn"):
        table.add_column(column, no_wrap=True)
    for column in ("number", "parameters", "state", "per token"):
        table.add_column(column, justify="right", no_wrap=True)
    for letter, block_cfg in cfg.blocks.items():
        if letter not in letters:
            continue
        block = jax.eval_shape(lambda block_cfg=block_cfg: Block(block_cfg, cfg.d_model, rngs=nnx.Rngs(0)))
        growth = state_bytes(block.mixer, cfg, 2) - state_bytes(block.mixer, cfg, 1)
        ffn = "-" if block_cfg.ffn is None else type(block_cfg.ffn).__name__.removesuffix("Config")
        table.add_row(
            letter,
            type(block_cfg.mixer).__name__.removesuffix("Config"),
            ffn,
            str(letters.count(letter)),
            count(num_parameters(block)),
            count(state_bytes(block.mixer, cfg, 0)),
            count(growth),
        )
    head = 0 if model.head is None else num_parameters(model.head)
    name = "embedding = head" if model.head is None else "embedding, head"
    table.add_row("", name, "", "", count(num_parameters(model.embedding) + head), "", "")
    return table


def state_bytes(mixer: Mixer, cfg: ModelConfig, max_len: int) -> int:
    """Returns the memory of one sequence's state in one layer, with room for `max_len` tokens."""
    state = jax.eval_shape(lambda: mixer.init_state(1, max_len, cfg.dtype))
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))


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
