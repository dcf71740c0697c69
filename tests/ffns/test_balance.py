"""What no gradient trains: biases that even out the load, the weight of a loss; and the losses of routers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_lm import buffers
from efficient_lm.checkpoint import CheckpointConfig, Checkpoints
from efficient_lm.config import TrainConfig
from efficient_lm.costs import model_costs
from efficient_lm.data import Batch
from efficient_lm.ffns import MoEConfig
from efficient_lm.ffns.routers import ReLUConfig, TopKConfig
from efficient_lm.ffns.routers.base import balance, z_value
from efficient_lm.mixers import AttentionConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.optimizer import AdamWConfig, CosineConfig, MuonConfig, muon_dimensions
from efficient_lm.sharding import make_mesh, shard
from efficient_lm.training import init_state, make_train_step

E, RATE = 8, 0.01
ROUTER = TopKConfig(top_k=2, scores="sigmoid", bias_rate=RATE)


def config(router=ROUTER, **changes) -> TrainConfig:
    ffn = MoEConfig(router=router, num_experts=E, d_ff=12)
    block = BlockConfig(mixer=AttentionConfig(num_heads=2, head_dim=8), ffn=ffn)
    model = ModelConfig(
        vocab_size=32, d_model=16, blocks={"A": block}, prefix="A", pattern="A", num_periods=2, dtype="float32"
    )
    optimizer = AdamWConfig(learning_rate=1e-2, schedule=CosineConfig(warmup_steps=0))
    fields = {"model": model, "optimizer": optimizer, "num_steps": 10, "batch_size": 8, "seq_len": 12} | changes
    return TrainConfig(**fields)


def batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (8, 13)).astype(np.int32)
    ids = np.tile(np.array([1] * 7 + [2] * 3 + [0] * 2, np.int32), (8, 1))
    return Batch(*(shard(jnp.asarray(x), "BT") for x in (tokens[:, :-1], tokens[:, 1:], ids)))


def train(cfg, num_steps=1):
    """Returns the model before and after, and the metrics of the last step."""
    optimizer, _ = cfg.optimizer.build(cfg.num_steps)
    step, init = make_train_step(cfg, cfg.objective.build(), optimizer), jax.jit(lambda: init_state(cfg, optimizer))
    state, metrics = init(), {}
    for _ in range(num_steps):
        state, metrics = step(state, batch())
    return *jax.device_get((init().model, state.model)), metrics


def measured(cfg):
    """Returns what the buffers see of the first batch: summed over its tokens, each divided by their number."""
    state = init_state(cfg, cfg.optimizer.build(cfg.num_steps)[0])
    grads = jax.grad(cfg.objective.build(), has_aux=True)(state.model, batch())[0]
    return jax.tree.map(lambda x: x / 80, buffers.split(grads)[1])


def test_bias_goes_against_the_load():
    before, after, _ = train(config())
    for layer, got, load_E in (
        ("prefix", after.prefix[0].ffn.router.bias, measured(config()).prefix[0].ffn.router.bias),
        ("periods", after.periods[0].ffn.router.bias, measured(config()).periods[0].ffn.router.bias),
    ):
        np.testing.assert_allclose(jnp.sum(load_E, axis=-1), 2.0, rtol=1e-6, err_msg=layer)  # Two experts a token.
        assert jnp.std(load_E) > 0.01
        np.testing.assert_allclose(got[...], RATE * np.sign(2 / E - load_E), rtol=1e-6, err_msg=layer)
    assert not np.any(before.prefix[0].ffn.router.bias[...])


def test_measurements_are_no_gradients():
    """The norm, which clipping and the guard go by, is that of the gradients."""
    without = dataclasses.replace(ROUTER, bias_rate=None)
    _, _, metrics = train(config())
    _, _, want = train(config(without))
    np.testing.assert_allclose(metrics["grad_norm"], want["grad_norm"], rtol=1e-6)


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "expert": 4}])
def test_parts_and_devices_give_the_same_bias(mesh):
    want = train(config())[1].periods[0].ffn.router.bias[...]
    if mesh:
        with jax.set_mesh(make_mesh(mesh)):
            got = train(config())[1]
    else:
        got = train(config(grad_accumulation=4))[1]
    np.testing.assert_array_equal(got.periods[0].ffn.router.bias[...], want)


def test_bias_goes_on_from_a_checkpoint(tmp_path):
    cfg = config()
    optimizer, _ = cfg.optimizer.build(cfg.num_steps)
    step, init = make_train_step(cfg, cfg.objective.build(), optimizer), jax.jit(lambda: init_state(cfg, optimizer))
    biases = lambda state: [
        np.asarray(block.ffn.router.bias[...]) for block in (*state.model.prefix, *state.model.periods)
    ]
    state, then = init(), []
    with Checkpoints(tmp_path, CheckpointConfig(save_every=1)) as checkpoints:
        for i in range(4):
            state, _ = step(state, batch())
            then.append(biases(state))
            if i == 1:
                checkpoints.save(2, state)
        _, state = checkpoints.restore(init())
    assert all(np.any(bias) for bias in biases(state))
    now = [biases(state)]
    for _ in range(2):
        state, _ = step(state, batch())
        now.append(biases(state))
    jax.tree.map(np.testing.assert_array_equal, now, then[1:])


def test_weight_of_the_loss_follows_the_number_of_experts():
    router = ReLUConfig(expected_experts=1.0, max_experts=8, loss=1e-3, step=1.5)
    _, model, metrics = train(config(router), num_steps=2)
    assert metrics["experts_per_token"] > 1  # About half of eight, at first.
    np.testing.assert_allclose(model.periods[0].ffn.router.loss_weight[...], 1e-3 * 1.5**2, rtol=1e-6)


def test_losses_reach_the_objective():
    _, _, metrics = train(config(TopKConfig(top_k=2, balance_loss=0.1, z_loss=0.2)))
    assert metrics["balance_loss"] >= 0.1
    want = metrics["nll"] + metrics["balance_loss"] + metrics["router_z_loss"]
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)


def test_losses_by_hand():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 4)).astype(np.float32)
    is_real = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], bool)
    real = logits[is_real]
    probabilities, lse = np.exp(logits) / np.sum(np.exp(logits), axis=-1, keepdims=True), np.log(np.exp(real).sum(-1))
    load = np.array([6.0, 0.0, 2.0, 4.0], np.float32)
    want = 4 * np.sum(load / 12 * probabilities[is_real].mean(0))
    got = balance(jnp.asarray(probabilities), jnp.asarray(load), jnp.asarray(is_real))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(z_value(jnp.asarray(logits), jnp.asarray(is_real)), np.mean(lse**2), rtol=1e-6)
    even = balance(jnp.full((2, 5, 4), 0.25), jnp.asarray(load), jnp.asarray(is_real))
    np.testing.assert_allclose(even, 1.0, rtol=1e-6)


def test_each_expert_is_a_matrix_to_muon():
    cfg = config(optimizer=MuonConfig(learning_rate=1e-2, schedule=CosineConfig(warmup_steps=0)))
    model = jax.eval_shape(lambda: cfg.model.build(rngs=nnx.Rngs(0)))
    experts = muon_dimensions(model).periods[0].ffn.experts
    assert experts.up_proj == optax.contrib.MuonDimensionNumbers(reduction_axis=(2,), output_axis=(3,))
    assert experts.down_proj == optax.contrib.MuonDimensionNumbers(reduction_axis=(2,), output_axis=(3,))
    before, after, _ = train(cfg)
    assert np.any(before.prefix[0].ffn.experts.up_proj[...] != after.prefix[0].ffn.experts.up_proj[...])


def test_flops_count_active_experts():
    attention, router, expert, head = 4 * 16 * 16, 16 * E, 3 * 16 * 12, 16 * 32
    weights, pairs = 3 * (attention + router + 2 * expert) + head, 3 * (2 * 8) * (12 + 1) / 2
    assert model_costs(config().model, context=12).training_flops == 6 * weights + 3 * 4 * pairs
