"""Optimizers: the right update for each parameter, stacked or not; schedules; the guard."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.optimizer import (
    AdamWConfig,
    CosineConfig,
    GuardConfig,
    GuardState,
    MuonConfig,
    TrapezoidConfig,
    guard,
    is_matrix,
    muon_dimensions,
)
from efficient_lm.sharding import make_mesh

CFG = ModelConfig(
    vocab_size=16,
    d_model=8,
    blocks={"A": BlockConfig(mixer=AttentionConfig(num_heads=2, head_dim=6, qk_norm=True), ffn=MLPConfig(d_ff=12))},
    pattern="A",
    num_periods=3,
)


@pytest.fixture(scope="module")
def model():
    return CFG.build(rngs=nnx.Rngs(0))


def variables(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat}


def test_what_counts_as_a_matrix(model):
    matrices = {path for path, yes in variables(is_matrix(model)).items() if yes}
    assert all("kernel" in path or path == "embedding" for path in matrices)
    assert not any("norm" in path for path in matrices)
    assert len(matrices) == 1 + 4 + 3


def test_muon_on_stacked_heads_is_muon_on_each_matrix(model):
    """An orthogonalised update has singular values near one: each layer's, with its heads as one matrix."""
    tx, _ = MuonConfig(
        learning_rate=1.0, weight_decay=0.0, clip_norm=1e9, schedule=CosineConfig(final=1.0), momentum=0.0
    ).build(10)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), model)
    updates, _ = jax.jit(tx.update)(grads, tx.init(model), model)
    layers = updates.periods[0]
    for kernel, rows in (
        (layers.mixer.q_proj.kernel, 8),
        (layers.mixer.o_proj.kernel, 12),
        (layers.ffn.up_proj.kernel, 8),
    ):
        for layer in range(3):
            matrix = np.asarray(kernel[...][layer]).reshape(rows, -1)
            singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
            # Five Newton-Schulz steps bring them between 0.7 and 1.2, by design.
            assert 0.5 < singular.min() < singular.max() < 1.4
    dimensions = muon_dimensions(model)
    assert dimensions.embedding is None
    assert dimensions.periods[0].mixer_norm.scale is None


@pytest.mark.parametrize("cfg", [MuonConfig(learning_rate=0.1), AdamWConfig(learning_rate=0.1)], ids=["muon", "adamw"])
def test_sharded_equals_single(cfg):
    """Eight devices take the step of one, and keep their parts."""
    tx, _ = dataclasses.replace(cfg, schedule=CosineConfig(final=1.0)).build(10)

    @jax.jit
    def two_steps():
        params = CFG.build(rngs=nnx.Rngs(0))
        state = tx.init(params)
        for _ in range(2):
            grads = jax.tree.map(lambda x: jnp.cos(30 * x), params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    single = two_steps()
    with jax.set_mesh(make_mesh({"data": 4, "model": 2})):
        sharded = two_steps()
        assert sharded.periods[0].mixer.q_proj.kernel[...].sharding.spec == PartitionSpec(None, "data", "model", None)
    chex.assert_trees_all_close(jax.tree.leaves(sharded), jax.tree.leaves(single), rtol=1e-3, atol=1e-4)


def test_weight_decay_spares_norms(model):
    tx, _ = AdamWConfig(learning_rate=0.1, weight_decay=0.5, schedule=CosineConfig(final=1.0)).build(10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, model), tx.init(model), model)
    np.testing.assert_allclose(updates.embedding[...], -0.05 * model.embedding[...], rtol=1e-5)
    assert not np.any(updates.norm.scale[...])


def test_schedules():
    trapezoid = TrapezoidConfig(warmup_steps=4, decay_steps=10, final=0.2).build(100)
    assert [float(trapezoid(step)) for step in (0, 2, 4, 50, 90)] == pytest.approx([0, 0.5, 1, 1, 1])
    assert float(trapezoid(95)) == pytest.approx(0.6)
    assert float(trapezoid(100)) == pytest.approx(0.2)
    cosine = CosineConfig(warmup_steps=10, final=0.1).build(110)
    assert [float(cosine(step)) for step in (5, 10, 60, 110)] == pytest.approx([0.5, 1, 0.55, 0.1])
    with pytest.raises(ValueError, match=r"take 14 steps.*num_steps=13"):
        TrapezoidConfig(warmup_steps=4, decay_steps=10).build(13)


def test_clipping_is_by_the_global_norm(model):
    tx = AdamWConfig(learning_rate=1.0, clip_norm=1.0).build(200)[0]
    grads = jax.tree.map(lambda x: jnp.full_like(x, 100.0), model)
    _, state = tx.update(grads, tx.init(model), model)
    moments = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(moments)) == pytest.approx(0.1, rel=1e-4)


def test_guard_skips_what_cannot_be_trusted():
    cfg = GuardConfig(spike=10.0, memory=0.9, patience=3)
    state, accepted = GuardState.init(), []
    norms = [50.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, jnp.inf, jnp.nan, 200.0, 5.0]
    for norm in norms:
        accept, state = guard(cfg, state, jnp.float32(norm))
        accepted.append(bool(accept))
    assert accepted == [True] * 10 + [False, False, False, True]
    assert int(state.skipped) == 3
    assert int(state.in_a_row) == 0
    assert dataclasses.asdict(state)["mean_norm"] > 0
