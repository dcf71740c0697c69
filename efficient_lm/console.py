"""What a person sees on a terminal: a progress bar, a line for each event, tables."""

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)


def count(number: float) -> str:
    """Returns a number as people say it: 1.83M."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.4g}T"


def table(title: str, *, left: tuple[str, ...], right: tuple[str, ...], caption: str | None = None) -> Table:
    """Returns an empty table; words stand in the columns `left`, numbers in those `right`."""
    made = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in left:
        made.add_column(column, no_wrap=True)
    for column in right:
        made.add_column(column, justify="right", no_wrap=True)
    return made


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
