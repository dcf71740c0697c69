"""A transformer that several layers call: one set of weights, walked by a scan or not, and what it costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.costs import model_costs, num_parameters
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, Mamba2Config
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.sharding import make_mesh, shard
from efficient_lm.transformer_call import TransformerCallConfig

CALL = TransformerCallConfig(
    name="shared",
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=MLPConfig(d_ff=24),
    adapter_rank=3,
    adapted=("attention.q_proj", "ffn.up_proj"),
)
MIXER = Mamba2Config(num_heads=4, num_groups=2, key_dim=8, value_dim=8)
MODEL = ModelConfig(
    vocab_size=32,
    d_model=16,
    blocks={"M": BlockConfig(mixer=MIXER, ffn=None), "S": BlockConfig(mixer=MIXER, ffn=None, call=CALL)},
    pattern="M S",
    num_periods=2,
    dtype="float32",
)
TOKENS = jax.random.randint(jax.random.key(1), (4, 9), 0, 32)


def loss_and_grads(cfg):
    model = jax.jit(lambda: cfg.build(rngs=nnx.Rngs(0)))()
    loss = lambda model, tokens, ids: jnp.mean(jnp.square(model(tokens, segment_ids=ids)[0]))
    data = shard(TOKENS, "BT"), shard(jnp.ones_like(TOKENS), "BT")
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(model, *data))


def assert_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.sqrt(np.mean((a - b) ** 2)) <= 1e-4 * np.sqrt(np.mean(b**2))


def test_scanned_unrolled_and_sharded():
    """The gradient of what is shared is the sum over its calls, wherever these are."""
    loss, grads = loss_and_grads(MODEL)
    unrolled_loss, unrolled = loss_and_grads(dataclasses.replace(MODEL, num_periods=0, prefix="M S", tail="M S"))
    with jax.set_mesh(make_mesh({"data": 4, "model": 2})):
        sharded_loss, sharded = loss_and_grads(MODEL)
    np.testing.assert_allclose(unrolled_loss, loss, rtol=1e-5)
    assert_close(unrolled.called, grads.called)
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
    assert_close(sharded, grads)


def test_costs_are_those_of_the_model():
    model = jax.eval_shape(lambda: MODEL.build(rngs=nnx.Rngs(0)))
    state = jax.eval_shape(lambda: MODEL.build(rngs=nnx.Rngs(0)).init_state(2, 9))
    costs = model_costs(MODEL, context=9, batch_size=2)
    assert costs.parameters == num_parameters(model)
    assert costs.state_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    # Each call multiplies with all weights of the transformer.
    alone = dataclasses.replace(MODEL, blocks={**MODEL.blocks, "S": MODEL.blocks["M"]})
    matrices = sum(x.size for x in jax.tree.leaves(model.called) if x.ndim > 1)
    extra = costs.training_flops - model_costs(alone, context=9).training_flops
    assert extra > 2 * 6 * matrices


def test_calls_of_one_name_are_alike():
    other = dataclasses.replace(MODEL.blocks["S"], call=dataclasses.replace(CALL, adapter_rank=4))
    with pytest.raises(ValueError, match="calls of 'shared' differ"):
        dataclasses.replace(MODEL, blocks={**MODEL.blocks, "T": other})
