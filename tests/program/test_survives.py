"""A run that is killed, stopped or damaged goes on as if nothing had happened, to the bit."""

import os
import random
import re
import signal
import time

import numpy as np
import pytest

from efficient_lm.checkpoint import load_weights

pytestmark = pytest.mark.slow


def final_weights(program, run):
    step, weights = load_weights(program.runs / run / "checkpoints", prefix="")
    assert step == 60
    return {path: np.asarray(x) for path, x in weights.items()}


@pytest.fixture(scope="module")
def uninterrupted(text, cache, tmp_path_factory):
    from conftest import Program

    program = Program(text, tmp_path_factory.mktemp("runs"), cache)
    code, output = program.finish()
    assert code == 0, output
    for word in ("bits per byte", "gzip -9", "xz -9e", "checkpoint", "loss.png"):
        assert word in output
    return final_weights(program, "run")


def assert_same(got, want):
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)


def wait_for(process, pattern):
    """Reads the output up to a line that matches."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return lines
    raise AssertionError("the program ended: " + "".join(lines))


def test_killed_at_random_moments(program, uninterrupted):
    draw = random.Random(1)
    for attempt in range(5):
        process = program.start()
        # Some kills hit a save: there is one every four steps, and a step takes milliseconds.
        wait_for(process, "compiling|step " if attempt else "step 5/")
        time.sleep(draw.uniform(0.0, 0.5))
        process.kill()
        process.communicate()
    code, output = program.finish()
    assert code == 0, output
    assert_same(final_weights(program, "run"), uninterrupted)


def test_sigterm_saves_within_one_step(program, uninterrupted):
    process = program.start()
    wait_for(process, "step 5/")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    stopped = re.search(r"stopped and saved after step (\d+)", output)
    assert stopped is not None, output
    assert max(int(name) for name in os.listdir(program.runs / "run" / "checkpoints")) == int(stopped[1])
    code, output = program.finish()
    assert code == 0, output
    assert f"going on from step {stopped[1]}" in output
    assert_same(final_weights(program, "run"), uninterrupted)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_falls_back(program, uninterrupted, damage):
    code, output = program.finish("--num-steps", "60")
    assert code == 0, output
    newest = program.runs / "run" / "checkpoints" / "60" / "state"
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 16
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    code, output = program.finish()
    assert code == 0, output
    assert "damaged" in output
    assert "going on from step 56" in output
    assert_same(final_weights(program, "run"), uninterrupted)
