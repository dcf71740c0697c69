"""Every op compiles for every TPU generation, with its kernels, on a machine that has none."""

import os
import pathlib
import subprocess
import sys

import pytest


def run(*arguments):
    # In a process of its own: libtpu is loaded once, for good. XLA's flags here are those of quick tests on a CPU.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command, root = [sys.executable, "-m", *arguments], pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# For the time it takes, float32 on one device is for one of them alone; `python -m tests.aot.gate v5p` does all.
@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["v5e"], ["v5p", "mesh"], ["v6e", "mesh"], ["tpu7x", "mesh"]], ids=" ".join)
def test_compiles(arguments):
    run("tests.aot.gate", *arguments)


@pytest.mark.slow
def test_experts_on_a_pod():
    run("tests.aot.experts")


@pytest.mark.slow
def test_plan():
    run("tests.aot.plan")
