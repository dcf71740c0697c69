"""The model: one function however its layers are walked, cut, batched or sharded."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.data import Batch
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, GatedDeltaNetConfig, GLAConfig, Mamba2Config
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.objectives import NextTokenConfig
from efficient_lm.sharding import make_mesh, shard

FFN = MLPConfig(d_ff=16)
HYBRID = ModelConfig(
    vocab_size=32,
    d_model=16,
    blocks={
        "M": BlockConfig(mixer=GatedDeltaNetConfig(num_heads=2, key_dim=8, value_dim=8), ffn=FFN),
        "A": BlockConfig(mixer=AttentionConfig(num_heads=2, head_dim=8), ffn=FFN),
    },
    pattern="M A",
    num_periods=2,
    dtype="float32",
)
TOKENS = jax.random.randint(jax.random.key(1), (4, 13), 0, 32)
IDS = jnp.asarray(np.repeat([[1] * 5 + [2] * 7], 4, axis=0), jnp.int32)
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:], IDS)


def loss_and_grads(cfg):
    model = jax.jit(lambda: cfg.build(rngs=nnx.Rngs(0)))()
    batch = jax.tree.map(lambda x: shard(x, "BT"), BATCH)
    run = jax.jit(jax.value_and_grad(NextTokenConfig(z_loss=1e-3).build(), has_aux=True))
    return jax.device_get(run(model, batch))


def assert_close(got, want):
    """Compares gradients: sums are taken in another order, and single entries of them nearly cancel."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    chex.assert_trees_all_equal_shapes(got, want)
    for a, b in zip(got, want, strict=True):
        assert np.sqrt(np.mean((a - b) ** 2)) <= 1e-4 * np.sqrt(np.mean(b**2))


def test_scanned_equals_unrolled():
    """The same layers in the scan, before it and after it: the same parameters, loss and gradients."""
    unrolled = dataclasses.replace(HYBRID, num_periods=0, prefix="M", tail="A M A")
    ((loss, _), grads), ((want_loss, _), want_grads) = loss_and_grads(unrolled), loss_and_grads(HYBRID)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    layers = [*grads.prefix, *grads.tail]
    stacked = [jax.tree.map(lambda x, i=i: x[i], block) for i in range(2) for block in want_grads.periods]
    for got, want in zip(layers, stacked, strict=True):
        assert_close(nnx.to_pure_dict(nnx.state(got)), nnx.to_pure_dict(nnx.state(want)))


@pytest.mark.parametrize("remat", ["nothing", "dots"])
def test_remat_changes_nothing(remat):
    (loss, _), grads = loss_and_grads(dataclasses.replace(HYBRID, remat=remat))
    (want_loss, _), want_grads = loss_and_grads(HYBRID)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    assert_close(grads, want_grads)


def test_sharded_equals_single():
    (loss, _), grads = loss_and_grads(HYBRID)
    with jax.set_mesh(make_mesh({"data": 4, "model": 2})):
        (sharded_loss, _), sharded_grads = loss_and_grads(HYBRID)
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
    assert_close(sharded_grads, grads)


def test_kinds_of_blocks_and_heads():
    """Blocks without a feed-forward network, untied heads, prefix and tail, bfloat16."""
    cfg = ModelConfig(
        vocab_size=32,
        d_model=16,
        blocks={
            "S": BlockConfig(mixer=Mamba2Config(num_heads=2, key_dim=8, value_dim=8), ffn=None),
            "G": BlockConfig(
                mixer=GLAConfig(num_heads=2, key_dim=8, value_dim=8), ffn=MLPConfig(d_ff=16, activation="squared_relu")
            ),
        },
        prefix="S",
        pattern="G",
        num_periods=1,
        tail="S",
        tied_embeddings=False,
        dtype="bfloat16",
    )
    assert cfg.layers == "S G S"
    model = jax.jit(lambda: cfg.build(rngs=nnx.Rngs(0)))()
    run = jax.jit(lambda model, tokens, state=None: model(tokens, state))
    whole_BTV, _ = run(model, TOKENS)
    state = model.init_state(4, 13)
    left_BTV, state = run(model, TOKENS[:, :9], state)
    right_BTV, _ = run(model, TOKENS[:, 9:], state)
    assert whole_BTV.dtype == jnp.float32
    # bfloat16 activations are rounded at other places when a chunk is cut elsewhere.
    np.testing.assert_allclose(jnp.concatenate([left_BTV, right_BTV], axis=1), whole_BTV, atol=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "M X"}, "letter 'X'.*blocks are M, A"),
        ({"pattern": "MA"}, "letter 'MA'.*separated by spaces"),
        ({"num_periods": 0}, "no blocks"),
        ({"d_model": 0}, "d_model=0"),
    ],
)
def test_bad_patterns(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HYBRID, **changes)
