import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import short_conv
from pallas_kernels.short_conv import tpu

# float32 sums of at most 8 products, in another order; gradients of w add up B * T of them.
VALUE_TOLERANCE, GRAD_TOLERANCE = 2e-6, 2e-5


def rms_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30) if want.size else 0.0


def make(T, W=4, B=5, D=6, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return normal(B, T, D), normal(D, W), normal(D), normal(B, W - 1, D)


def make_ids(T, seed=1):
    """Packed rows: without padding, with it at the right, at the left, anywhere, everywhere."""
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.random((5, T)) < 0.15, axis=1) + 1
    ids[1, T - T // 3 :] = 0
    ids[2, : max(T // 3, 1)] = 0
    ids[3, rng.random(T) < 0.3] = 0
    ids[4] = 0
    return ids.astype(np.int32)


jit = functools.partial(jax.jit, static_argnames=("impl", "activation"))


def outputs(x, w, bias, state, ids=None, *, impl="xla", activation=None):
    """Returns y and the new state."""
    return short_conv(x, w, bias=bias, state=state, segment_ids=ids, activation=activation, impl=impl)


values = jit(outputs)


@jit
def run(x, w, bias, state, ids, *, impl, activation=None):
    """Returns y and the state, and the gradients of x, w, bias and state for random cotangents of both."""
    fn = lambda x, w, bias, state: outputs(x, w, bias, state, ids, impl=impl, activation=activation)
    y_and_state, pull = jax.vjp(fn, x, w, bias, state)
    rng = np.random.default_rng(2)
    return y_and_state, pull(jax.tree.map(lambda o: jnp.asarray(rng.normal(size=o.shape), o.dtype), y_and_state))


def assert_same(got, want):
    for g, w in zip(got[0], want[0], strict=True):
        assert rms_error(g, w) < VALUE_TOLERANCE
    for g, w in zip(got[1], want[1], strict=True):
        assert rms_error(g, w) < GRAD_TOLERANCE


@pytest.mark.parametrize("T", [0, 1, 3, 67, 200])
def test_agrees_with_ref(T):
    args, ids = make(T), make_ids(T)
    assert_same(run(*args, ids, impl="xla", activation="silu"), run(*args, ids, impl="ref", activation="silu"))


@pytest.mark.parametrize(("W", "activation"), [(1, "silu"), (4, None), (8, None)])
def test_without_documents(W, activation):
    args = make(40, W)
    got = run(*args, None, impl=None, activation=activation)
    assert_same(got, run(*args, None, impl="ref", activation=activation))


def run_interpreted(*args, **options):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        return run(*args, impl="tpu", **options)


def make_ids_without_holes(T):
    """Rows without padding, with it at the right, of padding alone."""
    ids = make_ids(T)[:3]
    ids[2] = 0
    return ids


@pytest.mark.parametrize(
    ("T", "W", "activation", "packed"), [(2, 4, "silu", True), (67, 4, "silu", True), (150, 8, None, False)]
)
def test_tpu_agrees_with_ref(T, W, activation, packed):
    args, ids = make(T, W, B=3), make_ids_without_holes(T) if packed else None
    want = run(*args, ids, impl="ref", activation=activation)
    assert_same(run_interpreted(*args, ids, activation=activation), want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tpu_in_several_blocks(monkeypatch, dtype):
    monkeypatch.setattr(tpu, "MAX_BLOCK_T", 128)
    monkeypatch.setattr(tpu, "MAX_TILES", 1)
    args, ids = [a.astype(dtype) for a in make(300, D=150, B=3)], make_ids_without_holes(300)
    got, want = run_interpreted(*args, ids, activation="silu"), run(*args, ids, impl="ref", activation="silu")
    if dtype == jnp.float32:
        assert_same(got, want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rms_error(g, w) < 1e-2


def test_tpu_leaves_padding_before_tokens_to_xla():
    args, ids = make(67), make_ids(67)
    want = run(*args, ids, impl="ref", activation="silu")
    assert_same(run_interpreted(*args, ids, activation="silu"), want)


def test_tpu_does_not_read_padding():
    x, w, bias, state = make(67, B=3)
    ids = make_ids_without_holes(67)
    noisy = np.where(ids[..., None] > 0, x, np.float32(np.nan))
    got, want = (run_interpreted(a, w, bias, state, ids, activation="silu") for a in (noisy, x))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.all(np.asarray(got[1][0])[ids == 0] == 0)


def test_ref_is_a_convolution():
    x, w, bias, state = make(11)
    y, _ = values(x, w, bias, state, impl="ref")
    inputs = np.concatenate([state, x], axis=1)
    for b, d in [(0, 0), (2, 5)]:
        want = np.convolve(inputs[b, :, d], w[d, ::-1], mode="valid") + float(bias[d])
        np.testing.assert_allclose(np.asarray(y)[b, :, d], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [0, 1, 9])
def test_cut_anywhere(cut):
    x, w, bias, state = make(20)
    ids = np.minimum(make_ids(20), 1)  # One document: a state belongs to the first one of a call.
    whole, last = values(x, w, bias, state, ids)
    first, middle = values(x[:, :cut], w, bias, state, ids[:, :cut])
    second, end = values(x[:, cut:], w, bias, middle, ids[:, cut:])
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-6)
    np.testing.assert_array_equal(end, last)


@pytest.mark.parametrize("row", [0, 3])
def test_packed_equals_separate(row):
    x, w, bias, state = make(30)
    x, state, ids = x[row], state[row], make_ids(30)[row]
    # Separate documents, padded to one length so that one program serves them all.
    y, last = values(x[None], w, bias, state[None], ids[None])
    assert np.all(np.asarray(y)[0, ids == 0] == 0)
    documents = np.unique(ids[ids > 0])
    assert len(documents) > 2
    for n, i in enumerate(documents):
        own_x, size = np.zeros_like(x), np.sum(ids == i)
        own_x[:size] = x[ids == i]
        own_ids = (np.arange(30) < size).astype(np.int32)
        own, own_last = values(own_x[None], w, bias, state[None] * np.float32(n == 0), own_ids[None])
        np.testing.assert_allclose(np.asarray(y)[0, ids == i], np.asarray(own)[0, :size], atol=1e-6)
    np.testing.assert_array_equal(last, own_last)


def test_padding_is_not_read():
    x, w, bias, state = make(67)
    ids = make_ids(67)
    noisy = np.where(ids[..., None] > 0, x, np.float32(np.nan))
    want = run(x, w, bias, state, ids, impl="xla", activation="silu")
    got = run(noisy, w, bias, state, ids, impl="xla", activation="silu")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.all(np.asarray(got[1][0])[np.asarray(ids) == 0] == 0)


def test_state_passes_a_row_of_padding():
    x, w, bias, state = make(67)
    (y, last), _ = run(x, w, bias, state, make_ids(67), impl="xla", activation="silu")
    y, last = np.asarray(y), np.asarray(last)
    y, last, state = y[4], last[4], state[4]
    np.testing.assert_array_equal(last, state)
    assert np.all(y == 0)


def test_future_does_not_leak():
    x, w, bias, state = make(40)
    change = np.where(np.arange(40) < 20, 0, 1e3).astype(np.float32)[:, None]
    y, y_changed = (np.asarray(values(a, w, bias, state)[0]) for a in (x, x + change))
    np.testing.assert_array_equal(y[:, :20], y_changed[:, :20])


def test_bfloat16():
    x, w, bias, state = make(67)
    low = [a.astype(jnp.bfloat16) for a in (x, w, bias, state)]
    got = run(*low, make_ids(67), impl="xla", activation="silu")
    want = run(*[a.astype(np.float32) for a in low], make_ids(67), impl="ref", activation="silu")
    for g, a in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == jnp.bfloat16
        assert rms_error(g, a) < 1e-2  # Random cotangents are rounded to 8 bits, as the outputs are.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: short_conv(x, w[:2]), "channels"),
        (lambda x, w: short_conv(x, jnp.ones((6, 9))), "width 9"),
        (lambda x, w: short_conv(x, w, state=jnp.ones((5, 5, 6))), "last W-1 inputs"),
        (lambda x, w: short_conv(x, w, impl="gpu"), "no implementation 'gpu'"),
        (lambda x, w: short_conv(x, w, activation="gelu"), "activation 'gelu'"),
    ],
)
def test_refuses(change, message):
    x, w, _, _ = (jnp.asarray(a) for a in make(4))
    # Where a type checker is on, it may speak first.
    with pytest.raises((ValueError, TypeError), match=f"{message}|[Tt]ype-check"):
        change(x, w)
