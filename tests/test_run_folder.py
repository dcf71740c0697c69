import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from efficient_lm.checkpoint import CheckpointConfig
from efficient_lm.config_data import config_from_dict, config_to_dict
from efficient_lm.run_folder import open_run, read_config

HERE = (__name__, "efficient_lm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixer:
    num_heads: int = 4
    decay: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    num_heads: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    blocks: dict[str, Mixer | Attention]
    shape: tuple[int, ...] = (2, 3)
    mixers: tuple[Mixer, ...] = ()
    name: str = "x"
    num_steps: int = dataclasses.field(default=10, metadata={"resumable": True})
    checkpoint: CheckpointConfig = dataclasses.field(default=CheckpointConfig(), metadata={"resumable": True})


def make_local():
    @dataclasses.dataclass(frozen=True)
    class Local:
        x: int = 1

    return Local()


CONFIG = Train(blocks={"M": Mixer(decay=float("inf")), "A": Attention()}, mixers=(Mixer(num_heads=2), Mixer()))


def test_config_reads_back():
    plain = json.loads(json.dumps(config_to_dict(CONFIG)))
    assert config_from_dict(plain, packages=HERE) == CONFIG
    assert plain["blocks"]["A"] == {"class": f"{__name__}:Attention", "num_heads": 4}
    assert plain["checkpoint"]["class"] == "efficient_lm.checkpoint:CheckpointConfig"


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ([1], r"Train.name is \[1\]"),
        (print, "Train.name is <built-in"),
        (Path("a"), "Train.name is "),
        ({1: 2}, "Train.name has the key 1"),
        ({"class": 2}, "Train.name has the key 'class'"),
        ((1, {"a": {2}}), r"Train.name.1.a is \{2\}"),
        (
            dataclasses.make_dataclass("Local", [], module="m", namespace={"__qualname__": "f.<locals>.L"})(),
            "f.<locals>",
        ),
    ],
)
def test_config_must_be_plain_data(leaf, message):
    with pytest.raises(ValueError, match=message):
        config_to_dict(dataclasses.replace(CONFIG, name=leaf))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"class": "os:system"}, "the class os:system is not one of efficient_lm"),
        ({"class": "efficient_lm_evil:A"}, "is not one of"),
        ({"class": "efficient_lm.run_folder:os.system"}, "no dataclass"),
        ({"class": "efficient_lm.run_folder:RunFolder"}, "no dataclass"),
        ({"class": "efficient_lm.checkpoint:dataclasses.Field"}, "no dataclass"),
        ({"class": "efficient_lm.nowhere:A"}, "there is no class efficient_lm.nowhere:A"),
        ({"class": "efficient_lm.checkpoint:Nothing"}, "there is no class"),
        ({"class": "efficient_lm.checkpoint:CheckpointConfig", "keep": 1}, "has no field keep"),
    ],
)
def test_only_own_dataclasses_are_read(data, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict({"a": [data]})


def test_new_run(tmp_path):
    with open_run(tmp_path / "runs" / "a", CONFIG) as run:
        assert run.path == tmp_path / "runs" / "a"
        assert run.plots.is_dir()
        assert run.samples.is_dir()
    assert read_config(run.path, packages=HERE) == CONFIG
    (versions,) = json.loads((run.path / "versions.json").read_text())
    assert versions["jax"]
    assert versions["devices"] == "8 x cpu"
    with pytest.raises(ValueError, match=r"not the folder of a run: it has no config.json"):
        read_config(tmp_path)


def test_run_goes_on(tmp_path):
    open_run(tmp_path, CONFIG).close()
    longer = dataclasses.replace(CONFIG, num_steps=20, checkpoint=CheckpointConfig(save_every=7))
    open_run(tmp_path, longer).close()
    assert read_config(tmp_path, packages=HERE) == longer
    assert len((tmp_path / "command.txt").read_text().splitlines()) == 2
    assert len(json.loads((tmp_path / "versions.json").read_text())) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "y"}, ["name: 'x' in the run, 'y' now"]),
        ({"shape": (2, 4)}, ["shape: [2, 3] in the run, [2, 4] now"]),
        ({"mixers": (Mixer(num_heads=3), Mixer())}, ["mixers.0.num_heads: 2 in the run, 3 now"]),
        ({"mixers": (Mixer(num_heads=2),)}, ["mixers.1.num_heads: 4 in the run, nothing now"]),
        (
            {"blocks": {"M": Mixer(decay=0.5), "A": Mixer()}, "num_steps": 11, "shape": (1,)},
            [
                "blocks.M.decay: inf in the run, 0.5 now",
                f"blocks.A.class: '{__name__}:Attention' in the run, '{__name__}:Mixer' now",
                "shape: [2, 3] in the run, [1] now",
            ],
        ),
    ],
)
def test_another_configuration_is_refused(tmp_path, changes, said):
    open_run(tmp_path, CONFIG).close()
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=r"Pass --fresh .* or another --run-dir") as caught:
        open_run(tmp_path, dataclasses.replace(CONFIG, **changes))
    for line in said:
        assert f"\n  {line}\n" in str(caught.value)
    assert "num_steps" not in str(caught.value)
    assert (tmp_path / "config.json").read_text() == before
    open_run(tmp_path, CONFIG).close()  # The refusal let go of the lock.


def test_a_run_without_a_checkpoint_may_change(tmp_path):
    open_run(tmp_path, CONFIG).close()
    other = dataclasses.replace(CONFIG, name="y")
    open_run(tmp_path, other).close()
    assert read_config(tmp_path, packages=HERE) == other


def test_a_field_that_is_new_since_may_have_its_default(tmp_path):
    open_run(tmp_path, CONFIG).close()
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    plain = json.loads((tmp_path / "config.json").read_text())
    del plain["name"], plain["mixers"]
    (tmp_path / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"mixers.0.num_heads: nothing in the run, 2 now"):
        open_run(tmp_path, CONFIG)
    open_run(tmp_path, dataclasses.replace(CONFIG, mixers=())).close()


def test_fresh_moves_the_old_run_aside(tmp_path):
    path = tmp_path / "a"
    for name in ("p", "q", "r"):
        with open_run(path, dataclasses.replace(CONFIG, name=name), fresh=True) as run:
            run.metrics.write_text(name)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "a.1", "a.2"]
    assert [(tmp_path / x / "metrics.jsonl").read_text() for x in ("a.1", "a.2", "a")] == ["p", "q", "r"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path, fresh):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"is not the folder of a run and holds thesis.tex; pass another --run-dir"):
        open_run(tmp_path, CONFIG, fresh=fresh)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_that_was_killed_half_way_starts_again(tmp_path):
    open_run(tmp_path, CONFIG).close()
    (tmp_path / "config.json").rename(tmp_path / "config.json.new")
    (tmp_path / "plots").rmdir()
    (tmp_path / "samples").rmdir()
    open_run(tmp_path, dataclasses.replace(CONFIG, name="y")).close()
    assert read_config(tmp_path, packages=HERE).name == "y"


HOLD = """
import sys
from efficient_lm.checkpoint import CheckpointConfig
from efficient_lm.run_folder import open_run
run = open_run(sys.argv[1], CheckpointConfig())
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("fresh", [False, True])
def test_one_process_at_a_time(tmp_path, fresh):
    path, root = tmp_path / "a", str(Path(__file__).parents[1])
    args, env = [sys.executable, "-c", HOLD, path], os.environ | {"PYTHONPATH": root}
    pipe = subprocess.PIPE
    with subprocess.Popen(args, env=env, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(BlockingIOError, match=rf"is being written by process {process.pid} on .*; stop it, or"):
            open_run(path, CheckpointConfig(), fresh=fresh)
        assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
        process.kill()
        process.wait()
        with (
            open_run(path, CheckpointConfig(), fresh=fresh),
            pytest.raises(BlockingIOError, match=r"close\(\) the earlier one"),
        ):
            open_run(path, CheckpointConfig())
