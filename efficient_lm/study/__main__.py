"""`python -m efficient_lm.study hybrid --budget small`: attention and Mamba-2 mixed, after arXiv 2510.04800.

`small` ends within 20 minutes on two CPU cores. The report names the cells, says what came out, and what the paper has.
"""

from efficient_lm.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from efficient_lm.cli import one_line_errors
from efficient_lm.console import console
from efficient_lm.data import DataConfig
from efficient_lm.study.cells import BUDGETS, cells
from efficient_lm.study.hybrid import study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    name: Annotated[Literal["hybrid"], tyro.conf.Positional]
    budget: Literal["small", "medium", "large"] = "small"
    output: pathlib.Path | None = None
    """Folder for results and report; if not given, runs/study_hybrid_<budget>."""
    data: DataConfig = DataConfig()
    """Text to train on; its tokenizer is made as large as the budget says."""


def main(args: Arguments) -> None:
    budget = BUDGETS[args.budget]
    folder = args.output or pathlib.Path(f"runs/study_{args.name}_{args.budget}")
    console.print(f"report  {study(budget, cells(budget), folder, args.data)}")


if __name__ == "__main__":
    with one_line_errors(ValueError, OSError):
        main(
            tyro.cli(
                Arguments,
                prog="python -m efficient_lm.study",
                description=__doc__,
                config=(tyro.conf.AvoidSubcommands,),
            )
        )
