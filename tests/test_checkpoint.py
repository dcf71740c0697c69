import contextlib
import dataclasses
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_worker import Counter
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efficient_lm.checkpoint import CheckpointConfig, Checkpoints, DamagedCheckpoint, SaveFailed, load_weights
from efficient_lm.leaves import ForeignLeaves, flatten, is_key, unflatten

WORKER = Path(__file__).with_name("checkpoint_worker.py")
CFG = CheckpointConfig(save_every=1, keep_last=3)


def make_mesh(num_devices):
    shape = (num_devices // 2, 2) if num_devices > 1 else (1, 1)
    devices = jax.devices()[:num_devices]
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=devices)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.proj = nnx.Linear(16, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs, param_dtype=jnp.bfloat16) for _ in range(2)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    model: Any
    opt: Any
    step: jax.Array
    key: jax.Array
    nothing: jax.Array


def init(seed=0):
    model = Model(nnx.Rngs(seed))
    state = optax.adam(1e-3).init(model)
    return State(model, state, jnp.int32(seed), jax.random.key(seed), jnp.zeros((0, 3)))


def shard(tree, mesh):
    """Lays matrices out over both axes; gives shapes for shapes and arrays for arrays."""

    def place(x):
        spec = PartitionSpec("data", "model") if x.ndim == 2 and x.size else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    return jax.tree.map(place, tree)


def bits(tree):
    return {path: np.asarray(jax.random.key_data(x) if is_key(x) else x).tobytes() for path, x in flatten(tree).items()}


def save_steps(folder, steps, cfg=CFG):
    """Saves `{"w": step, step + 1, ...}` with the data at 10 * step."""
    data = Counter()
    with Checkpoints(folder, cfg) as checkpoints:
        for step in steps:
            data.n = 10 * step
            checkpoints.save(step, toy(step), data)


def toy(step=0):
    return {"w": step + jnp.arange(4096.0).reshape(64, 64), "b": jnp.full(3, step, jnp.bfloat16)}


@pytest.mark.parametrize("num_devices", [8, 4, 1])
def test_restores_on_another_mesh(tmp_path, num_devices):
    state = shard(init(seed=5), make_mesh(8))
    with Checkpoints(tmp_path, CFG) as checkpoints:
        checkpoints.save(7, state)
    abstract = shard(jax.eval_shape(init), make_mesh(num_devices))
    with Checkpoints(tmp_path, CFG) as checkpoints:
        step, got = checkpoints.restore(abstract)
    assert step == 7
    assert bits(got) == bits(state)
    assert jax.tree.structure(got) == jax.tree.structure(abstract)
    for x, like in zip(jax.tree.leaves(got), jax.tree.leaves(abstract), strict=True):
        assert x.dtype == like.dtype
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)


def test_restores_what_eval_shape_gives_under_a_mesh(tmp_path):
    with jax.set_mesh(make_mesh(4)), Checkpoints(tmp_path, CFG) as checkpoints:
        build = jax.jit(lambda: {"w": jax.reshard(jnp.ones((8, 8)), PartitionSpec("data", "model")), "n": jnp.int32(1)})
        checkpoints.save(1, build())
        _, got = checkpoints.restore(jax.eval_shape(build))
        assert got["w"].sharding.spec == PartitionSpec("data", "model")
        assert len(got["w"].addressable_shards) == 4


def test_restores_without_shardings(tmp_path):
    with Checkpoints(tmp_path, CFG) as checkpoints:
        state = init(seed=2)
        checkpoints.save(1, shard(state, make_mesh(8)))
        _, got = checkpoints.restore(jax.eval_shape(init))
    assert bits(got) == bits(state)
    # Not bound to a device, so that they go together with arrays on any mesh.
    assert not got.step.committed


def test_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "new", CFG) as checkpoints:
        assert checkpoints.latest_step is None
        assert checkpoints.restore({"w": jnp.zeros(3)}) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_weights(tmp_path / "none")


@pytest.mark.parametrize("num_devices", [1, 8])
def test_saving_is_safe_while_steps_donate(tmp_path, num_devices):
    donate = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.device_put(jnp.zeros((2048, 1024)), NamedSharding(make_mesh(num_devices), PartitionSpec("data")))
    data = Counter()
    with Checkpoints(tmp_path, CFG) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": x}, data)
            for _ in range(10):
                x = donate(x)
                next(data)
        jax.block_until_ready(x)
        for step in (3, 2, 1):
            checkpoints.wait()
            restored, got = checkpoints.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}, data)
            assert (restored, data.n) == (step, 10 * (step - 1))
            np.testing.assert_array_equal(got["x"], 10.0 * (step - 1))
            shutil.rmtree(tmp_path / str(step))


def largest(folder):
    """Returns the largest file of array data."""
    return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


def flip(path, bit=0):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << bit
    path.write_bytes(content)


DAMAGE = {
    "a bit of an array": lambda step: flip(largest(step / "state")),
    "an array cut short": lambda step: os.truncate(largest(step / "state"), 100),
    "an array's file gone": lambda step: largest(step / "state").unlink(),
    "all arrays gone": lambda step: shutil.rmtree(step / "state"),
    "orbax's metadata gone": lambda step: (step / "state" / "_METADATA").unlink(),
    "orbax's manifest gone": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "a bit of the record": lambda step: flip(step / "leaves" / "leaves.json"),
    "the record gone": lambda step: (step / "leaves" / "leaves.json").unlink(),
    "a bit of the seal": lambda step: flip(step / "leaves" / "seal_0.json"),
    "the seal gone": lambda step: (step / "leaves" / "seal_0.json").unlink(),
    "a bit of the data position": lambda step: flip(step / "data" / "counter.json"),
    "the data position empty": lambda step: os.truncate(step / "data" / "counter.json", 0),
    "the data position gone": lambda step: shutil.rmtree(step / "data"),
    "an empty folder": lambda step: [shutil.rmtree(step), step.mkdir()],
}


# orbax drops coroutines when it cannot load; garbage collection tells at a moment of its own.
dropped_coroutines = pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@dropped_coroutines
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_falls_back_past_damage(tmp_path, caplog, damage):
    save_steps(tmp_path, [1, 2, 3])
    damage(tmp_path / "3")
    data = Counter()
    with Checkpoints(tmp_path, CFG) as checkpoints:
        step, got = checkpoints.restore(toy(), data)
        assert (step, data.n) == (2, 20)
        assert bits(got) == bits(toy(2))
        (message,) = [record.getMessage() for record in caplog.records if record.name == "efficient_lm.checkpoint"]
        assert f"{tmp_path / '3'} is damaged" in message
        assert "\n" not in message
        assert checkpoints.latest_step == 2
        # The damaged step is saved again, now soundly.
        data.n = 30
        checkpoints.save(3, toy(3), data)
    with Checkpoints(tmp_path, CFG) as checkpoints:
        step, got = checkpoints.restore(toy(), data)
        assert (step, data.n) == (3, 30)
        assert bits(got) == bits(toy(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "3.damaged"]


@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, 3), Path.unlink], ids=["flip", "cut", "gone"])
def test_times_of_a_save_may_be_damaged(tmp_path, damage):
    save_steps(tmp_path, [1, 2])
    damage(tmp_path / "2" / "_CHECKPOINT_METADATA")
    with Checkpoints(tmp_path, CFG) as checkpoints:
        step, got = checkpoints.restore(toy())
        assert step == 2
        assert bits(got) == bits(toy(2))
        checkpoints.save(3, toy(3))


@dropped_coroutines
def test_damaged_checkpoints_do_not_push_out_sound_ones(tmp_path):
    save_steps(tmp_path, [1, 2, 3])
    for step in (2, 3):
        flip(largest(tmp_path / str(step) / "state"))
    with Checkpoints(tmp_path, dataclasses.replace(CFG, keep_last=1)) as checkpoints:
        assert checkpoints.restore(toy())[0] == 1
        checkpoints.save(2, toy(2))
        checkpoints.wait()
        assert checkpoints.restore(toy())[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "2.damaged", "3.damaged"]


@dropped_coroutines
def test_all_damaged(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        flip(largest(tmp_path / str(step) / "state"))
    with (
        Checkpoints(tmp_path, CFG) as checkpoints,
        pytest.raises(DamagedCheckpoint, match=r"every .* 2: .* 1: .*bits of"),
    ):
        checkpoints.restore(toy())
    with pytest.raises(DamagedCheckpoint, match="bits of w"):
        load_weights(tmp_path, prefix="")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_another_model_is_not_damage(tmp_path):
    save_steps(tmp_path, [1, 2])
    other = {"w": jnp.zeros((64, 32)), "b": jnp.zeros(3), "c": jnp.zeros(1)}
    with Checkpoints(tmp_path, CFG) as checkpoints:
        want = r"b is bfloat16\[3\], not float32\[3\]; w is float32\[64,64\], .*\[64,32\]; c float32\[1\] is missing"
        with pytest.raises(ForeignLeaves, match=want):
            checkpoints.restore(other)
        with pytest.raises(ForeignLeaves, match=r"key<fry>\[3\]"):
            checkpoints.restore({"w": jnp.zeros((64, 64)), "b": jax.random.split(jax.random.key(0), 3)})
        assert checkpoints.restore(toy())[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_data_that_refuses_its_sound_position_is_not_damage(tmp_path):
    class Refusing(Counter):
        async def load(self, directory):
            raise ValueError("another batch size")

    save_steps(tmp_path, [1, 2])
    with Checkpoints(tmp_path, CFG) as checkpoints, pytest.raises(ValueError, match="another batch size"):
        checkpoints.restore(toy(), Refusing())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_keeps_what_it_should(tmp_path):
    save_steps(tmp_path, range(1, 8), CheckpointConfig(save_every=1, keep_last=2, keep_every=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "6", "7"]
    with pytest.raises(ValueError, match="keep_last is 0"):
        CheckpointConfig(keep_last=0)


def test_saving_the_same_step_again(tmp_path):
    with Checkpoints(tmp_path, CFG) as checkpoints:
        checkpoints.save(1, toy(1))
        checkpoints.save(1, toy(1))
        checkpoints.save(2, toy(2))
        checkpoints.wait()
        with pytest.raises(ValueError, match="step 1 is not newer than checkpoint 2"):
            checkpoints.save(1, toy(1))
    with Checkpoints(tmp_path, CFG) as checkpoints:
        with pytest.raises(ValueError, match="restore it"):
            checkpoints.save(2, toy(2))
        checkpoints.restore(toy())
        checkpoints.save(2, toy(2))


@dropped_coroutines
def test_load_weights_fills_a_model(tmp_path, caplog):
    state = init(seed=3)
    with Checkpoints(tmp_path, CFG) as checkpoints:
        checkpoints.save(3, shard(state, make_mesh(8)))
        checkpoints.save(4, shard(init(seed=4), make_mesh(8)))
    os.truncate(largest(tmp_path / "4" / "state"), 100)
    step, weights = load_weights(tmp_path)
    assert step == 3
    assert "4 is damaged" in caplog.text
    assert (tmp_path / "4").exists()
    assert bits(unflatten(jax.eval_shape(lambda: Model(nnx.Rngs(0))), weights)) == bits(state.model)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 9 in .*; there are \[3, 4\]"):
        load_weights(tmp_path, step=9)
    with pytest.raises(ValueError, match=r"nothing under 'mdl' in .*; there is key, model, nothing, opt, step"):
        load_weights(tmp_path, prefix="mdl")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(small_disk, caplog):
    noise = lambda rows: {"w": jax.random.normal(jax.random.key(rows), (rows, 1024))}
    with Checkpoints(small_disk / "run", dataclasses.replace(CFG, keep_last=1)) as checkpoints:
        checkpoints.save(1, noise(100))
        checkpoints.save(2, noise(2000))
        time.sleep(2)  # As a trainer would, without waiting for the save.
        with pytest.raises(SaveFailed) as caught:
            checkpoints.check()
        folder = small_disk / "run"
        assert str(caught.value) == (
            f"checkpoint 2 could not be written to {folder}: no space left on device; the newest there is 1"
        )
        assert not caplog.records
        step, got = checkpoints.restore(noise(100))
        assert step == 1
        assert bits(got) == bits(noise(100))
        # There is room for a smaller one, which replaces the first.
        checkpoints.save(2, noise(50))
        checkpoints.wait()
        assert checkpoints.restore(noise(50))[0] == 2
        assert not (folder / "1").exists()


@contextlib.contextmanager
def worker(folder, num_steps=40, seconds_per_step=0.02):
    """Runs the program under test, with one device."""
    root = str(WORKER.parents[1])
    env = os.environ | {"PYTHONPATH": root, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    args = [sys.executable, WORKER, folder, str(num_steps), str(seconds_per_step)]
    with subprocess.Popen(args, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process, start):
    """Returns the first line of the program's output that starts so, or its last line."""
    line = ""
    for line in process.stdout:
        if line.startswith(start):
            break
    return line


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with worker(tmp_path_factory.mktemp("uninterrupted")) as process:
        return read_until(process, "end")


@pytest.mark.slow
def test_kill_at_any_moment(tmp_path, uninterrupted):
    seed = random.randrange(10**6)
    rng, starts = random.Random(seed), []
    for attempt in range(5):
        with worker(tmp_path) as process:
            starts.append(int(read_until(process, "start").split()[1]))
            # The second save since the start waits for the first: there is always some progress.
            read_until(process, f"step {starts[-1] + 4}\n")
            if attempt < 2:
                time.sleep(rng.uniform(0, 0.1))
            elif attempt < 4:  # In the middle of a save.
                while process.poll() is None and not list(tmp_path.glob("*.orbax-checkpoint-tmp")):
                    time.sleep(0.0005)
                time.sleep(rng.uniform(0, 0.02))
            else:
                end = read_until(process, "end")
    assert all(a < b for a, b in itertools.pairwise(starts)), (seed, starts)
    assert end == uninterrupted, (seed, starts)


@pytest.mark.slow
def test_sigterm_saves_and_goes_on(tmp_path, uninterrupted):
    with worker(tmp_path) as process:
        read_until(process, "step 3")
        process.send_signal(signal.SIGTERM)
        last = process.stdout.read().splitlines()[-1]
        assert process.wait() == 0
    with worker(tmp_path) as process:
        assert read_until(process, "start").split()[1] == last.removeprefix("step ")
        assert read_until(process, "end") == uninterrupted
