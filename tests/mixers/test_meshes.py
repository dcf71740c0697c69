"""Every mixer, and the quickstart's model, on four meshes of eight devices: outputs and gradients are those of one.

Compiling all of it takes a quarter of an hour: `pytest -m meshes -s tests/mixers/test_meshes.py`. What runs with the
other tests is one mesh of all axes for each mixer (contract.py), and each op in eight parts (test_context.py).

The quickstart's model reads text, as it was made to. Of random tokens, gradients of decay rates are sums that nearly
cancel: one device is then off from float64 by 1.1e-5 itself, and eight, with data=8, by 1.8e-6.
"""

import functools
import pathlib

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_contract import PAIRS, TINY

from configs import quickstart
from efficient_lm.data import Batch
from efficient_lm.objectives import NextTokenConfig
from efficient_lm.sharding import make_mesh, shard

pytestmark = pytest.mark.meshes

LICENSE = pathlib.Path(__file__).parents[2] / "LICENSE"
B, T = 8, 24
MESHES = {"data": 8}, {"data": 4, "model": 2}, {"data": 2, "model": 2, "context": 2}, {"context": 8}
# Documents that go through several devices' tokens, end on their borders or lie inside of one's; and padding.
ROWS = [
    [1] * 24,
    [1] * 10 + [2] * 14,
    [0] * 2 + [1] * 4 + [2] * 13 + [0] * 5,
    [0] * 4 + [1] + [2] * 8 + [0] * 5 + [3] * 6,
]
IDS = np.array(ROWS * 2, np.int32)
CASES = {f"{type(cfg).__name__.removesuffix('Config')}-{i}": cfg for i, cfg in enumerate([*TINY, *PAIRS])}


def of_mixer(cfg):
    """Returns the outputs, and the gradients of a loss that weighs them at random."""
    x_BTD, dy_BTD = (jax.random.normal(jax.random.key(seed), (B, T, contract.D_MODEL)) for seed in (1, 2))
    arrays = (x_BTD, "BTD"), (dy_BTD * (IDS > 0)[..., None], "BTD"), (jnp.asarray(IDS), "BT")
    return contract.differentiate(jax.jit(lambda: contract.build(cfg))(), *(shard(x, dims) for x, dims in arrays))


def of_quickstart():
    """Returns the loss of the model and its gradients."""
    cfg, objective = quickstart.config().model, NextTokenConfig().build()
    text = np.frombuffer(LICENSE.read_bytes()[: B * T + 1], np.uint8).astype(np.int32)
    tokens, targets = text[:-1].reshape(B, T), text[1:].reshape(B, T)
    batch = jax.tree.map(lambda x: shard(jnp.asarray(x), "BT"), Batch(tokens, targets, IDS))
    model = jax.jit(lambda: cfg.build(rngs=nnx.Rngs(params=jax.random.key(0))))()
    return jax.jit(jax.value_and_grad(lambda model: objective(model, batch)[0]))(model)


@functools.lru_cache(maxsize=1)
def on_one_device(name):
    return jax.device_get(run(name))


def run(name):
    return of_quickstart() if name == "quickstart" else of_mixer(CASES[name])


@pytest.mark.parametrize("axes", MESHES, ids=lambda axes: ",".join(f"{axis}={size}" for axis, size in axes.items()))
@pytest.mark.parametrize("name", [*CASES, "quickstart"])
def test_equals_one_device(name, axes):
    one = on_one_device(name)
    with jax.set_mesh(make_mesh(axes)):
        parts = jax.device_get(run(name))
    errors = {}
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(parts), jax.tree.leaves(one), strict=True):
        leaf = jax.tree_util.keystr(path, simple=True, separator="/")
        errors[leaf] = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
    worst = max(errors, key=lambda leaf: errors[leaf])
    print(f"\n{name:24} {axes!s:42} {errors[worst]:.1e} {worst}", flush=True)
    assert errors[worst] <= 1e-5
