import asyncio
import gc
import itertools
import json
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

NUM = 12


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def take(batches, num):
    return list(itertools.islice(batches, num))


@pytest.fixture
def data(build, documents):
    return build(documents, ["z" * (n + 1) for n in range(50)], weights=(1.0, 2.0), batch_size=8, prefetch=3)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_resume_equals_uninterrupted(build, documents, prefetch):
    data = build(documents, prefetch=prefetch)
    whole = take(data.train(), NUM)
    batches = data.train()
    for step in range(NUM):
        resumed = data.train()
        take(resumed, step % 4)  # Where an iterator stands, and what it made ahead, does not matter.
        resumed.set_state(json.loads(json.dumps(batches.get_state())))
        assert_same(take(resumed, NUM - step), whole[step:])
        assert_same([next(batches)], whole[step : step + 1])


def test_state_does_not_grow(data):
    batches = data.train()
    take(batches, 1)
    early = len(json.dumps(batches.get_state()))
    take(batches, 200)
    assert len(json.dumps(batches.get_state())) < early * 1.3  # Only digits are added.


def test_orbax_keeps_the_state(data, tmp_path):
    whole = take(data.train(), NUM)
    batches = data.train()
    take(batches, 5)
    with ocp.training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
        response = checkpointer.save_checkpointables_async(5, {"data": batches, "weights": {"w": np.zeros(3)}})
        assert_same(take(batches, 4), whole[5:9])  # Taken while the checkpoint is written.
        response.result()
        resumed = data.train()
        checkpointer.load_checkpointables(5, {"data": resumed})
    assert_same(take(resumed, NUM - 5), whole[5:])


class Folder:
    """What Orbax hands to `save`."""

    def __init__(self, path):
        self.path = path

    async def await_creation(self):
        self.path.mkdir(exist_ok=True)
        return self.path


async def _run(steps):
    for step in steps:
        await (await step)


def test_another_number_of_hosts_goes_on(data, tmp_path):
    whole = take(data.train(), NUM)
    hosts = [data.train(rows=range(n, n + 2)) for n in (0, 2, 4, 6)]
    for host in hosts:
        take(host, 5)
    asyncio.run(_run(host.save(Folder(tmp_path / "data")) for host in hosts))
    for rows in (range(0, 4), range(4, 8), range(0, 8)):
        resumed = data.train(rows=rows)
        asyncio.run(_run([resumed.load(tmp_path / "data")]))
        want = [jax.tree.map(lambda x, rows=rows: x[rows.start : rows.stop], batch) for batch in whole[5:]]
        assert_same(take(resumed, NUM - 5), want)


def test_the_row_length_may_change(build, documents):
    """A run may go on with longer rows: it is the same stream of tokens."""
    short, long = build(documents, seq_len=8, batch_size=1), build(documents, seq_len=24, batch_size=1)
    batches = short.train()
    take(batches, 3)
    resumed = long.train()
    resumed.set_state(batches.get_state())
    np.testing.assert_array_equal(next(resumed).tokens, np.concatenate([b.tokens for b in take(batches, 3)], axis=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: then 0, now 1"),
        ({"validation_fraction": 0.4}, "training documents: then 3"),
        ({"weights": (2.0,)}, r"weights: then \[1.0\], now \[2.0\]"),
        ({"batch_size": 2}, "batch_size 4, not 2"),
    ],
)
def test_other_data_are_refused(build, documents, change, message):
    state = build(documents).train().get_state()
    with pytest.raises(ValueError, match=message):
        build(documents, run="other", **change).train().set_state(state)


def test_a_changed_document_is_refused(build, documents):
    data = build(documents)
    changed = build([documents[0] + "!", *documents[1:]], run="other")
    assert data.fingerprint != changed.fingerprint
    with pytest.raises(ValueError, match="the data are not those of the checkpoint"):
        changed.train().set_state(data.train().get_state())
    assert build(documents, run="third").fingerprint == data.fingerprint


def test_an_empty_checkpoint_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="holds no data state"):
        asyncio.run(_run([data.train().load(tmp_path)]))


def test_an_error_in_the_thread_reaches_the_caller(data):
    batches = data.train()
    next(batches)
    batches.close()
    rows = batches._batches._rows
    rows._corpora = []
    for _ in range(2):
        with pytest.raises(IndexError):
            take(batches, 5)


def test_close_ends_the_thread(data):
    gc.collect()
    before = threading.active_count()
    whole = take(data.train(), 4)  # Forgotten, not closed.
    gc.collect()
    assert threading.active_count() == before
    batches = data.train()
    take(batches, 2)
    batches.close()
    assert_same(take(batches, 2), whole[2:])  # It may be used again, from where it was.
    batches.close()
    batches.close()
    assert threading.active_count() == before


def test_a_program_may_end_in_the_middle(tmp_path):
    """The thread that makes batches ahead does not outlive the interpreter."""
    program = """
from efficient_lm.data import DataConfig
batches = DataConfig().build(run_dir="run", batch_size=64, seq_len=512, seed=0).train()
next(batches)
"""
    env = {"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
