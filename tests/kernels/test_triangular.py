"""The inverse inside of TPU kernels, interpreted on a CPU, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import triangular
from tests.kernels import recurrent

L = 128


@functools.partial(jax.jit, static_argnums=1)
def inverse(strict_NLL, exact):
    def kernel(strict_ref, inverse_ref):
        for n, inverse_LL in enumerate(triangular.inverses([strict_ref[n] for n in range(len(strict_NLL))], exact)):
            inverse_ref[n] = inverse_LL

    with pltpu.force_tpu_interpret_mode(True):
        shape = jax.ShapeDtypeStruct(strict_NLL.shape, jnp.float32)
        return pl.pallas_call(kernel, out_shape=shape)(strict_NLL)


@functools.cache
def system(num, correlation, beta):
    """What the delta rule inverts, without decays: keys of length 1 that share a part."""
    rng = np.random.default_rng(0)
    k_NLH = np.sqrt(correlation) * rng.normal(size=(num, 1, 128)) + np.sqrt(1 - correlation) * rng.normal(
        size=(num, L, 128)
    )
    k_NLH /= np.linalg.norm(k_NLH, axis=-1, keepdims=True)
    return np.tril(beta * k_NLH @ k_NLH.mT, -1).astype(np.float32)


@pytest.mark.parametrize(
    ("correlation", "beta", "exact_limit", "limit"),
    # The condition of the matrix is 5, 145, 1400 and 14,000; float32 has 6e-8, two bfloat16 numbers 4e-6.
    [(0, 1, 1e-7, 1e-5), (0.9, 1, 1e-7, 1e-4), (0.9, 1.9, 1e-6, 5e-4), (0.99, 2, 4e-6, 2e-3)],
)
def test_against_float64(correlation, beta, exact_limit, limit):
    strict_NLL = system(3, correlation, beta)  # a pair, and one that is left
    want_NLL = np.linalg.inv(np.eye(L) + strict_NLL.astype(np.float64))
    for exact, most in ((True, exact_limit), (False, limit)):
        assert recurrent.error(inverse(strict_NLL, exact), want_NLL) < most


def test_rows_do_not_depend_on_later_ones():
    strict_NLL = system(2, 0.9, 1.9)
    before_NLL = inverse(strict_NLL, False)
    for row in (1, 15, 16, 37, 64, 127):
        other_NLL = strict_NLL.copy()
        other_NLL[:, row:] *= 0.7
        after_NLL = inverse(other_NLL, False)
        np.testing.assert_array_equal(before_NLL[:, :row], after_NLL[:, :row])
        assert np.any(before_NLL[:, row:] != after_NLL[:, row:])
