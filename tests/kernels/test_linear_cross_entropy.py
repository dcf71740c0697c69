import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_cross_entropy
from pallas_kernels.linear_cross_entropy import xla

# float32 sums of 16 products and of 37 exponentials, in another order.
VALUE_TOLERANCE, GRAD_TOLERANCE = 2e-6, 2e-5


def rms_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30) if want.size else 0.0


def make(T, B=2, D=16, V=37, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    labels, weights = rng.integers(0, V, (B, T)), rng.random((B, T))
    # Positions without a target: weight 0, and a label that is not in the vocabulary.
    labels[:, 1::5], labels[:, 2::5], weights[:, 1::5], weights[:, 2::5] = -1, V, 0, 0
    return normal(B, T, D), normal(D, V), labels.astype(np.int32), weights.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("impl", "z_loss", "soft_cap"))
def run(x, w, labels, weights, *, impl, z_loss=0.0, soft_cap=None):
    """Returns loss and lse, and the gradients of x, w and weights for random cotangents of both."""
    fn = lambda x, w, weights: linear_cross_entropy(
        x, w, labels, weights=weights, z_loss=z_loss, soft_cap=soft_cap, impl=impl
    )
    outputs, pull = jax.vjp(fn, x, w, weights)
    rng = np.random.default_rng(1)
    return outputs, pull(jax.tree.map(lambda o: jnp.asarray(rng.normal(size=o.shape), o.dtype), outputs))


def assert_same(got, want):
    for outputs, tolerance in ((0, VALUE_TOLERANCE), (1, GRAD_TOLERANCE)):
        for g, w in zip(got[outputs], want[outputs], strict=True):
            assert rms_error(g, w) < tolerance


@pytest.mark.parametrize("T", [0, 1, 3, 67])
def test_agrees_with_ref(T, monkeypatch):
    # Chunks of 45 of the 134 tokens, so that the last one is not full.
    monkeypatch.setattr(xla, "CHUNK_LOGITS", 0)
    monkeypatch.setattr(xla, "MIN_CHUNK", 48)
    args = make(T)
    assert_same(run(*args, impl="xla", z_loss=0.1), run(*args, impl="ref", z_loss=0.1))


def test_soft_cap():
    args = make(20)
    assert_same(run(*args, impl=None, soft_cap=3.0), run(*args, impl="ref", soft_cap=3.0))


def test_ref_is_a_cross_entropy():
    x, w, labels, weights = make(7)
    (loss, lse), _ = jax.tree.map(np.asarray, run(x, w, labels, weights, z_loss=0.1, impl="ref"))
    probabilities = np.exp(x @ w) / np.sum(np.exp(x @ w), axis=2, keepdims=True)
    for b, t in [(0, 0), (1, 3)]:
        nll = -np.log(probabilities[b, t, labels[b, t]])
        np.testing.assert_allclose(loss[b, t], weights[b, t] * (nll + 0.1 * lse[b, t] ** 2), rtol=1e-5)
    assert np.all(loss[:, 1] == 0)


def test_weights_default_to_one():
    x, w, labels, weights = make(5)
    labels = np.clip(labels, 0, 36)
    loss, _ = jax.jit(linear_cross_entropy)(x, w, labels)
    want, _ = jax.jit(linear_cross_entropy)(x, w, labels, weights=np.ones_like(weights))
    np.testing.assert_array_equal(loss, want)


def test_large_logits_stay_finite():
    x, w, labels, weights = make(7)
    (loss, lse), grads = run(np.float32(1e4) * x, w, labels, weights, impl="xla")
    assert all(np.all(np.isfinite(a)) for a in (loss, lse, *grads))


def test_logits_are_never_whole(monkeypatch):
    monkeypatch.setattr(xla, "CHUNK_LOGITS", 0)
    monkeypatch.setattr(xla, "MIN_CHUNK", 32)
    x, w, labels, weights = make(256, V=512)
    stats = run.lower(x, w, labels, weights, impl=None).compile().memory_analysis()
    assert stats is not None
    assert stats.temp_size_in_bytes < x.size // 16 * 512 * 4 // 2  # All logits would be twice that.


def test_bfloat16():
    x, w, labels, weights = make(67)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    got = run(x, w, labels, weights, impl="xla")
    want = run(x.astype(np.float32), w.astype(np.float32), labels, weights, impl="ref")
    assert [a.dtype for a in jax.tree.leaves(got)] == [jnp.float32] * 2 + [jnp.bfloat16] * 2 + [jnp.float32]
    for g, a in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rms_error(g, a) < 1e-2  # The gradients of the logits are rounded to 8 bits.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, labels: linear_cross_entropy(x, w[:3], labels), "w is .D V."),
        (lambda x, w, labels: linear_cross_entropy(x, w, labels[:, :2]), "labels is"),
        (lambda x, w, labels: linear_cross_entropy(x, w, labels, soft_cap=0.0), "soft_cap is 0.0"),
        (lambda x, w, labels: linear_cross_entropy(x, w, labels, impl="gpu"), "no implementation 'gpu'"),
    ],
)
def test_refuses(change, message):
    x, w, labels, _ = (jnp.asarray(a) for a in make(4))
    # Where a type checker is on, it may speak first.
    with pytest.raises((ValueError, TypeError), match=f"{message}|[Tt]ype-check"):
        change(x, w, labels)
