import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention
from pallas_kernels.attention import tpu, xla

# float32 sums of 200 exponentials and products, in another order.
VALUE_TOLERANCE, GRAD_TOLERANCE = 5e-6, 2e-5


OPTIONS = {
    "causal": {},
    "both ways": {"causal": False},
    "window": {"window_size": 7},
    "window both ways": {"causal": False, "window_size": 3},
    "sink tokens": {"window_size": 5, "sink_tokens": 3},
    "soft cap": {"soft_cap": 2.0, "scale": 0.7},
}


def rms_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.array_equal(np.isfinite(got), np.isfinite(want))
    got, want = got[np.isfinite(want)], want[np.isfinite(want)]
    return np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30) if want.size else 0.0


def make(T, S=None, N=4, K=2, H=8, P=6, B=5, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    S = T if S is None else S
    return normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, P), normal(N)


def make_g(S, N=4, B=5, seed=4):
    """Log-decays: mild ones, some that forget nothing, some that forget nearly all, some all."""
    rng = np.random.default_rng(seed)
    g = -np.abs(rng.normal(size=(B, S, N))) * 0.3
    choice = rng.random((B, S, N))
    return np.select([choice < 0.05, choice > 0.98, choice > 0.94], [0.0, -np.inf, -30.0], g).astype(np.float32)


def make_ids(T, seed=1):
    """Packed rows: without padding, with it at the right, at the left, anywhere, everywhere."""
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.random((5, T)) < 0.05, axis=1) + 1
    ids[1, T - T // 3 :] = 0
    ids[2, : max(T // 3, 1)] = 0
    ids[3, rng.random(T) < 0.3] = 0
    ids[4] = 0
    return ids.astype(np.int32)


jit = functools.partial(
    jax.jit,
    static_argnames=("impl", "causal", "window_size", "sink_tokens", "soft_cap", "scale"),
)


def outputs(q, k, v, sinks, ids=None, kv_ids=None, positions=(None, None), g=None, **options):
    """Returns o and lse."""
    positions, kv_positions = positions
    places = {"positions": positions, "kv_positions": kv_positions}
    return attention(q, k, v, g, sinks=sinks, segment_ids=ids, kv_segment_ids=kv_ids, **places, **options)


values = jit(outputs)


@jit
def run(q, k, v, sinks, ids=None, kv_ids=None, positions=(None, None), g=None, **options):
    """Returns o and lse, and the gradients of q, k, v, sinks and g for random cotangents of both."""
    fn = lambda q, k, v, sinks, g: outputs(q, k, v, sinks, ids, kv_ids, positions, g, **options)
    o_and_lse, pull = jax.vjp(fn, q, k, v, sinks, g)
    rng = np.random.default_rng(2)
    return o_and_lse, pull(jax.tree.map(lambda o: jnp.asarray(rng.normal(size=o.shape), o.dtype), o_and_lse))


def assert_same(got, want):
    for which, tolerance in ((0, VALUE_TOLERANCE), (1, GRAD_TOLERANCE)):
        for g, w in zip(jax.tree.leaves(got[which]), jax.tree.leaves(want[which]), strict=True):
            assert rms_error(g, w) < tolerance


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks for the short sequences of a test, and a last one that is not full."""
    monkeypatch.setattr(xla, "BLOCK_T", 16)
    monkeypatch.setattr(xla, "BLOCK_S", 15)
    monkeypatch.setattr(xla, "MAX_PAIRS_OF_ONE_BLOCK", 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", OPTIONS)
def test_agrees_with_ref(name):
    args, ids, options = make(67), make_ids(67), OPTIONS[name]
    assert_same(run(*args, ids, impl="xla", **options), run(*args, ids, impl="ref", **options))


@pytest.mark.parametrize("T", [0, 1, 3, 200])
def test_lengths(T):
    q, k, v, _ = make(T, N=3, K=1, H=5, P=7)
    args = q, k, v, None, make_ids(T)
    assert_same(run(*args, impl=None, window_size=90), run(*args, impl="ref", window_size=90))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("T", [1, 20])
def test_more_keys_than_queries(T):
    q, k, v, _ = make(T, 45)
    assert_same(run(q, k, v, None, impl="xla", window_size=30), run(q, k, v, None, impl="ref", window_size=30))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("impl", ["ref", "xla"])
def test_keys_in_any_order(impl):
    """Keys that say where they stand may be shuffled, and empty slots lie between them."""
    (q, k, v, sinks), T, S = make(40), 40, 48
    options = {"window_size": 9, "sink_tokens": 2, "impl": impl}
    want, want_grads = run(q, k, v, sinks, **options)
    order = np.random.default_rng(3).permutation(S)
    slots = lambda a: np.pad(a, ((0, 0), (0, S - T), *((0, 0) for _ in a.shape[2:])))[:, order]
    ids, positions = np.ones((5, T), np.int32), np.broadcast_to(np.arange(T, dtype=np.int32), (5, T))
    got, grads = run(q, slots(k), slots(v), sinks, ids, slots(ids), (positions, slots(positions)), **options)
    assert_same((got, (grads[0], grads[3])), (want, (want_grads[0], want_grads[3])))
    for grad, wanted in zip(grads[1:3], want_grads[1:3], strict=True):
        assert rms_error(grad, slots(np.asarray(wanted))) < GRAD_TOLERANCE


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", ["causal", "window", "grouped", "bfloat16"])
def test_forget_gates(case):
    T, dtype = 67, jnp.bfloat16 if case == "bfloat16" else jnp.float32
    q, k, v, _ = (jnp.asarray(a, dtype) for a in make(T, N=6 if case == "grouped" else 4))
    g, ids = make_g(T, q.shape[2]), make_ids(T)
    options = {"window_size": 20} if case == "window" else {}
    got = run(q, k, v, None, ids, g=g, impl="xla", **options)
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    want = run(*wide, None, ids, g=g, impl="ref", **options)
    assert np.all(np.asarray(got[1][4])[ids == 0] == 0)
    if dtype == jnp.float32:
        return assert_same(got, want)
    assert got[1][4].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rms_error(a, b) < 2e-2  # Probabilities, their gradients and the outputs are rounded to 8 bits.


def test_forget_gates_are_exact_beside_closed_ones():
    """A decay of -0.01 is not lost in the sum of those of thousands of closed gates before it."""
    T = 4096
    q, k, v, _ = make(T, B=1, N=2, K=1)
    g = np.where(np.arange(T) <= T - 100, -30.0, -0.01).astype(np.float32)[None, :, None].repeat(2, axis=2)
    last = lambda a: a[:, -100:]
    o, lse = values(q, k, v, None, g=g, impl="xla")
    want, want_lse = values(last(q), last(k), last(v), None, g=last(g), impl="ref")
    assert rms_error(last(np.asarray(o))[:, 50:], np.asarray(want)[:, 50:]) < VALUE_TOLERANCE
    assert rms_error(np.asarray(lse)[..., -50:], np.asarray(want_lse)[..., -50:]) < VALUE_TOLERANCE


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("impl", ["ref", "xla"])
def test_cache_apart_from_the_tokens_after_it(impl):
    """What queries see of a cache and of each other, merged by the log-sum-exp, is what they see of both."""
    (q, k, v, _), g, T, past = make(40), make_g(40), 40, 25
    want, want_lse = values(q, k, v, None, g=g, impl=impl)
    o_own, lse_own = values(q[:, past:], k[:, past:], v[:, past:], None, g=g[:, past:], impl=impl)
    # Slots without a token before, between and after the others.
    order = np.r_[0, 0, np.arange(12), 0, np.arange(12, past), 0]
    is_token = np.r_[0, 0, np.ones(12, int), 0, np.ones(past - 12, int), 0]
    row = lambda a: np.broadcast_to(a.astype(np.int32), (5, len(a)))
    places = row(np.arange(past, T)), row(np.where(is_token, order, -1))
    ids = row(np.ones(T - past)), row(is_token)
    slots = [a[:, order] for a in (k, v)]
    o, lse = values(q[:, past:], *slots, None, *ids, places, g[:, order], impl=impl)
    lse = lse + np.moveaxis(np.cumsum(g[:, past:], axis=1), 1, 2)
    both = np.logaddexp(lse, lse_own)
    weight = lambda lse: np.moveaxis(np.exp(lse - both), 1, 2)[..., None]
    assert rms_error(weight(lse) * o + weight(lse_own) * o_own, np.asarray(want)[:, past:]) < VALUE_TOLERANCE
    assert rms_error(both, np.asarray(want_lse)[..., past:]) < VALUE_TOLERANCE


def test_cross_attention():
    q, k, v, sinks = make(30, 11)
    ids, kv_ids = make_ids(30), make_ids(11)
    got = run(q, k, v, sinks, ids, kv_ids, impl="xla", causal=False)
    assert_same(got, run(q, k, v, sinks, ids, kv_ids, impl="ref", causal=False))


def test_ref_is_a_softmax():
    q, k, v, sinks = make(9)
    o, lse = values(q, k, v, sinks, window_size=4, sink_tokens=1, impl="ref")
    for b, t, n in [(0, 0, 0), (1, 8, 3), (4, 5, 1)]:
        seen = [s for s in range(t + 1) if t - s < 4 or s < 1]
        scores = np.asarray(k)[b, seen, n // 2] @ np.asarray(q)[b, t, n] / np.sqrt(8)
        weights = np.exp(scores) / (np.sum(np.exp(scores)) + np.exp(sinks[n]))
        np.testing.assert_allclose(o[b, t, n], weights @ np.asarray(v)[b, seen, n // 2], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[b, n, t], np.log(np.sum(np.exp(scores)) + np.exp(sinks[n])), rtol=1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("sinks", ["no sinks", "sinks"])
def test_queries_that_see_nothing(sinks):
    q, k, v, logits = make(20, 33)
    ids, kv_ids = make_ids(20), np.zeros((5, 33), np.int32)
    has_sinks = sinks == "sinks"
    (o, lse), grads = run(q, k, v, logits if has_sinks else None, ids, kv_ids, impl="xla")
    sees_sink = np.broadcast_to((np.asarray(ids) > 0)[:, None] & has_sinks, lse.shape)
    np.testing.assert_array_equal(lse, np.where(sees_sink, np.asarray(logits)[None, :, None], -np.inf))
    assert np.all(np.asarray(o) == 0)
    assert all(np.all(np.asarray(a) == 0) for a in grads[:3])
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("row", [0, 3])
def test_packed_equals_separate(row):
    q, k, v, sinks = make(67)
    ids = np.asarray(make_ids(67))[row]
    options = {"window_size": 6, "sink_tokens": 2, "impl": "xla"}
    one = lambda *arrays: [a[None] for a in arrays]
    packed = values(*one(q[row], k[row], v[row]), sinks, *one(ids), **options)
    assert np.all(np.asarray(packed[0])[0, ids == 0] == 0)
    documents = np.unique(ids[ids > 0])
    assert len(documents) > 2
    for i in documents:
        own, size = ids == i, int(np.sum(ids == i))
        # Padded to one length, so that one program serves all documents.
        alone = [np.pad(a[row, own], ((0, 67 - size), (0, 0), (0, 0))) for a in (q, k, v)]
        o, lse = values(*one(*alone), sinks, *one((np.arange(67) < size).astype(np.int32)), **options)
        assert rms_error(np.asarray(packed[0])[0, own], np.asarray(o)[0, :size]) < VALUE_TOLERANCE
        assert rms_error(np.asarray(packed[1])[0, :, own], np.asarray(lse)[0, :, :size].T) < VALUE_TOLERANCE


@pytest.mark.usefixtures("small_blocks")
def test_padding_has_no_gradient():
    ids = make_ids(67)
    (o, lse), grads = run(*make(67), ids, impl="xla")
    for a in (o, *grads[:3]):
        assert np.all(np.asarray(a)[np.asarray(ids) == 0] == 0)
    assert np.all(np.moveaxis(lse, 1, 2)[np.asarray(ids) == 0] == -np.inf)


@pytest.mark.usefixtures("small_blocks")
def test_future_does_not_leak():
    q, k, v, sinks = make(67)
    past = values(q, k, v, sinks, impl="xla")
    change = np.where(np.arange(67) < 40, 0, 1e3).astype(np.float32)[:, None, None]
    changed = values(q, k + change, v + change, sinks, impl="xla")
    np.testing.assert_array_equal(np.asarray(past[0])[:, :40], np.asarray(changed[0])[:, :40])
    np.testing.assert_array_equal(np.asarray(past[1])[..., :40], np.asarray(changed[1])[..., :40])


@pytest.mark.usefixtures("small_blocks")
def test_large_scores_stay_finite():
    q, k, v, sinks = make(67)
    results = run(1e3 * q, 1e3 * k, v, sinks, impl="xla")
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(results))


@pytest.mark.parametrize("g", [None, make_g(1024, B=1)], ids=["", "forget gates"])
def test_scores_are_never_whole(g):
    q, k, v, _ = make(1024, B=1)
    stats = run.lower(q, k, v, None, g=g).compile().memory_analysis()
    assert stats is not None
    assert stats.temp_size_in_bytes < 4 * 1024 * 1024 * 4 / 4  # A quarter of the scores of 4 heads.


@pytest.mark.usefixtures("small_blocks")
def test_bfloat16():
    args = [a.astype(jnp.bfloat16) for a in make(67)]
    ids = make_ids(67)
    got = run(*args, ids, impl="xla")
    want = run(*[a.astype(jnp.float32) for a in args], ids, impl="ref")
    assert [a.dtype for a in jax.tree.leaves(got)] == [jnp.bfloat16, jnp.float32] + [jnp.bfloat16] * 4
    for g, a in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rms_error(g, a) < 2e-2  # Probabilities, their gradients and the outputs are rounded to 8 bits.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: attention(q[:, :, :3], k, v), "K . N"),
        (lambda q, k, v: attention(q, k[:, :2], v[:, :2]), "do not stand among"),
        (lambda q, k, v: attention(q, k, v, window_size=0), "window_size is 0"),
        (lambda q, k, v: attention(q, k, v, sink_tokens=2), "set window_size too"),
        (lambda q, k, v: attention(q, k, v, soft_cap=-1.0), "soft_cap is -1.0"),
        (lambda q, k, v: attention(q, k, v, positions=jnp.ones((5, 4), jnp.int32)), "belong together"),
        (lambda q, k, v: attention(q, k, v, jnp.zeros((5, 4, 4)), causal=False), "g with causal=False"),
        (lambda q, k, v: attention(q, k, v, jnp.zeros((5, 4, 2))), "g is"),
        (
            lambda q, k, v: attention(
                *(jnp.tile(a, (1, 32, 1, 1)) for a in (q, k, v)), jnp.zeros((5, 128, 4)), impl="tpu"
            ),
            "does not support g",
        ),
        (lambda q, k, v: attention(q, k, v, kv_segment_ids=jnp.ones((5, 4), jnp.int32)), "without segment_ids"),
        (lambda q, k, v: attention(q[:, :1], k, v, segment_ids=jnp.ones((5, 1), jnp.int32)), "pass kv_segment_ids"),
        (lambda q, k, v: attention(q, k, v, impl="triton"), "no implementation 'triton'"),
        (lambda q, k, v: attention(q, k, v, impl="tpu"), "fewer than 128 tokens"),
        (lambda q, k, v: attention(q, k, v, window_size=3, sink_tokens=1, impl="tpu"), "does not support sink_tokens"),
    ],
)
def test_refuses(change, message):
    q, k, v, _ = (jnp.asarray(a) for a in make(4))
    # Where a type checker is on, it may speak first.
    with pytest.raises((ValueError, TypeError), match=f"{message}|[Tt]ype-check"):
        change(q, k, v)


def test_tpu_kernel_agrees_with_ref(monkeypatch):
    monkeypatch.setattr(tpu, "INTERPRET", True)
    rows = [0, 3, 4]  # Packed, with holes, and all padding.
    q, k, v, sinks = make(150)
    # Scores of 100 and more, in padding too: e^100 is more than float32 can hold.
    args = 20 * q[rows], k[rows], v[rows], sinks, make_ids(150)[rows]
    options = {"window_size": 20, "soft_cap": 100.0, "scale": 0.7}
    assert_same(run(*args, impl="tpu", **options), run(*args, impl="ref", **options))
