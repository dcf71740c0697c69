"""Every mixer, and the quickstart's model, on four meshes of eight devices: outputs and gradients are those of one.

Compiling all of it takes a quarter of an hour: `pytest -m meshes -s tests/mixers/test_meshes.py`. What runs with the
other tests is one mesh of all axes for each mixer (contract.py), and each op in eight parts (test_context.py).

Gradients of decay rates are sums over tokens that nearly cancel: in the quickstart's model, one rounding of the
embedding moves them by 1.1e-5 on one device, meshes by 0.9e-5 and, on data=8, by 1.1e-5: more than is asked for.
"""

import functools

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_contract import PAIR, TINY

from configs import quickstart
from efficient_lm.data import Batch
from efficient_lm.objectives import NextTokenConfig
from efficient_lm.sharding import make_mesh, shard

pytestmark = pytest.mark.meshes

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
CASES = {f"{type(cfg).__name__.removesuffix('Config')}-{i}": cfg for i, cfg in enumerate([*TINY, PAIR])}


def of_mixer(cfg):
    """Returns the outputs, and the gradients of a loss that weighs them at random."""
    x_BTD, dy_BTD = (jax.random.normal(jax.random.key(seed), (B, T, contract.D_MODEL)) for seed in (1, 2))
    arrays = (x_BTD, "BTD"), (dy_BTD * (IDS > 0)[..., None], "BTD"), (jnp.asarray(IDS), "BT")
    return contract.differentiate(jax.jit(lambda: contract.build(cfg))(), *(shard(x, dims) for x, dims in arrays))


def of_quickstart():
    """Returns the loss of the model and its gradients."""
    cfg, objective = quickstart.config().model, NextTokenConfig().build()
    tokens, targets = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, B, T), dtype=np.int32)
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
