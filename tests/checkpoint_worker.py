"""Trains a toy state with asynchronous saves: `python checkpoint_worker.py FOLDER NUM_STEPS [SECONDS_PER_STEP]`.

Prints a line per step, and the fingerprint of all that the last state is made of at the end.
"""

import functools
import json
import sys
import time

import jax
import jax.numpy as jnp

from efficient_lm.checkpoint import CheckpointConfig, Checkpoints
from efficient_lm.leaves import fingerprints, flatten, to_hex
from efficient_lm.signals import stop_signals


class Counter:
    """A source of data whose position is saved."""

    def __init__(self):
        self.n = 0

    def __next__(self) -> int:
        self.n += 1
        return self.n

    async def save(self, directory):
        text = json.dumps({"n": self.n})

        async def write():
            (await directory.await_creation() / "counter.json").write_text(text)

        return write()

    async def load(self, directory):
        async def read():
            self.n = json.loads((directory / "counter.json").read_text())["n"]

        return read()


def init():
    key = jax.random.key(0)
    return {"w": jax.random.normal(key, (256, 512)), "m": jnp.zeros((256, 512), jnp.bfloat16), "key": key}


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, x):
    key, noise = jax.random.split(state["key"])
    grad = jnp.sin(state["w"] * x) + jax.random.normal(noise, state["w"].shape)
    m = (0.9 * state["m"] + 0.1 * grad).astype(jnp.bfloat16)
    return {"w": state["w"] - 0.1 * m, "m": m, "key": key}


def main(folder: str, num_steps: str, seconds_per_step: str = "0"):
    state, data, step = init(), Counter(), 0
    cfg = CheckpointConfig(save_every=2, keep_last=2)
    with Checkpoints(folder, cfg) as checkpoints, stop_signals() as should_stop:
        restored = checkpoints.restore(jax.eval_shape(init), data)
        if restored is not None:
            step, state = restored
        print("start", step, flush=True)
        while step < int(num_steps):
            state, step = train_step(state, float(next(data))), step + 1
            time.sleep(float(seconds_per_step))
            stop = should_stop(step)
            if checkpoints.is_due(step) or stop:
                checkpoints.save(step, state, data)
            print("step", step, flush=True)
            if stop:
                return
    state["key"] = jax.random.key_data(state["key"])
    print("end", data.n, to_hex(fingerprints(flatten(state))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
