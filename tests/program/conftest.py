"""Runs train.py as a user does: in a process of its own."""

import os
import pathlib
import random
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TINY = pathlib.Path(__file__).parent / "tiny.py"


class Program:
    """train.py with a folder of text, a place for runs, and a cache of compiled programs that the tests share."""

    def __init__(self, text: pathlib.Path, runs: pathlib.Path, cache: pathlib.Path):
        self.text, self.runs = text, runs
        self.environment = os.environ | {
            "TEXT": str(text),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # Programs for milliseconds are not worth LLVM's time.
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",
        }

    def start(
        self, *arguments: str, config: pathlib.Path | str = TINY, run: str = "run", devices: int = 1
    ) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "train.py"), str(config), "--run-dir", str(self.runs / run), *arguments]
        return subprocess.Popen(
            command,
            cwd=self.runs,
            env=self.environment | {"JAX_NUM_CPU_DEVICES": str(devices)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def finish(self, *arguments: str, **where: Any) -> tuple[int, str]:
        """Returns exit code and output."""
        process = self.start(*arguments, **where)
        output, _ = process.communicate(timeout=400)
        return process.returncode, output


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Twelve files of words, some shorter than a row and some of many rows."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    words = ["state", "of", "the", "art", "recurrence", "übergang", "decay\n", "key", "value;"]
    for number in range(12):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=draw.choice([2, 30, 300]))))
    return folder


@pytest.fixture
def program(text, cache, tmp_path):
    return Program(text, tmp_path, cache)
