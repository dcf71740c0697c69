import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels.common import blocks, chunks, decays
from pallas_kernels.common.accurate import accurate, rest_of_product, with_rest


@pytest.mark.parametrize("size", [1, 8, 64, 128])
def test_inverse_of_correlated_keys(size):
    """Unit keys of correlation 0.9 and beta up to 2: a Neumann product would be off by 1e10 and more."""
    rng = np.random.default_rng(0)
    keys = np.sqrt(0.9) * rng.normal(size=(3, 1, 32)) + np.sqrt(0.1) * rng.normal(size=(3, size, 32))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    strict = np.tril(2 * rng.uniform(size=(3, size, 1)) * (keys @ keys.swapaxes(-1, -2)), -1).astype(np.float32)
    want = np.linalg.inv(np.eye(size) + strict.astype(np.float64))
    got = np.asarray(jax.jit(blocks.inverse)(strict))
    # As accurate as substitution: a few units in the last place, grown by the size of the system.
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 1e-5
    assert not np.any(np.triu(got, 1))


def test_accurate_products():
    """Sums of 256 products that are all positive, rows of all sizes, one of zeros: a last place is 1.2e-7."""
    product = jax.jit(lambda x, y: x @ y.T)
    rng = np.random.default_rng(0)
    x = (rng.uniform(size=(64, 256)) * 2.0 ** rng.integers(-20, 20, size=(64, 1))).astype(np.float32)
    x[3] = 0
    y = (3 + rng.normal(size=(32, 256))).astype(np.float32)
    want = x.astype(np.float64) @ y.astype(np.float64).T
    error = lambda got: np.max(np.abs(got - want) / np.maximum(want, 1e-30))
    assert error(jax.jit(lambda x, y: accurate(product, x, y))(x, y)) < 1.2e-7 < error(product(x, y))


def test_what_float32_does_not_hold():
    """Sums of 64 products, and products by themselves: with their rest, right to a hundredth of a last place."""
    x, y = (3 + np.random.default_rng(i).normal(size=(32, 64)).astype(np.float32) for i in range(2))
    pairs = {
        "sums": (jax.jit(lambda x, y: with_rest(lambda x, y: x @ y.T, x, y)), x.astype(np.float64) @ y.T),
        "entries": (jax.jit(lambda x, y: (x * y, rest_of_product(x, y))), x.astype(np.float64) * y),
    }
    for name, (function, want) in pairs.items():
        total, rest = (np.asarray(part, np.float64) for part in function(x, y))
        error = lambda got, want=want: np.max(np.abs(got - want)) / np.max(np.abs(want))
        assert error(total + rest) < 2e-9 < 2e-8 < error(total), name


def test_merge_and_part():
    whole = np.tril(np.random.default_rng(0).normal(size=(2, 3, 8, 8)))
    diagonal, below = blocks.part(jnp.asarray(whole))
    assert diagonal.shape == (2, 6, 4, 4)
    np.testing.assert_array_equal(diagonal[0, 1], whole[0, 0, 4:, 4:].astype(np.float32))
    np.testing.assert_array_equal(blocks.merge(diagonal, below), whole.astype(np.float32))


def test_split_and_join():
    x_BTNH = jnp.arange(2 * 7 * 6 * 3.0).reshape(2, 7, 6, 3)
    x_CBKGLH = chunks.split(x_BTNH, 2, 4, jnp.dtype("float32"))
    assert x_CBKGLH.shape == (2, 2, 2, 3, 4, 3)
    np.testing.assert_array_equal(x_CBKGLH[1, 0, 1, 2, 0], x_BTNH[0, 4, 5])
    assert not np.any(x_CBKGLH[1, ..., 3, :])
    np.testing.assert_array_equal(chunks.join(x_CBKGLH, 7, jnp.dtype("float32")), x_BTNH)


def test_segments():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 3, 3]], jnp.int32)
    segments = chunks.Segments(ids, 4)
    same, reads, writes, through = (
        np.squeeze(np.asarray(x))
        for x in (segments.same_CB111LL, segments.reads_CB11L1, segments.writes_CB11L1, segments.through_CB1111)
    )
    np.testing.assert_array_equal(same[0, 0, 3], [False, False, False, True])
    np.testing.assert_array_equal(reads[0], [[True, True, True, False], [True, True, False, False]])
    np.testing.assert_array_equal(writes[0], [[False, False, False, True], [False, False, True, True]])
    # Filled up with the last document.
    np.testing.assert_array_equal(reads[1], [[True] * 4, [False] * 4])
    np.testing.assert_array_equal(through, [[False, False], [True, False]])


@pytest.mark.parametrize("decay", [decays.HeadDecay, decays.ChannelDecay])
def test_small_decays_beside_large_ones(decay):
    """d(j, i] after half a chunk of -30 per token, where a float32 cumulative sum has steps of 1e-4."""
    g = np.concatenate([np.full(32, -30.0), np.linspace(-0.001, -0.1, 32)]).astype(np.float32)
    ones = jnp.ones((1, 1, 1, 64, 1))
    d = decay(jnp.asarray(g).reshape(1, 1, 1, 1, 64, 1), chunks.Segments(jnp.ones((1, 64), jnp.int32), 64))
    sums = np.cumsum(g.astype(np.float64))
    want = np.tril(np.exp(np.minimum(sums[:, None] - sums[None, :], 0)))
    # Two roundings of a product or a sum of size 1, six times at most.
    np.testing.assert_allclose(np.squeeze(d.scores(ones[:, :, :, None], ones)), want, atol=1e-6)


def test_what_other_platforms_keep_takes_no_memory():
    """Layers under a scan hold as much with every implementation at hand as with the one that runs."""
    B, T, N, H = 1, 256, 2, 32

    def loss(impl, x_BTNH, w_CH):
        def layer(x_BTNH, w_H):
            beta_BTN, k_BTNH = jnp.full((B, T, N), 0.5), 0.1 * w_H * x_BTNH
            return kernels.delta_rule(x_BTNH, k_BTNH, x_BTNH, beta_BTN, impl=impl)[0], None

        return jnp.sum(jax.lax.scan(layer, x_BTNH, w_CH)[0])

    def memory(impl):
        grad = jax.jit(jax.grad(functools.partial(loss, impl), argnums=(0, 1)))
        analysis = grad.lower(jnp.ones((B, T, N, H)), jnp.ones((4, H))).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert memory(None) == memory("xla")
