"""What a user gets wrong ends with one line that names the value and the remedy, and loses nothing."""

import os
import pathlib
import subprocess

import pytest

pytestmark = pytest.mark.slow

# Arguments, and what the message has to contain.
ARGUMENTS = {
    "misspelt field": (["--optimizer.learnin-rate", "1"], ["learnin-rate", "--optimizer.learning-rate"]),
    "value of another type": (["--num-steps", "many"], ["many"]),
    "devices": (["--mesh", "data", "4"], ["mesh {'data': 4}", "6 devices", "--mesh data -1"]),
    "devices and heads": (["--mesh", "model", "6"], ["2 key/value heads", "model=6", "a divisor of 2"]),
    "devices and rows": (["--mesh", "data", "-1"], ["batch_size=4", "2 rows", "data=6", "a divisor of 2"]),
    "axis": (["--mesh", "batch", "6"], ["'batch'", "context, data, expert, model"]),
    "processes": (["--processes.count", "2"], ["processes.index", "0 to 1"]),
    "coordinator": (
        ["--processes.count", "2", "--processes.index", "0", "--processes.coordinator", "here"],
        ["'here'", "HOST:PORT"],
    ),
    "batch and accumulation": (["--grad-accumulation", "3"], ["batch_size=4", "grad_accumulation=3"]),
    "letter without a block": (["--model.pattern", "M X"], ["'X'", "M, A"]),
    "vocabulary too small": (["--model.vocab-size", "100"], ["258", "vocab_size=100", "--model.vocab-size"]),
    "row too short": (["--model.meta-tokens", "32"], ["seq_len=32", "meta_tokens=32"]),
    "value heads": (
        ["--model.blocks.M.mixer.num-heads", "3", "--model.blocks.M.mixer.num-key-heads", "2"],
        ["num_heads=3", "num_key_heads=2"],
    ),
    "query heads": (
        ["--model.blocks.A.mixer.num-kv-heads", "3"],
        ["num_heads=2", "num_kv_heads=3"],
    ),
    "missing path": (["--data.sources.0.path", "no/such/folder"], ["no/such/folder"]),
    "schedule": (["--optimizer.schedule.warmup-steps", "100"], ["100", "num_steps=60"]),
    "profile": (["--profile", "15"], ["'15'", "10:15"]),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(program, case):
    arguments, expected = ARGUMENTS[case]
    code, output = program.finish(*arguments, devices=6)
    assert code != 0
    assert "Traceback" not in output
    for words in expected:
        assert words in output, output
    if "╭" not in output:  # A command line that cannot be read is explained in a box.
        assert output.count("\n") == 1, output
    assert not (program.runs / "run" / "checkpoints").exists()


def test_unknown_configuration(program):
    code, output = program.finish(config=pathlib.Path(__file__).parent / "tinny.py")
    assert code != 0
    assert "tinny.py" in output
    assert "did you mean" in output
    assert "tiny.py" in output


def make_sparse(path, size):
    path.touch()
    os.truncate(path, size)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: None, "holds no text files"),
        (lambda folder: (folder / "a.txt").write_bytes(b"\xff\xfe\x00caf\xe9"), "a.txt"),
        (lambda folder: (folder / "a.txt").mkdir(), "holds no text files"),
        (lambda folder: make_sparse(folder / "a.txt", 10**13), "JSON lines"),
    ],
    ids=["empty folder", "not UTF-8", "no files", "larger than memory"],
)
def test_data(program, tmp_path, make, expected):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    code, output = program.finish("--data.sources.0.path", str(folder))
    assert code != 0
    assert "Traceback" not in output
    assert expected in output
    assert str(folder) in output


def test_run_that_is_still_going(program):
    first = program.start()
    try:
        for line in first.stdout:
            if "starting in" in line:
                break
        code, output = program.finish()
    finally:
        first.kill()
        first.communicate()
    assert code != 0
    assert f"is being written by process {first.pid}" in output
    assert output.count("\n") == 1, output


def test_run_of_another_model(program):
    code, output = program.finish()
    assert code == 0, output
    before = sorted(path.name for path in (program.runs / "run" / "checkpoints").iterdir())
    code, output = program.finish("--model.d-model", "32")
    assert code != 0
    for words in ("d_model", "16", "32", "--fresh"):
        assert words in output
    assert sorted(path.name for path in (program.runs / "run" / "checkpoints").iterdir()) == before
    code, output = program.finish("--seed", "1", "--fresh")
    assert code == 0, output
    assert sorted(path.name for path in (program.runs / "run.1" / "checkpoints").iterdir()) == before


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs to be root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(program, small_disk):
    program.runs = small_disk
    code, output = program.finish("--checkpoint.keep-last", "1000", "--num-steps", "400")
    assert code != 0
    assert "no space left on device" in output.lower()
    assert str(small_disk) in output
    assert "Traceback" not in output
    kept = [int(name) for name in os.listdir(small_disk / "run" / "checkpoints") if name.isdigit()]
    assert kept, "the checkpoints from before are lost"
