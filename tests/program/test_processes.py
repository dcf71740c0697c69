"""Several processes are one run: they find one another, stop together, and what they saved goes on on any mesh."""

import json
import pathlib
import re
import shutil
import signal
import socket

import numpy as np
import pytest

from efficient_lm.checkpoint import load_weights

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

SMALL = pathlib.Path(__file__).parent / "small.py"
ON_8 = ["--mesh", "data", "4", "model", "2"]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def join(index, port, count=2):
    coordinator = ["--processes.coordinator", f"127.0.0.1:{port}"]
    return [*coordinator, "--processes.count", str(count), "--processes.index", str(index)]


def start_two(program, *arguments, run):
    port = free_port()
    return [program.start(*arguments, *join(i, port), config=SMALL, run=run, devices=4) for i in range(2)]


def finish(processes):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n\n".join(outputs)
    return outputs


def interrupt(process, after, stopped):
    """Sends SIGTERM to the process `stopped` when `process` has done `after` steps."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"step {after}/"):
            stopped.send_signal(signal.SIGTERM)
            return
    raise AssertionError("the program ended: " + "".join(lines))


def saved_step(output):
    return int(re.search(r"stopped and saved after step (\d+)", output)[1])


def losses(program, run):
    lines = [json.loads(line) for line in (program.runs / run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def bits(program, run):
    step, weights = load_weights(program.runs / run / "checkpoints", prefix="")
    assert step == 120
    return {path: np.asarray(x).tobytes() for path, x in weights.items()}


@pytest.fixture(scope="module")
def whole(text, cache, tmp_path_factory):
    """A run of two processes that nothing interrupts."""
    from conftest import Program

    program = Program(text, tmp_path_factory.mktemp("runs"), cache)
    first, second = finish(start_two(program, *ON_8, run="two"))
    assert "8 x cpu as data=4 model=2, in 2 processes" in first
    assert "step 1/" not in second, "only one process reports"
    return program


def assert_close(got, want):
    # float32, summed in another order, and 120 steps for the difference to grow.
    assert got.keys() == want.keys()
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=2e-5)


def test_two_processes_equal_one(whole):
    finish([whole.start(*ON_8, config=SMALL, run="one", devices=8)])
    assert_close(losses(whole, "two"), losses(whole, "one"))


def test_sigterm_to_one_saves_all_and_any_mesh_goes_on(whole, program):
    processes = start_two(program, *ON_8, run="run")
    interrupt(processes[0], after=4, stopped=processes[1])
    output, _ = finish(processes)
    step = saved_step(output)
    assert 4 < step < 100
    assert sorted(p.name for p in (program.runs / "run" / "checkpoints").iterdir()) == [str(step)]
    shutil.copytree(program.runs / "run", program.runs / "elsewhere")

    output, _ = finish(start_two(program, *ON_8, run="run"))
    assert f"going on from step {step}" in output
    assert bits(program, "run") == bits(whole, "two")

    for mesh in (["--mesh", "data", "4"], ["--mesh", "data", "2", "model", "2"]):
        process = program.start(*mesh, config=SMALL, run="elsewhere", devices=4)
        interrupt(process, after=step + 2, stopped=process)
        step = saved_step(*finish([process]))
    finish([program.start(config=SMALL, run="elsewhere")])
    assert_close(losses(program, "elsewhere"), losses(whole, "two"))


@pytest.mark.parametrize("index", [0, 1])
def test_missing_peer(program, index):
    port = free_port()
    code, output = program.finish(*join(index, port), "--processes.timeout", "2", config=SMALL)
    assert code != 0
    assert f"error: process {index} of 2 waited 2 seconds" in output
    assert f"127.0.0.1:{port}" in output
    assert ("not all 2 processes came" if index == 0 else "process 0 does not answer") in output
    assert not (program.runs / "run").exists()


def test_failure_of_one_is_told_to_all(program):
    (program.runs / "run").mkdir()
    (program.runs / "run" / "thesis.tex").touch()
    processes = start_two(program, *ON_8, run="run")
    first, second = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "error: " in first
    assert "thesis.tex" in first
    assert "error: process 0 could not go on: ValueError" in second
    assert "thesis.tex" in second
