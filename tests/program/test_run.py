"""What a run leaves behind, and what it says."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_what_a_run_leaves(program):
    code, output = program.finish("--profile", "5:8", "--logging.tensorboard", "--evaluation.every", "20")
    assert code == 0, output
    folder = program.runs / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(5, 61, 5))
    for name in ("grad_norm", "learning_rate", "tokens_per_second", "data_wait", "padding", "goodput", "skipped"):
        assert all(name in line for line in training), name
    assert training[-1]["bits_per_byte"] < training[0]["bits_per_byte"]
    held_out = [line for line in lines if "held_out_bits_per_byte" in line]
    assert [line["step"] for line in held_out] == [20, 40, 60]
    assert f"this model   {held_out[-1]['held_out_bits_per_byte']:.4f} bits per byte" in output

    assert list((folder / "profile").rglob("*.xplane.pb"))
    assert "profile of steps 5 to 8" in output
    assert list((folder / "tensorboard").glob("events.*"))
    assert (folder / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "samples" / "60.txt").read_text().startswith("a")
    assert (folder / "checkpoints" / "60").is_dir()
