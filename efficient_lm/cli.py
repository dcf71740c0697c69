"""From the command line to a configuration, and from an error to one line."""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import tyro

from efficient_lm.config import TrainConfig
from efficient_lm.console import console


def list_configs(folder: Path) -> None:
    """Prints the configurations of a folder, each with the first line of its docstring."""
    console.print("python train.py CONFIG [--help]\n")
    paths = sorted(folder.glob("*.py"))
    width = max((len(path.name) for path in paths), default=0)
    for path in paths:
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        name = f"{folder.name}/{path.name:<{width}}"
        console.print(f"  {name}  {docstring.partition(chr(10))[0]}", markup=False)


def load_config(file: str, overrides: list[str]) -> TrainConfig:
    """Calls config() of a Python file, then applies the overrides to what it returns.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has no config(), or what it describes does not fit together.
    """
    path = Path(file)
    if not path.is_file():
        others = [str(other) for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(file, others, n=1) or difflib.get_close_matches(f"{file}.py", others, n=1)
        hint = f"did you mean {close[0]}?" if close else "python train.py lists those that come with the library"
        raise FileNotFoundError(f"there is no configuration {file}; {hint}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # A configuration may build on the one beside it.
    spec.loader.exec_module(module)
    if not hasattr(module, "config"):
        raise ValueError(f"{file} has no function config() that returns a TrainConfig")
    default = module.config()
    cfg = tyro.cli(
        type(default),
        default=default,
        args=overrides,
        prog=f"python train.py {file}",
        description=module.__doc__,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return cfg if cfg.run_dir else dataclasses.replace(cfg, run_dir=f"runs/{path.stem}")


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the program with one line for these errors; EFFICIENT_LM_TRACEBACK=1 shows where they come from."""
    try:
        yield
    except kinds as error:
        if os.environ.get("EFFICIENT_LM_TRACEBACK"):
            raise
        sys.exit("error: " + " ".join(str(error).split()))
