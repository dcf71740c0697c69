"""Every op compiles for every TPU generation, with its kernels, on a machine that has none."""

import pathlib
import subprocess
import sys

import pytest


def run(*arguments):
    # In a process of its own: libtpu is loaded once, for good.
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_compiles(chip):
    run("tests.aot.gate", chip)


@pytest.mark.slow
def test_memory_is_linear():
    run("tests.aot.memory", "1024", "8192")
