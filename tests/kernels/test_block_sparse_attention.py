import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention, block_sparse_attention
from pallas_kernels.block_sparse_attention import tpu, tpu_groups, tpu_tokens, xla

# float32 sums of some hundred exponentials and products, in another order.
VALUE_TOLERANCE, GRAD_TOLERANCE = 2e-6, 1e-5


def rms_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.array_equal(np.isfinite(got), np.isfinite(want))
    got, want = got[np.isfinite(want)], want[np.isfinite(want)]
    return np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30) if want.size else 0.0


def make(T, S=None, G=2, K=2, H=8, P=6, J=3, block_size=16, query_block=1, B=4, seed=0):
    """Returns q, k, v and ids, which come in any order, twice, and as numbers that are no blocks."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    S = T if S is None else S
    ids = rng.integers(-2, -(-S // block_size) + 1, size=(B, -(-T // query_block), K, J), dtype=np.int32)
    return normal(B, T, K * G, H), normal(B, S, K, H), normal(B, S, K, P), ids


def make_segments(S, seed=1):
    """Packed rows: without padding, with it at the right, at the left and anywhere, everywhere."""
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.random((4, S)) < 0.05, axis=1) + 1
    ids[1, S - S // 3 :] = 0
    ids[2, : S // 3] = 0
    ids[2, rng.random(S) < 0.3] = 0
    ids[3] = 0
    return ids.astype(np.int32)


def with_gradients(fn, *args):
    """Returns o and lse, and gradients for random cotangents of both."""
    o_and_lse, pull = jax.vjp(fn, *args)
    rng = np.random.default_rng(2)
    return o_and_lse, pull(jax.tree.map(lambda o: jnp.asarray(rng.normal(size=o.shape), o.dtype), o_and_lse))


@functools.partial(jax.jit, static_argnames=("impl", "block_size", "query_block", "window_size", "scale"))
def run(q, k, v, block_ids, segment_ids=None, **options):
    fn = lambda q, k, v: block_sparse_attention(q, k, v, block_ids, segment_ids=segment_ids, **options)
    return with_gradients(fn, q, k, v)


def assert_same(got, want, value_tolerance=VALUE_TOLERANCE, grad_tolerance=GRAD_TOLERANCE):
    for which, tolerance in ((0, value_tolerance), (1, grad_tolerance)):
        for g, w in zip(jax.tree.leaves(got[which]), jax.tree.leaves(want[which]), strict=True):
            assert rms_error(g, w) < tolerance


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks for the short sequences of a test, and a last one that is not full."""
    monkeypatch.setattr(xla, "CHOSEN_KEYS", 2000)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"G": 1, "K": 1}, {"block_size": 64}),
        ({"G": 2, "K": 2}, {"block_size": 16, "query_block": 5, "window_size": 20}),
        ({"G": 16, "K": 1, "J": 1}, {"block_size": 32, "query_block": 16, "scale": 0.7}),
        ({"G": 3, "K": 2, "J": 2}, {"block_size": 128, "window_size": 3}),
    ],
)
def test_agrees_with_ref(sizes, options):
    T = 131
    blocks = {name: size for name, size in options.items() if name in ("block_size", "query_block")}
    args = *make(T, **sizes, **blocks), make_segments(T)
    want = run(*args, impl="ref", **options)
    assert_same(run(*args, impl="xla", **options), want)
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in args[:3]]
        exact = run(*wide, *args[3:], impl="ref", **options)
        assert exact[0][0].dtype == jnp.float64
        assert_same(run(*wide, *args[3:], impl="xla", **options), exact, 1e-14, 1e-13)
    assert_same(want, exact)


def test_ref_is_a_softmax_over_what_was_chosen():
    q, k, v, block_ids = make(20, 29, block_size=4, query_block=3)
    ids = make_segments(29)
    (o, lse), _ = run(q, k, v, block_ids, ids, impl="ref", block_size=4, query_block=3, window_size=9)
    for b, t, n in [(0, 0, 0), (0, 19, 3), (1, 7, 2), (2, 18, 1), (3, 5, 0)]:
        at = 9 + t
        real = [s for s in range(at + 1) if ids[b, s] > 0]
        chosen = [s for s in real[-9:] if s // 4 in block_ids[b, t // 3, n // 2] and ids[b, s] == ids[b, at] > 0]
        weights = [np.exp(8**-0.5 * q[b, t, n] @ k[b, s, n // 2]) for s in chosen]
        want = sum((w * v[b, s, n // 2] for w, s in zip(weights, chosen, strict=True)), np.zeros(6)) / (
            sum(weights) or 1
        )
        np.testing.assert_allclose(o[b, t, n], want, atol=1e-6)
        np.testing.assert_allclose(lse[b, n, t], np.log(sum(weights)) if chosen else -np.inf, rtol=1e-5)


def assert_dense(run, T, G, block_size, query_block, K=2):
    """Asserts that all blocks together are attention to all keys."""
    options = {"window_size": 3 * T // 4, "scale": 0.5}
    q, k, v, _ = make(T, G=G, K=K)
    shape = 4, -(-T // query_block), K, -(-T // block_size)
    block_ids, ids = np.broadcast_to(np.arange(shape[3], dtype=np.int32)[::-1], shape), make_segments(T)
    got = run(q, k, v, block_ids, ids, block_size=block_size, query_block=query_block, **options)
    dense = lambda q, k, v: attention(q, k, v, segment_ids=jnp.asarray(ids), **options)
    assert_same(got, jax.jit(with_gradients, static_argnums=0)(dense, q, k, v), 1e-6, 1e-6)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("G", "block_size", "query_block"), [(1, 64, 64), (2, 16, 1), (3, 128, 1), (8, 32, 5), (16, 16, 150)]
)
def test_all_blocks_are_dense_attention(G, block_size, query_block):
    assert_dense(run, 150, G, block_size, query_block)


@pytest.mark.parametrize(("T", "S"), [(0, 0), (0, 5), (1, 1), (1, 50), (7, 50)])
def test_lengths(T, S):
    args = *make(T, S, query_block=3), make_segments(S)
    options = {"block_size": 16, "query_block": 3}
    want = run(*args, impl="ref", **options)
    assert_same(run(*args, impl=None, **options), want)
    if T == 0:  # Without queries, there is nothing to run.
        assert_same(run(*args, impl="tpu", **options), want)


def test_queries_that_see_nothing():
    T, query_block = 40, 4
    q, k, v, block_ids = make(T, query_block=query_block)
    block_ids[0] = -1
    block_ids[1] = 2  # Which is after the first 32 queries.
    for impl in ("ref", "xla"):
        (o, lse), grads = run(q, k, v, block_ids, impl=impl, block_size=16, query_block=query_block)
        assert np.all(np.asarray(o)[0] == 0)
        assert np.all(np.asarray(lse)[0] == -np.inf)
        assert np.all(np.isfinite(np.asarray(lse)[1]) == (np.arange(T) >= 32))
        for grad in grads:
            assert np.all(np.asarray(grad)[0] == 0)
            assert np.all(np.isfinite(grad))
            assert np.any(np.asarray(grad)[1] != 0)


def test_bfloat16():
    T, options = 100, {"block_size": 16, "query_block": 5}
    *narrow, block_ids = (jnp.asarray(a, jnp.bfloat16) if a.dtype == np.float32 else a for a in make(T, query_block=5))
    got = run(*narrow, block_ids, make_segments(T), impl="xla", **options)
    want = run(*(a.astype(jnp.float32) for a in narrow), block_ids, make_segments(T), impl="ref", **options)
    assert [a.dtype for a in (*got[0], *got[1])] == [jnp.bfloat16, jnp.float32, *[jnp.bfloat16] * 3]
    assert_same(got, want, 1e-2, 2e-2)  # Outputs are rounded to 8 bits; in gradients, two factors more.


# With those of all blocks, below: each number of query heads to a key/value head and each size of blocks, for queries
# with ids of their own (query_block 1) and for such as share them, as many as fill 128 rows or more. 16 heads are read
# in place. In one case there are ids for one head at a time, and in two memory for the gradients of two blocks. Where
# the scale is 0.4, some tiles of queries with ids of their own have small scores; where it is 0.5, none; else all.
TPU_CASES = [
    ({"G": 2, "T": 18, "S": 75}, {"block_size": 32, "query_block": 1, "window_size": 30, "scale": 0.4}),
    ({"G": 3, "K": 1, "T": 18, "S": 150, "two_blocks": True}, {"block_size": 64, "query_block": 1}),
    ({"G": 8, "T": 1, "S": 300, "J": 6}, {"block_size": 128, "query_block": 1, "scale": 0.5}),
    ({"G": 16, "K": 1, "T": 17, "S": 50}, {"block_size": 16, "query_block": 1}),
    ({"G": 1, "T": 1, "S": 300, "J": 6}, {"block_size": 128, "query_block": 128}),
    ({"G": 2, "T": 70, "S": 90, "two_blocks": True, "by_head": True}, {"block_size": 16, "query_block": 64}),
    ({"G": 3, "T": 70, "S": 75}, {"block_size": 32, "query_block": 50, "window_size": 41}),
    ({"G": 16, "T": 50, "S": 50, "J": 9}, {"block_size": 32, "query_block": 16, "scale": 0.5}),
]


def interpret(*args, **options):
    """Runs the TPU kernels, with races detected and fresh memory full of NaN, and asserts that they are what ran."""
    kernels = "tokens_" * (options["query_block"] == 1)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        ran = set(re.findall(r"block_sparse_attention_\w+ward", str(run.trace(*args, impl="tpu", **options).jaxpr)))
        assert ran == {f"block_sparse_attention_{kernels}{direction}" for direction in ("forward", "backward")}
        return run(*args, impl="tpu", **options)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of queries and of keys, and several parts of each."""
    sizes = {
        "_FORWARD_QUERIES": 16,
        "_BACKWARD_QUERIES": 8,
        "_KEYS": 32,
        "_GATHERED": 64,
        "_TOGETHER": 2,
        "_AT_ONCE": 8,
    }
    for name, size in {**sizes, "_SMALL": 23}.items():
        monkeypatch.setattr(tpu_tokens, name, size)
    monkeypatch.setattr(tpu_groups, "_FORWARD_KEYS", 128)
    monkeypatch.setattr(tpu_groups, "_BACKWARD_KEYS", 128)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("sizes", "options"), TPU_CASES)
def test_tpu_kernel_agrees_with_ref(monkeypatch, sizes, options):
    sizes = {"H": 24, "J": 2, **sizes}
    if sizes.pop("by_head", False):
        monkeypatch.setattr(tpu_groups, "MAX_IDS", 100)
    if sizes.pop("two_blocks", False):
        monkeypatch.setattr(tpu, "_MAX_GRADIENT_BYTES", 2 * options["block_size"] * 4 * (128 + 128))
    blocks = {name: options[name] for name in ("block_size", "query_block")}
    args = *make(**sizes, **blocks), make_segments(sizes["S"])
    want = run(*args, impl="ref", **options)
    assert np.any(np.isfinite(want[0][1]))  # Somebody sees something.
    assert_same(interpret(*args, **options), want)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("T", "G", "block_size", "query_block"), [(20, 1, 16, 1), (150, 8, 64, 16)])
def test_tpu_kernel_of_all_blocks_is_dense_attention(T, G, block_size, query_block):
    assert_dense(interpret, T, G, block_size, query_block, K=1)


def test_errors():
    q, k, v, block_ids = map(jnp.asarray, make(20))
    for change, message in [
        ({"block_size": 0}, "block_size is 0"),
        ({"query_block": 2}, "block_ids has shape"),
        ({"window_size": 0}, "window_size is 0"),
        ({"impl": "gpu"}, "no implementation 'gpu'"),
    ]:
        # Where the type checker is on, it may speak first.
        with pytest.raises((ValueError, TypeError), match=f"{message}|[Tt]ype-check"):
            block_sparse_attention(q, k, v, block_ids, **{"block_size": 16, **change})
    with pytest.raises(ValueError, match="T > S"):
        block_sparse_attention(q, k[:, :9], v[:, :9], block_ids, block_size=16)
