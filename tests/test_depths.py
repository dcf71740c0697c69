"""A block that works on some tokens: on these it is the block, to the others it is not there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.costs import block_costs
from efficient_lm.depths import MixtureOfDepthsConfig
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, GLAConfig, RWKV7Config
from efficient_lm.model import Block, ModelConfig
from efficient_lm.sharding import make_mesh, shard

D, T = 16, 12
IDS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2]] * 4, np.int32)
# Room for all that are taken.
ROOMY = MixtureOfDepthsConfig(
    mixer=AttentionConfig(num_heads=2, head_dim=8), ffn=MLPConfig(d_ff=24), share=0.5, capacity_factor=2.0
)
CONFIGS = [ROOMY, dataclasses.replace(ROOMY, mixer=GLAConfig(num_heads=2, key_dim=8, value_dim=8))]

call = jax.jit(lambda block, x, state=None, ids=None: block(x, state, {}, segment_ids=ids)[:2])


def build(cfg):
    return jax.jit(lambda: cfg.build(D, rngs=nnx.Rngs(0)))()


def inputs(seed=1):
    return jax.random.normal(jax.random.key(seed), (8, T, D))


def assert_close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.sqrt(np.mean((a - b) ** 2)) <= tolerance * max(np.sqrt(np.mean(b**2)), 1e-6)


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: type(cfg.mixer).__name__)
def test_is_the_block_on_the_documents_of_what_is_taken(cfg):
    block, x = build(cfg), inputs()
    y, _ = call(block, x, None, jnp.asarray(IDS))
    scores = np.asarray(block.score_proj(x))
    want, num_taken = np.array(x), 0
    for document in (1, 2):
        (at,) = np.nonzero((IDS[0] == document) & (scores[0] > 0))
        num_taken += len(at)
        after = jax.jit(lambda block, x: Block.__call__(block, x, None, {})[0])(block, x[:1, at])[0]
        want[0, at] += (after - x[0, at]) / (1 + np.exp(-scores[0, at, None]))
    assert 0 < num_taken < 10
    assert_close(y[0, :10], want[0, :10])


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: type(cfg.mixer).__name__)
def test_cut_anywhere(cfg):
    block, x = build(cfg), inputs()
    want, _ = call(block, x)
    state, parts = block.mixer.init_state(8, T), []
    for first, last in ((0, 5), (5, 6), (6, 7), (7, 12)):
        y, state = call(block, x[:, first:last], state)
        parts.append(y)
    assert_close(jnp.concatenate(parts, axis=1), want)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_the_future_does_not_leak(factor):
    """Without room for all, too: the first ones get in."""
    block, x, t = build(dataclasses.replace(ROOMY, capacity_factor=factor)), inputs(), 6
    y, _ = call(block, x)
    changed, _ = call(block, x.at[:, t + 1 :].multiply(-3.0))
    np.testing.assert_array_equal(y[:, : t + 1], changed[:, : t + 1])
    taken = np.any(np.asarray(y != x), axis=-1).sum(axis=1)
    assert taken.max() == 3 if factor == 0.5 else taken.max() > 3


def test_sharded_equals_single():
    def run(dims):
        def loss(block, x):
            y, _, _, aux = block(x, None, {}, segment_ids=shard(jnp.asarray(IDS), dims[:2]))
            return jnp.sum(jnp.sin(y)) + aux["depth_loss"], aux

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        return jax.device_get(step(build(ROOMY), shard(inputs(), dims)))

    single = run("")
    with jax.set_mesh(make_mesh({"data": 4, "model": 2})):
        assert_close(run("BTD"), single)


def test_the_loss_brings_the_share_about():
    block, x = build(dataclasses.replace(ROOMY, share=0.25, loss=1.0)), inputs()

    @jax.jit
    def step(block):
        loss = lambda block: (lambda aux: (aux["depth_loss"], aux["share_taken"]))(block(x, None, {})[3])
        (_, taken), grads = jax.value_and_grad(loss, has_aux=True)(block)
        return jax.tree.map(lambda p, g: p - 0.5 * g, block, grads), taken

    shares = []
    for _ in range(200):
        block, taken = step(block)
        shares.append(float(taken))
    assert shares[0] > 0.4
    assert 0.15 < shares[-1] < 0.35


def test_costs_are_those_of_the_share():
    def costs(block):
        cfg = ModelConfig(vocab_size=8, d_model=D, blocks={"A": block}, pattern="A", num_periods=1)
        return block_costs(cfg, context=8)["A"].training_flops

    products = 4 * D * D + 3 * D * 24
    assert costs(dataclasses.replace(ROOMY, share=0.25)) == 0.25 * (6 * (products + D) + 12 * D * 1.5)


def test_refuses_what_needs_other_layers():
    mixer = RWKV7Config(num_heads=2, key_dim=8, value_dim=8, decay_rank=4, rate_rank=6, gate_rank=10)
    with pytest.raises(ValueError, match="RWKV7Config needs what earlier layers leave"):
        dataclasses.replace(ROOMY, mixer=mixer).build(D, rngs=nnx.Rngs(0))
